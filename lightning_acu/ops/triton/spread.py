"""The distinct integer cells around the taps, found on the device.

Positions never leave the device: no call waits for the host, and a CUDA graph replays with positions that have moved.
Shapes: P position groups, K taps, S = 4 K cells at most; offsets (P, K, 2) in pixels, float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .sampling import tap

__all__ = ["Cells", "find_cells", "spread_weight"]

_CHUNK = tl.constexpr(32)  # neighbours that are compared with all others at a time


@triton.jit
def _neighbour(
    offsets, number, pad_top, pad_left, TAPS: tl.constexpr, COLUMNS: tl.constexpr, DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Row, column, bilinear share of neighbours 4 k + 2 r + s, and whether they count."""
    k, r, s = number // 4, number // 2 % 2, number % 2
    valid = number < 4 * TAPS
    row, fy = tap(tl.load(offsets + 2 * k, mask=valid, other=0.0), k // COLUMNS * DILATION_Y - pad_top)
    column, fx = tap(tl.load(offsets + 2 * k + 1, mask=valid, other=0.0), k % COLUMNS * DILATION_X - pad_left)
    share = tl.where(r == 1, fy, 1 - fy) * tl.where(s == 1, fx, 1 - fx)
    if not ALL:
        valid = valid & (share != 0)
    return row + r, column + s, share, valid


@triton.jit(do_not_specialize=["pad_top", "pad_left"])
def _find_cells_kernel(
    offsets, rows, columns, shares, index, counts, pad_top, pad_left, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    position, size = tl.program_id(0), 4 * TAPS
    offsets += position * TAPS * 2
    rows, columns, shares, index = (
        rows + position * size,
        columns + position * size,
        shares + position * size,
        index + position * size,
    )
    j = tl.arange(0, BLOCK)
    row, column, share, keep = _neighbour(offsets, j, pad_top, pad_left, TAPS, COLUMNS, DILATION_Y, DILATION_X, ALL)
    first = tl.full((BLOCK,), BLOCK, tl.int32)  # the first neighbour on the same cell
    for start in range(0, BLOCK, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        other_row, other_column, _, other_keep = _neighbour(
            offsets, i, pad_top, pad_left, TAPS, COLUMNS, DILATION_Y, DILATION_X, ALL
        )
        same = (other_row[:, None] == row[None, :]) & (other_column[:, None] == column[None, :]) & other_keep[:, None]
        first = tl.minimum(first, tl.min(tl.where(same, i[:, None], BLOCK), axis=0))
    leads = keep & (first == j)
    tl.store(index + j, tl.where(leads, 1, 0), mask=j < size)
    tl.debug_barrier()
    number = tl.zeros((BLOCK,), tl.int32)  # how many cells begin before that neighbour
    for start in range(0, BLOCK, _CHUNK):
        i = start + tl.arange(0, _CHUNK)
        begins = tl.load(index + i, mask=i < size, other=0)
        number += tl.sum(tl.where(i[:, None] < first[None, :], begins[:, None], 0), axis=0)
    tl.debug_barrier()
    tl.store(index + j, tl.where(keep, number, -1), mask=j < size)
    tl.store(shares + j, share, mask=j < size)
    tl.store(rows + number, row, mask=leads)
    tl.store(columns + number, column, mask=leads)
    tl.store(counts + position, tl.sum(tl.where(leads, 1, 0), axis=0))


class Cells:
    """The distinct cells of each position group, on the device.

    ``rows`` and ``columns`` (P, S): the first ``counts`` (P,) of them, seen from input pixel ``output * stride``;
    ``index`` (P, S): the cell of neighbour 2 r + s of tap k at 4 k + 2 r + s, or -1; ``shares`` (P, S): its bilinear
    weight.
    """

    def __init__(self, offsets: Tensor) -> None:
        groups, taps, _ = offsets.shape
        self.positions, self.taps, self.size = groups, taps, 4 * taps
        self.rows, self.columns, self.index = offsets.new_empty(3, groups, self.size, dtype=torch.int32).unbind()
        self.shares = offsets.new_empty(groups, self.size, dtype=torch.float32)
        self.counts = offsets.new_empty(groups, dtype=torch.int32)


def find_cells(offsets: Tensor, geometry: ConvGeometry, *, all_neighbours: bool) -> Cells:
    """The cells around taps; with ``all_neighbours`` those of weight 0 too, which the gradient of positions needs."""
    cells = Cells(offsets)
    top, left, _, _ = geometry.padding
    _find_cells_kernel[(cells.positions,)](
        offsets, cells.rows, cells.columns, cells.shares, cells.index, cells.counts, top, left, TAPS=cells.taps,
        COLUMNS=geometry.kernel_size[1], DILATION_Y=geometry.dilation[0], DILATION_X=geometry.dilation[1],
        ALL=all_neighbours, BLOCK=max(triton.next_power_of_2(cells.size), _CHUNK.value),
    )  # fmt: skip
    return cells


@triton.jit(do_not_specialize=["elements"])
def _spread_kernel(
    weight, shares, index, spread, elements, TAPS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr
):
    """spread[cell, p, e] = sum of share * weight[p, e, k] over the neighbours on the cell."""
    e, k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROUND)
    position, positions, known = tl.program_id(1), tl.num_programs(1), k < TAPS
    here = (position.to(tl.int64) * elements + e) * TAPS
    mask = (e < elements)[:, None] & known[None, :]
    values = tl.load(weight + here[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    for cell in range(4 * TAPS):
        share = tl.zeros((ROUND,), tl.float32)
        for neighbour in range(4):
            at = (position * TAPS + k) * 4 + neighbour
            ours = tl.load(index + at, mask=known, other=-1) == cell
            share += tl.where(ours, tl.load(shares + at, mask=known, other=0.0), 0.0)
        # A tap that does not reach the cell adds nothing, whatever its weight is.
        products = tl.where(share[None, :] != 0, values * share[None, :], 0.0)
        place = (cell * positions.to(tl.int64) + position) * elements + e
        tl.store(spread + place, tl.sum(products, axis=1).to(spread.dtype.element_ty), mask=e < elements)


def spread_weight(weight: Tensor, cells: Cells, dtype: torch.dtype) -> Tensor:
    """Weight (C_out, C_in/groups, kh, kw), contiguous, to (S, C_out, C_in/groups): 0 beyond a group's cells."""
    spread = weight.new_empty(cells.size, *weight.shape[:2], dtype=dtype)
    elements, taps = weight.shape[0] * weight.shape[1] // cells.positions, triton.next_power_of_2(cells.taps)
    block = min(triton.next_power_of_2(elements), max(1, 2048 // taps))
    _spread_kernel[(triton.cdiv(elements, block), cells.positions)](
        weight, cells.shares, cells.index, spread, elements, TAPS=cells.taps, ROUND=taps, BLOCK=block
    )
    return spread
