"""A learning rate of our own for the weights, in place of what their scheduler says."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from ._param_groups import is_position_group, set_learning_rate

__all__ = ["rate_ratios", "restart_rates"]


def rate_ratios(optimizer: Optimizer) -> list[float]:
    """The learning rate of each parameter group over that of the highest; all 1 where all are zero."""
    rates = [0.0 if is_position_group(group) else float(group["lr"]) for group in optimizer.param_groups]
    return [rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates]


def restart_rates(optimizers: Sequence[Optimizer], ratios: Sequence[Sequence[float]], rate: float) -> None:
    """Set every group's learning rate to ``rate`` times its ratio.

    Groups of positions follow their source by themselves. Groups that came after the ratios were taken
    (BackboneFinetuning adds some) keep the rate that whoever added them gives them.
    """
    for optimizer, shares in zip(optimizers, ratios, strict=True):
        for group, share in zip(optimizer.param_groups, shares, strict=False):
            if not is_position_group(group):
                set_learning_rate(group, rate * share)
