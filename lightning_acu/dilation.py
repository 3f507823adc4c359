"""Plain dilated grids near real-valued taps.

The grid of a (kh, kw) kernel at dilation (dy, dx) has the centre of the layer's own grid, so that outputs keep their
size. Where that centre would be between pixels (an even kernel whose dilation changes by an odd number) the grid moves
by half a pixel: to where both sides are padded alike if that is possible, else the odd pixel goes to the end, as with
``padding="same"`` of ``F.conv2d``.

Shapes: P position groups, K = kh * kw taps; offsets (P, K, 2) hold (row, column) in pixels from the layer's own grid.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from .choices import one_of
from .geometry import LIMIT, ConvGeometry

__all__ = [
    "Dilations",
    "RoundTo",
    "as_dilations",
    "check_round_to",
    "dilated_offsets",
    "grid_dilations",
    "nearest_dilations",
    "padding_at",
]

#: Where rounding moves taps: each to its nearest pixel, or all to the nearest plain dilated grid.
RoundTo = Literal["pixels", "dilation"]

#: What was found for a layer: (dy, dx), or a list of them, one for each position group, where they differ.
Dilations = tuple[int, int] | list[tuple[int, int]]


def as_dilations(groups: list[tuple[int, int]]) -> Dilations:
    """One pair if all ``groups`` have the same, else all of them."""
    return groups[0] if len(set(groups)) == 1 else list(groups)


def check_round_to(name: str, to: str) -> None:
    """Check that ``to``, the argument ``name``, is one of the choices.

    Raises:
        ValueError: it is not.
    """
    one_of(name, to, get_args(RoundTo))


@torch.no_grad()
def nearest_dilations(offsets: Tensor, geometry: ConvGeometry) -> Tensor:
    """(P, 2) int64: for each group the dilations (dy, dx) >= 1 whose grid is nearest to its taps.

    Nearest by the sum of squared distances over all K taps, each from the point of the grid with its own index; the
    smaller dilation of two equally near. An axis with one row (column) of taps keeps its dilation. No transfer to the
    host: nothing waits for a GPU.

    Args:
        offsets: (P, K, 2), finite.
        geometry: of the layer.
    """
    axes = []
    for axis, (size, own) in enumerate(zip(geometry.kernel_size, geometry.dilation, strict=True)):
        if size == 1:
            axes.append(torch.full((len(offsets),), max(own, 1), dtype=torch.int64, device=offsets.device))
            continue
        moved = offsets[..., axis]
        index = _index(geometry, axis, moved).to(moved.dtype)
        from_centre = index - (size - 1) / 2
        best = own + (moved * from_centre).sum(-1) / from_centre.square().sum()
        # That is exact without the shift of half a pixel; with it the best one is among these neighbours.
        steps = torch.arange(-1, 3, dtype=torch.int64, device=offsets.device)
        highest = (LIMIT - 1) // (size - 1)
        candidates = (best.nan_to_num().floor().clamp(1, highest).long()[:, None] + steps).clamp(1, highest)
        distances = (moved[:, None] - _axis_offsets(candidates, geometry, axis)).square().sum(-1)
        axes.append(candidates.gather(1, distances.argmin(1, keepdim=True))[:, 0])
    return torch.stack(axes, -1)


def dilated_offsets(dilations: Tensor, geometry: ConvGeometry) -> Tensor:
    """(P, K, 2) int64: the offsets of taps that are exactly on the grids of ``dilations`` (P, 2)."""
    return torch.stack([_axis_offsets(dilations[:, axis], geometry, axis) for axis in (0, 1)], -1)


def grid_dilations(offsets: Tensor, geometry: ConvGeometry) -> list[tuple[int, int]] | None:
    """(dy, dx) for each group if all taps are exactly on plain dilated grids, else None; waits for a GPU.

    Args:
        offsets: (P, K, 2) on any device but "meta".
        geometry: of the layer. With a dilation of 0 (free shapes) there is no grid.
    """
    if 0 in geometry.dilation or not bool((offsets == offsets.round()).all()):
        return None
    here = offsets.detach().cpu()
    dilations = nearest_dilations(here, geometry)
    if not torch.equal(dilated_offsets(dilations, geometry).to(here.dtype), here):
        return None
    return [(rows, columns) for rows, columns in dilations.tolist()]


def padding_at(dilation: tuple[int, int], geometry: ConvGeometry) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) that keep output size and centre at ``dilation``; negative: pixels to crop."""
    sides = geometry.padding
    new = [0, 0, 0, 0]
    for axis in (0, 1):
        growth = (dilation[axis] - geometry.dilation[axis]) * (geometry.kernel_size[axis] - 1)
        first = (growth + growth % 2 * _odd_pixel(geometry, axis)) // 2
        new[axis], new[axis + 2] = sides[axis] + first, sides[axis + 2] + growth - first
    return new[0], new[1], new[2], new[3]


def _odd_pixel(geometry: ConvGeometry, axis: int) -> int:
    """1 if an odd number of pixels gives its odd one to the first side, which has less; else -1, to the last."""
    return 1 if geometry.padding[axis + 2] > geometry.padding[axis] else -1


def _index(geometry: ConvGeometry, axis: int, like: Tensor) -> Tensor:
    """(K,) int64: the row (column) of each tap, in raster order."""
    height, width = geometry.kernel_size
    taps = torch.arange(height * width, dtype=torch.int64, device=like.device)
    return taps // width if axis == 0 else taps % width


def _axis_offsets(dilations: Tensor, geometry: ConvGeometry, axis: int) -> Tensor:
    """(..., K) int64: the offsets along one axis at ``dilations`` (...)."""
    steps = dilations - geometry.dilation[axis]
    growth = steps * (geometry.kernel_size[axis] - 1)
    first = (growth + growth % 2 * _odd_pixel(geometry, axis)).div(2, rounding_mode="floor")
    return steps[..., None] * _index(geometry, axis, dilations) - first[..., None]
