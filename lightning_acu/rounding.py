"""Whole pixels near real-valued taps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_finite_offsets, require_package

__all__ = ["round_offsets"]


@torch.no_grad()
def round_offsets(offsets: Tensor, grid: Tensor, fixed: int | None = None, separate: bool = False) -> Tensor:
    """Each tap to its nearest pixel (ties to even), or all to the nearest set of pixels that are different.

    Args:
        offsets: (P, K, 2), in pixels; each of the P groups on its own.
        grid: (K, 2), whole numbers: tap k is at ``grid[k] + offsets[:, k]``.
        fixed: index of a tap that stays at its place on the grid, whatever its offset says.
        separate: give no two taps of a group the same pixel: of all ways to do that, the one with the smallest sum of
            squared distances.

    Returns:
        (P, K, 2), whole numbers.

    Raises:
        ModuleNotFoundError: ``separate`` and taps that would meet, and SciPy is not installed.
        ValueError: ``offsets`` are not finite or on the meta device, with ``separate``.
    """
    rounded = offsets.round()
    if separate:
        if offsets.is_meta:
            raise ValueError("`offsets` are on the meta device, without values to separate")
        used = offsets.clone()
        if fixed is not None:
            used[:, fixed] = 0
        check_finite_offsets([("", used)])
        for taps, own in zip(used + grid, rounded, strict=True):
            if len((taps - grid).round().add(grid).unique(dim=0)) < len(own):
                own.copy_(_separated(taps.double().cpu(), fixed).to(own) - grid)
    return rounded


def _separated(taps: Tensor, fixed: int | None) -> Tensor:
    """(K, 2): the assignment of taps to distinct pixels with the least sum of squared distances."""
    require_package("scipy", "`separate`=True, where taps would meet on one pixel,")
    from scipy.optimize import linear_sum_assignment

    # The other taps hold K - 1 pixels at most, so one of a tap's K nearest is free; all of those lie in this square.
    side = range(-(reach := math.ceil(math.sqrt(len(taps))) + 1), reach + 1)
    square = torch.cartesian_prod(*[torch.tensor(side, dtype=taps.dtype, device=taps.device)] * 2)
    pixels = (taps.round()[:, None] + square).flatten(0, 1).unique(dim=0)
    cost = (taps[:, None] - pixels).square().sum(-1)
    if fixed is not None:
        # Dearer than any other choice, for everyone but the fixed tap, and the other way round.
        own = (pixels == taps[fixed].round()).all(-1)
        prohibitive = cost.max() * len(taps) + 1
        cost[:, own] = prohibitive
        cost[fixed] = prohibitive
        cost[fixed, own] = 0
    _, chosen = linear_sum_assignment(cost.numpy())
    return pixels[torch.from_numpy(chosen)]
