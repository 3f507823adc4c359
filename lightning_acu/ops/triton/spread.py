"""The distinct integer cells around the taps, found on the device; weights spread over them, and the way back.

Positions never leave the device: no call waits for the host, and a CUDA graph replays with positions that have moved.
Shapes: P position groups, K taps, S = 4 K cells at most; offsets (P, K, 2) in pixels, float32. ops/README.md derives
the formulas.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .blocks import tap_arguments
from .sampling import split_position

__all__ = ["OUTSIDE", "Cells", "find_cells", "gather_gradients", "spread_weight"]

OUTSIDE = tl.constexpr(-(2**24))  # a row that no image has, for cells beyond a position group's last
_CHUNK = tl.constexpr(32)  # neighbours that are compared with all others at a time


class Cells:
    """The distinct cells of each position group, on the device.

    Attributes:
        rows, columns: (P, S) int32, in pixels seen from input pixel ``output * stride``: the first ``counts`` of them.
        counts: (P,) int32.
        index: (P, S) int32, the cell of neighbour (r, s) of tap k at 4 k + 2 r + s, or -1 where it has none.
        bilinear: (P, S) float32, the bilinear weights of these neighbours.
        position_groups, taps, size: P, K and S.
    """

    def __init__(self, offsets: Tensor) -> None:
        self.position_groups, self.taps, _ = offsets.shape
        self.size = 4 * self.taps
        shape = self.position_groups, self.size
        self.rows, self.columns, self.index = offsets.new_empty(3, *shape, dtype=torch.int32).unbind()
        self.bilinear = offsets.new_empty(shape, dtype=torch.float32)
        self.counts = offsets.new_empty(self.position_groups, dtype=torch.int32)


@triton.jit
def _neighbour(
    offsets_ptr, offs_j, pad_top, pad_left, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Neighbours ``offs_j`` = 4 tap + 2 r + s of a position group's taps.

    Returns:
        (row, column, bilinear weight, mask), each of the shape of ``offs_j``; the mask is true for neighbours that
        exist and, without ALL, have a weight other than 0.
    """
    tap, r, s = offs_j // 4, offs_j // 2 % 2, offs_j % 2
    mask = offs_j < 4 * TAPS
    dy = tl.load(offsets_ptr + 2 * tap, mask=mask, other=0.0)
    row, frac_y = split_position(dy, tap // KERNEL_W * DILATION_Y - pad_top)
    dx = tl.load(offsets_ptr + 2 * tap + 1, mask=mask, other=0.0)
    column, frac_x = split_position(dx, tap % KERNEL_W * DILATION_X - pad_left)
    bilinear = tl.where(r == 1, frac_y, 1 - frac_y) * tl.where(s == 1, frac_x, 1 - frac_x)
    if not ALL:
        mask = mask & (bilinear != 0)
    return row + r, column + s, bilinear, mask


@triton.jit(do_not_specialize=["pad_top", "pad_left"])
def _find_cells_kernel(
    offsets_ptr, rows_ptr, columns_ptr, bilinear_ptr, index_ptr, counts_ptr, pad_top, pad_left, TAPS: tl.constexpr,
    KERNEL_W: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers the distinct cells of one position group.

    Every neighbour of every tap is compared with all others; the first on a cell leads, and gives it its number.

    Args:
        offsets_ptr: (P, TAPS, 2) float32.
        rows_ptr, columns_ptr, bilinear_ptr, index_ptr, counts_ptr: to write, see :class:`Cells`.
        pad_top, pad_left: in pixels.
        ALL: whether neighbours of weight 0 have a cell too.
        BLOCK: a power of 2, at least 4 TAPS and 32.
    """
    position_group = tl.program_id(0)
    offsets_ptr += position_group * TAPS * 2
    first = position_group * (4 * TAPS)
    rows_ptr, columns_ptr, bilinear_ptr, index_ptr = (
        rows_ptr + first,
        columns_ptr + first,
        bilinear_ptr + first,
        index_ptr + first,
    )
    offs_j = tl.arange(0, BLOCK)
    mask_j = offs_j < 4 * TAPS
    row, column, bilinear, mask = _neighbour(
        offsets_ptr, offs_j, pad_top, pad_left, TAPS, KERNEL_W, DILATION_Y, DILATION_X, ALL
    )
    leader = tl.full((BLOCK,), BLOCK, tl.int32)  # the first neighbour on the same cell
    for start in range(0, BLOCK, _CHUNK):
        offs_i = start + tl.arange(0, _CHUNK)
        row_i, column_i, _, mask_i = _neighbour(
            offsets_ptr, offs_i, pad_top, pad_left, TAPS, KERNEL_W, DILATION_Y, DILATION_X, ALL
        )
        same = (row_i[:, None] == row[None, :]) & (column_i[:, None] == column[None, :]) & mask_i[:, None]
        leader = tl.minimum(leader, tl.min(tl.where(same, offs_i[:, None], BLOCK), axis=0))
    leads = mask & (leader == offs_j)
    tl.store(index_ptr + offs_j, tl.where(leads, 1, 0), mask=mask_j)
    tl.debug_barrier()
    cell = tl.zeros((BLOCK,), tl.int32)  # how many neighbours before the leader lead
    for start in range(0, BLOCK, _CHUNK):
        offs_i = start + tl.arange(0, _CHUNK)
        leads_i = tl.load(index_ptr + offs_i, mask=offs_i < 4 * TAPS, other=0)
        cell += tl.sum(tl.where(offs_i[:, None] < leader[None, :], leads_i[:, None], 0), axis=0)
    tl.debug_barrier()
    tl.store(index_ptr + offs_j, tl.where(mask, cell, -1), mask=mask_j)
    tl.store(bilinear_ptr + offs_j, bilinear, mask=mask_j)
    tl.store(rows_ptr + cell, row, mask=leads)
    tl.store(columns_ptr + cell, column, mask=leads)
    tl.store(counts_ptr + position_group, tl.sum(tl.where(leads, 1, 0), axis=0))


def find_cells(offsets: Tensor, geometry: ConvGeometry, *, all_neighbours: bool) -> Cells:
    """The cells around taps; with ``all_neighbours`` those of weight 0 too, which the gradient of positions needs."""
    cells = Cells(offsets)
    _find_cells_kernel[(cells.position_groups,)](
        offsets, cells.rows, cells.columns, cells.bilinear, cells.index, cells.counts, *geometry.padding[:2],
        ALL=all_neighbours, BLOCK=max(triton.next_power_of_2(cells.size), _CHUNK.value), **tap_arguments(geometry),
    )  # fmt: skip
    return cells


@triton.jit
def _load_neighbour(index_ptr, bilinear_ptr, offs_j, mask):
    """The cell (-1 where there is none) and bilinear weight of neighbours ``offs_j``."""
    return tl.load(index_ptr + offs_j, mask=mask, other=-1), tl.load(bilinear_ptr + offs_j, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["elements"])
def _spread_kernel(
    w_ptr, bilinear_ptr, index_ptr, cell_w_ptr, elements, TAPS: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """cell_w[cell, p, e] = sum of bilinear * w[p, e, tap] over the neighbours on the cell.

    A program computes BLOCK elements of a position group for all cells.

    Args:
        w_ptr: (P, elements, TAPS), weight (C_out, C_in/groups, kh, kw).
        bilinear_ptr, index_ptr: (P, 4 TAPS), see :class:`Cells`.
        cell_w_ptr: (4 TAPS, P, elements), to write.
        elements: C_out * C_in / groups / P.
        BLOCK_TAPS: TAPS, rounded up to a power of 2.
    """
    offs_e, offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_TAPS)
    position_group, position_groups = tl.program_id(1), tl.num_programs(1)
    mask_e, mask_t = offs_e < elements, offs_t < TAPS
    w_ptrs = w_ptr + ((position_group.to(tl.int64) * elements + offs_e) * TAPS)[:, None] + offs_t[None, :]
    w = tl.load(w_ptrs, mask=mask_e[:, None] & mask_t[None, :], other=0.0).to(tl.float32)
    offs_j = (position_group * TAPS + offs_t) * 4
    index00, bilinear00 = _load_neighbour(index_ptr, bilinear_ptr, offs_j, mask_t)
    index01, bilinear01 = _load_neighbour(index_ptr, bilinear_ptr, offs_j + 1, mask_t)
    index10, bilinear10 = _load_neighbour(index_ptr, bilinear_ptr, offs_j + 2, mask_t)
    index11, bilinear11 = _load_neighbour(index_ptr, bilinear_ptr, offs_j + 3, mask_t)
    for cell in range(4 * TAPS):
        # Of a tap's neighbours at most one is on the cell.
        bilinear = tl.where(index00 == cell, bilinear00, tl.where(index01 == cell, bilinear01, 0.0))
        bilinear = tl.where(index10 == cell, bilinear10, tl.where(index11 == cell, bilinear11, bilinear))
        # A tap that does not reach the cell adds nothing, whatever its weight is.
        products = tl.where(bilinear[None, :] != 0, w * bilinear[None, :], 0.0)
        cell_w_ptrs = cell_w_ptr + (cell * position_groups.to(tl.int64) + position_group) * elements + offs_e
        tl.store(cell_w_ptrs, tl.sum(products, axis=1).to(cell_w_ptr.dtype.element_ty), mask=mask_e)


def spread_weight(weight: Tensor, cells: Cells, dtype: torch.dtype) -> Tensor:
    """Weight (C_out, C_in/groups, kh, kw), contiguous, to (S, C_out, C_in/groups): 0 beyond a group's cells."""
    cell_weight = weight.new_empty(cells.size, *weight.shape[:2], dtype=dtype)
    elements = weight.shape[0] * weight.shape[1] // cells.position_groups
    block_taps = triton.next_power_of_2(cells.taps)
    block = min(triton.next_power_of_2(elements), max(1, 2048 // block_taps))
    _spread_kernel[(triton.cdiv(elements, block), cells.position_groups)](
        weight, cells.bilinear, cells.index, cell_weight, elements, TAPS=cells.taps, BLOCK_TAPS=block_taps, BLOCK=block
    )
    return cell_weight


@triton.jit(do_not_specialize=["elements", "parts", "stride_part"])
def _gather_kernel(
    partial_ptr, w_ptr, bilinear_ptr, index_ptr, grad_w_ptr, sums_ptr, elements, parts, stride_part,
    TAPS: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_w[p, e, tap] = sum of bilinear * g and sums[block, p, tap, neighbour] = sum of w * g over elements.

    g[cell, p, e] is the gradient of the weight on a cell. A program takes BLOCK elements of one tap.

    Args:
        partial_ptr: (parts, 4 TAPS, P, elements) float32, parts of g.
        w_ptr: (P, elements, TAPS).
        bilinear_ptr, index_ptr: (P, 4 TAPS), see :class:`Cells`.
        grad_w_ptr: (P, elements, TAPS), to write.
        sums_ptr: (blocks, P, TAPS, 4) float32, to write where HAS_SUMS.
        elements: C_out * C_in / groups / P.
        parts, stride_part: of ``partial``.
    """
    offs_e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap, position_group, position_groups = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    offs_w = (position_group.to(tl.int64) * elements + offs_e) * TAPS + tap
    mask_e = offs_e < elements
    w = tl.load(w_ptr + offs_w, mask=mask_e, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for neighbour in range(4):
        j = (position_group * TAPS + tap) * 4 + neighbour
        cell, bilinear = tl.load(index_ptr + j), tl.load(bilinear_ptr + j)
        offs_g = (cell.to(tl.int64) * position_groups + position_group) * elements + offs_e
        mask_g = mask_e & (cell >= 0)  # without the positions' gradient, neighbours of weight 0 have no cell
        g = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            g += tl.load(partial_ptr + part * stride_part + offs_g, mask=mask_g, other=0.0)
        acc += bilinear * g
        if HAS_SUMS:
            offs_sum = ((tl.program_id(0) * position_groups + position_group) * TAPS + tap) * 4 + neighbour
            tl.store(sums_ptr + offs_sum, tl.sum(w * g, axis=0))
    tl.store(grad_w_ptr + offs_w, acc.to(grad_w_ptr.dtype.element_ty), mask=mask_e)


@triton.jit(do_not_specialize=["blocks"])
def _offsets_kernel(
    sums_ptr, offsets_ptr, grad_offsets_ptr, blocks, TAPS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SUMS: tl.constexpr
):
    """The gradient of one position group's offsets, from the gradients of its bilinear weights.

    Args:
        sums_ptr: (blocks, P, TAPS, 4) float32, added up in order.
        offsets_ptr: (P, TAPS, 2) float32.
        grad_offsets_ptr: (P, TAPS, 2) float32, to write.
        blocks: of ``sums``.
        BLOCK: TAPS, rounded up to a power of 2.
        BLOCK_SUMS: blocks to add up at a time.
    """
    position_group, position_groups, offs_t = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    mask_t, offs_p = offs_t < TAPS, position_group * TAPS + offs_t
    g00, g01 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    g10, g11 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK_SUMS):
        offs_b = start + tl.arange(0, BLOCK_SUMS)[:, None]
        sums_ptrs = sums_ptr + (offs_b * position_groups * TAPS + offs_p[None, :]) * 4
        mask = (offs_b < blocks) & mask_t[None, :]
        g00 += tl.sum(tl.load(sums_ptrs, mask=mask, other=0.0), axis=0)
        g01 += tl.sum(tl.load(sums_ptrs + 1, mask=mask, other=0.0), axis=0)
        g10 += tl.sum(tl.load(sums_ptrs + 2, mask=mask, other=0.0), axis=0)
        g11 += tl.sum(tl.load(sums_ptrs + 3, mask=mask, other=0.0), axis=0)
    _, frac_y = split_position(tl.load(offsets_ptr + 2 * offs_p, mask=mask_t, other=0.0), 0)
    _, frac_x = split_position(tl.load(offsets_ptr + 2 * offs_p + 1, mask=mask_t, other=0.0), 0)
    grad_y = (1 - frac_x) * (g10 - g00) + frac_x * (g11 - g01)
    grad_x = (1 - frac_y) * (g01 - g00) + frac_y * (g11 - g10)
    tl.store(grad_offsets_ptr + 2 * offs_p, grad_y, mask=mask_t)
    tl.store(grad_offsets_ptr + 2 * offs_p + 1, grad_x, mask=mask_t)


def gather_gradients(
    partial: Tensor, weight: Tensor, offsets: Tensor, cells: Cells, *, needs_offsets: bool
) -> tuple[Tensor, ...]:
    """Gradients of weight and positions from that of the weight on the cells; the same bits every time.

    Args:
        partial: (parts, S, C_out, C_in/groups), contiguous, float32; their sum is the gradient.
        weight: (C_out, C_in/groups, kh, kw), contiguous.
        offsets: (P, K, 2), contiguous, float32.
        cells: with all neighbours, if ``needs_offsets``.
        needs_offsets: whether the gradient of positions is asked for.

    Returns:
        The gradient as ``weight`` is and, if it is asked for, that as ``offsets`` are.
    """
    elements, block = weight.shape[0] * weight.shape[1] // cells.position_groups, 256
    blocks = triton.cdiv(elements, block)
    grad_weight = torch.empty_like(weight)
    sums = partial.new_empty(blocks, cells.position_groups, cells.taps, 4) if needs_offsets else None
    _gather_kernel[(blocks, cells.taps, cells.position_groups)](
        partial, weight, cells.bilinear, cells.index, grad_weight, sums, elements, len(partial), partial[0].numel(),
        TAPS=cells.taps, HAS_SUMS=needs_offsets, BLOCK=block,
    )  # fmt: skip
    if not needs_offsets:
        return (grad_weight,)
    grad_offsets = torch.empty_like(offsets)
    block_taps = triton.next_power_of_2(cells.taps)
    block_sums = min(triton.next_power_of_2(blocks), max(1, 1024 // block_taps))
    _offsets_kernel[(cells.position_groups,)](
        sums, offsets, grad_offsets, blocks, TAPS=cells.taps, BLOCK=block_taps, BLOCK_SUMS=block_sums
    )
    return grad_weight, grad_offsets
