"""What surgery notes on the modules it has been at, as attributes that are copied and pickled with them."""

from __future__ import annotations

from torch import nn

__all__ = ["FOLDED", "RESHAPED", "SKIP_REASON", "was_folded"]

#: On a convolution that convert_to_acu skipped: the reason, for report_acu.
SKIP_REASON = "acu_skip_reason"

#: On what fold_acu made: true.
FOLDED = "acu_folded"

#: On what a fold gave another kernel size, padding or dilation than the model's code expects: true.
RESHAPED = "acu_reshaped"


def was_folded(module: nn.Module) -> bool:
    """Whether :func:`fold_acu` made ``module`` from an active convolution."""
    return getattr(module, FOLDED, False)
