"""Attributes that surgery sets on the modules it changes or skips; they are copied and pickled with them."""

from __future__ import annotations

from torch import nn

__all__ = ["FOLDED", "RESHAPED", "SKIP_REASON", "was_folded"]

#: On a convolution that convert_to_acu skipped: the reason, for report_acu.
SKIP_REASON = "acu_skip_reason"

#: True on what fold_acu made.
FOLDED = "acu_folded"

#: True where a fold has another kernel size, padding or dilation than the model's code expects.
RESHAPED = "acu_reshaped"


def was_folded(module: nn.Module) -> bool:
    """Whether :func:`fold_acu` made ``module`` from an active convolution."""
    return getattr(module, FOLDED, False)
