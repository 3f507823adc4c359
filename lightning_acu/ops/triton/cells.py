"""Products over integer cells in the Triton backend: the gradients that interpolation does not fit.

An active convolution is a plain one over the distinct cells of its taps. The gradient of the weights on those cells
holds the gradients of weights and positions in closed form; and with a stride, an input pixel meets only the cells
that agree with it modulo the stride, which a product over cells can skip and interpolation cannot.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .product import columns, piece_of, programs
from .sampling import tap
from .spread import Cells, find_cells, spread_weight
from .tiles import precision, tile_for

__all__ = ["input_gradient", "weight_gradient"]


@triton.jit(do_not_specialize=["pixels", "height", "width", "in_height", "in_width", "class_rows", "class_columns"])
def _input_kernel(
    grad, spread, rows, columns_of, counts, target, pixels, height, width, in_height, in_width, class_rows,
    class_columns, CELLS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr,
    PIECE: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The target (N, in_height, in_width, IN) from grad (N, height, width, OUT) and spread (CELLS, OUT, IN/GROUPS).

    A program's pixels agree modulo the stride. SHARED and PIECE: as in ``_product_kernel``.
    """
    INPUTS: tl.constexpr = IN // GROUPS
    OUTPUTS: tl.constexpr = OUT // GROUPS
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    class_y, class_x = tl.program_id(2) // STRIDE_X, tl.program_id(2) % STRIDE_X
    step_x, step_y, n = m % class_columns, m // class_columns % class_rows, m // (class_columns * class_rows)
    y, x = step_y * STRIDE_Y + class_y, step_x * STRIDE_X + class_x
    inside = (m < pixels) & (y < in_height) & (x < in_width)
    group, column, wanted = columns(tl.program_id(1), INPUTS, BLOCK_N)
    image = grad + n.to(tl.int64) * (height * width * OUT)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(OUTPUTS // PIECE):
        first = group * OUTPUTS + part * PIECE
        position = first // SHARED
        for cell in range(tl.load(counts + position)):
            down = class_y - tl.load(rows + position * CELLS + cell)
            right = class_x - tl.load(columns_of + position * CELLS + cell)
            if (down % STRIDE_Y == 0) & (right % STRIDE_X == 0):
                oy, ox = step_y + down // STRIDE_Y, step_x + right // STRIDE_X
                known = inside & (oy >= 0) & (oy < height) & (ox >= 0) & (ox < width)
                place = image + (oy * width + ox) * OUT
                matrix = spread + cell * (OUT * INPUTS)
                for c in range(0, PIECE, BLOCK_K):
                    row = first + c + depth
                    some = tl.full((BLOCK_K,), 1, tl.int1) if PIECE % BLOCK_K == 0 else c + depth < PIECE
                    values = tl.load(place[:, None] + row[None, :], mask=known[:, None] & some[None, :], other=0.0)
                    weights = tl.load(
                        matrix + row[:, None] * INPUTS + column[None, :],
                        mask=some[:, None] & wanted[None, :],
                        other=0.0,
                    )
                    total = tl.dot(values, weights, total, input_precision=PRECISION)
    there = target + ((n.to(tl.int64) * in_height + y) * in_width + x)[:, None] * IN
    there += (group * INPUTS + column)[None, :]
    tl.store(there, total.to(target.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


def input_gradient(grad: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, grad_input: Tensor) -> None:
    """Writes ``grad_input``, for any stride; images channels_last."""
    cells = find_cells(offsets, geometry, all_neighbours=False)
    spread = spread_weight(weight, cells, grad.dtype)
    count, c_in, height, width = grad_input.shape
    c_out, groups, (sy, sx) = grad.shape[1], geometry.groups, geometry.stride
    piece, inputs = piece_of(c_out, groups, cells.positions), c_in // groups
    tile = tile_for("cells", grad.dtype, piece, inputs, grad.device)
    class_rows, class_columns = triton.cdiv(height, sy), triton.cdiv(width, sx)
    pixels = count * class_rows * class_columns
    _input_kernel[(triton.cdiv(pixels, tile.m), programs(c_in, inputs, tile.n), sy * sx)](
        grad, spread, cells.rows, cells.columns, cells.counts, grad_input, pixels, *grad.shape[2:], height, width,
        class_rows, class_columns, CELLS=cells.size, IN=c_in, OUT=c_out, GROUPS=groups,
        SHARED=c_out // cells.positions, PIECE=piece, STRIDE_Y=sy, STRIDE_X=sx,
        PRECISION=precision(grad.dtype, grad.device), **tile.launch(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "share", "height", "width", "out_height", "out_width"])
def _weight_kernel(
    grad, image, rows, columns_of, counts, partial, pixels, share, height, width, out_height, out_width,
    CELLS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr,
    PIECE: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split, cell, co, ci] = sum over ``share`` pixels of grad[pixel, co] * image[pixel at the cell, ci]."""
    INPUTS: tl.constexpr = IN // GROUPS
    piece, place_out, wanted = columns(tl.program_id(1), PIECE, BLOCK_M)
    out, position = piece * PIECE + place_out, piece * PIECE // SHARED
    cell, split = tl.program_id(2) % CELLS, tl.program_id(2) // CELLS
    if cell >= tl.load(counts + position):
        return
    row, column = tl.load(rows + position * CELLS + cell), tl.load(columns_of + position * CELLS + cell)
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = place < INPUTS
    channel = piece * PIECE // (OUT // GROUPS) * INPUTS + place
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = tl.minimum((split + 1) * share, pixels)
    for start in range(split * share, last, BLOCK_K):
        m = start + tl.arange(0, BLOCK_K)
        inside = m < last
        ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
        y, x = oy * STRIDE_Y + row, ox * STRIDE_X + column
        seen = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        gradient = tl.load(
            grad + m.to(tl.int64)[None, :] * OUT + out[:, None], mask=inside[None, :] & wanted[:, None], other=0.0
        )
        at = ((n * height + y) * width + x).to(tl.int64) * IN
        values = tl.load(image + at[:, None] + channel[None, :], mask=seen[:, None] & known[None, :], other=0.0)
        total = tl.dot(gradient, values, total, input_precision=PRECISION)
    row_of = (split * CELLS + cell).to(tl.int64) * OUT + out
    tl.store(partial + row_of[:, None] * INPUTS + place[None, :], total, mask=wanted[:, None] & known[None, :])


@triton.jit(do_not_specialize=["elements", "splits", "stride"])
def _gather_kernel(
    partial, weight, shares, index, grad_weight, sums, elements, splits, stride, TAPS: tl.constexpr, BLOCK: tl.constexpr
):
    """grad_weight[p, e, k] = sum of share * gradient of the cell; sums[block, p, k, 4] = sums of weight * gradient."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k, position, positions = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    here = (position.to(tl.int64) * elements + e) * TAPS + k
    mask = e < elements
    value = tl.load(weight + here, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for neighbour in range(4):
        j = (position * TAPS + k) * 4 + neighbour
        cell, share = tl.load(index + j), tl.load(shares + j)
        at = (cell.to(tl.int64) * positions + position) * elements + e
        found = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            found += tl.load(partial + split * stride + at, mask=mask, other=0.0)
        total += share * found
        place = ((tl.program_id(0) * positions + position) * TAPS + k) * 4 + neighbour
        tl.store(sums + place, tl.sum(value * found, axis=0))
    tl.store(grad_weight + here, total.to(grad_weight.dtype.element_ty), mask=mask)


def weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` (contiguous) and of the positions (P, K, 2), float32. No atomics: the same every time."""
    cells = find_cells(offsets, geometry, all_neighbours=True)
    count, c_out, out_height, out_width = grad.shape
    inputs, groups = weight.shape[1], geometry.groups
    pixels = count * out_height * out_width
    piece = piece_of(c_out, groups, cells.positions)
    tile = tile_for("weight", grad.dtype, inputs, piece, grad.device)
    blocks = triton.cdiv(inputs, tile.n), programs(c_out, piece, tile.m)
    splits = max(1, min(triton.cdiv(pixels, 8 * tile.k), triton.cdiv(1024, math.prod(blocks) * cells.size)))
    share = triton.cdiv(triton.cdiv(pixels, splits), tile.k) * tile.k
    splits = triton.cdiv(pixels, share)
    partial = grad.new_empty(splits, cells.size, c_out, inputs, dtype=torch.float32)
    _weight_kernel[(*blocks, cells.size * splits)](
        grad, input, cells.rows, cells.columns, cells.counts, partial, pixels, share, *input.shape[2:], out_height,
        out_width, CELLS=cells.size, IN=input.shape[1], OUT=c_out, GROUPS=groups, SHARED=c_out // cells.positions,
        PIECE=piece, STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1],
        PRECISION=precision(grad.dtype, grad.device), **tile.launch(),
    )  # fmt: skip
    return gather(partial, weight, offsets, cells)


def gather(partial: Tensor, weight: Tensor, offsets: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """From partial (splits, S, C_out, C_in/groups) on the cells to weights and positions (P, K, 2)."""
    elements, block = weight.shape[0] * weight.shape[1] // cells.positions, 256
    blocks = triton.cdiv(elements, block)
    grad_weight = torch.empty_like(weight)
    sums = partial.new_empty(blocks, cells.positions, cells.taps, 4)
    _gather_kernel[(blocks, cells.taps, cells.positions)](
        partial, weight, cells.shares, cells.index, grad_weight, sums, elements, len(partial), partial[0].numel(),
        TAPS=cells.taps, BLOCK=block,
    )  # fmt: skip
    grad_offsets = torch.empty_like(offsets)
    taps = triton.next_power_of_2(cells.taps)
    many = min(triton.next_power_of_2(blocks), max(1, 2048 // taps))
    _slope_kernel[(cells.positions,)](sums, offsets, grad_offsets, blocks, TAPS=cells.taps, BLOCK=taps, MANY=many)
    return grad_weight, grad_offsets


@triton.jit(do_not_specialize=["blocks"])
def _slope_kernel(sums, offsets, grad_offsets, blocks, TAPS: tl.constexpr, BLOCK: tl.constexpr, MANY: tl.constexpr):
    """grad_offsets[p, k, :] from sums[block, p, k, 4], added up in order; README.md has the formula."""
    position, positions, k = tl.program_id(0), tl.num_programs(0), tl.arange(0, BLOCK)
    known, here = k < TAPS, position * TAPS + k
    g00, g01 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    g10, g11 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, MANY):
        block = start + tl.arange(0, MANY)[:, None]
        at, some = sums + (block * positions * TAPS + here[None, :]) * 4, (block < blocks) & known[None, :]
        g00 += tl.sum(tl.load(at, mask=some, other=0.0), axis=0)
        g01 += tl.sum(tl.load(at + 1, mask=some, other=0.0), axis=0)
        g10 += tl.sum(tl.load(at + 2, mask=some, other=0.0), axis=0)
        g11 += tl.sum(tl.load(at + 3, mask=some, other=0.0), axis=0)
    _, fy = tap(tl.load(offsets + 2 * here, mask=known, other=0.0), 0)
    _, fx = tap(tl.load(offsets + 2 * here + 1, mask=known, other=0.0), 0)
    tl.store(grad_offsets + 2 * here, (1 - fx) * (g10 - g00) + fx * (g11 - g01), mask=known)
    tl.store(grad_offsets + 2 * here + 1, (1 - fy) * (g01 - g00) + fy * (g11 - g10), mask=known)
