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
from .blocks import (
    channel_block,
    channel_blocks,
    inside,
    next_pixels,
    shared_span,
    split_pixels,
    stride_arguments,
    strided_pixels,
    unravel_pixels,
)
from .spread import OUTSIDE, find_cells, gather_gradients, spread_weight
from .tiles import Tile, precision, tile_for

__all__ = ["input_gradient", "weight_gradient"]

#: Cells that a program of the weight's gradient takes at once, as long as its block has no more numbers than that.
_CELLS_AT_ONCE, _LARGEST_BLOCK = 4, 128 * 128


@triton.jit(
    do_not_specialize=["num_pixels", "out_height", "out_width", "height", "width", "class_height", "class_width"]
)
def _input_kernel(
    grad_ptr, cell_w_ptr, rows_ptr, columns_ptr, counts_ptr, grad_x_ptr, num_pixels, out_height, out_width, height,
    width, class_height, class_width, CELLS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr,
    GROUPS: tl.constexpr, POSITION_SPAN: tl.constexpr, SPAN: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_x[m, n] = sum over cells and k of grad[output pixel that reads m at the cell, k] * cell_w[cell, k, n].

    A program computes BLOCK_M pixels that agree modulo the stride, a class, and BLOCK_N channels of ``grad_x``.

    Args:
        grad_ptr: (N, out_height, out_width, C_OUT), the gradient of the output.
        cell_w_ptr: (CELLS, C_OUT, C_IN / GROUPS), weights on the cells.
        rows_ptr, columns_ptr, counts_ptr: (P, CELLS), (P, CELLS) and (P,) int32, see :class:`.spread.Cells`.
        grad_x_ptr: (N, height, width, C_IN), to write.
        num_pixels: N * class_height * class_width.
        out_height, out_width, height, width: in pixels.
        class_height, class_width: pixels of a class along each axis, rounded up.
        POSITION_SPAN: output channels that share a position group.
        SPAN: those in a row that share a convolution group too.
        PRECISION: of ``tl.dot``.
    """
    GROUP_IN: tl.constexpr = C_IN // GROUPS
    GROUP_OUT: tl.constexpr = C_OUT // GROUPS
    pid_m, pid_n, pid_class = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    class_y, class_x = pid_class // STRIDE_X, pid_class % STRIDE_X
    n, step_y, step_x = unravel_pixels(offs_m, class_height, class_width)
    y, x = step_y * STRIDE_Y + class_y, step_x * STRIDE_X + class_x
    mask_m = (offs_m < num_pixels) & (y < height) & (x < width)
    group, offs_n, mask_n = channel_block(pid_n, GROUP_IN, BLOCK_N)
    image = grad_ptr + n.to(tl.int64) * (out_height * out_width * C_OUT)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(GROUP_OUT // SPAN):
        first = group * GROUP_OUT + part * SPAN
        position_group = first // POSITION_SPAN
        for cell in range(tl.load(counts_ptr + position_group)):
            down = class_y - tl.load(rows_ptr + position_group * CELLS + cell)
            right = class_x - tl.load(columns_ptr + position_group * CELLS + cell)
            if (down % STRIDE_Y == 0) & (right % STRIDE_X == 0):
                out_y, out_x = step_y + down // STRIDE_Y, step_x + right // STRIDE_X
                mask_g = mask_m & (out_y >= 0) & (out_y < out_height) & (out_x >= 0) & (out_x < out_width)
                pixel_ptrs = image + (out_y * out_width + out_x) * C_OUT
                matrix_ptr = cell_w_ptr + cell * (C_OUT * GROUP_IN)
                for start_k in range(0, SPAN, BLOCK_K):
                    channel = first + start_k + offs_k
                    mask_k = tl.full((BLOCK_K,), 1, tl.int1) if SPAN % BLOCK_K == 0 else start_k + offs_k < SPAN
                    grad_ptrs = pixel_ptrs[:, None] + channel[None, :]
                    grad = tl.load(grad_ptrs, mask=mask_g[:, None] & mask_k[None, :], other=0.0)
                    w_ptrs = matrix_ptr + channel[:, None] * GROUP_IN + offs_n[None, :]
                    w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
                    acc = tl.dot(grad, w, acc, input_precision=PRECISION)
    grad_x_ptrs = grad_x_ptr + ((n.to(tl.int64) * height + y) * width + x)[:, None] * C_IN
    grad_x_ptrs += (group * GROUP_IN + offs_n)[None, :]
    tl.store(grad_x_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    grad_input: Tensor,
    tile: Tile | None = None,
) -> None:
    """Writes the gradient of the input, for any stride.

    Args:
        grad: (N, C_out, H_out, W_out), channels_last.
        weight: (C_out, C_in/groups, kh, kw), contiguous.
        offsets: (P, K, 2) in pixels, contiguous, float32.
        geometry: of the convolution.
        grad_input: (N, C_in, H, W), channels_last, to write.
        tile: None: as :mod:`.tiles` has it.
    """
    cells = find_cells(offsets, geometry, all_neighbours=False)
    cell_weight = spread_weight(weight, cells, grad.dtype)
    count, c_in, height, width = grad_input.shape
    c_out, groups, (stride_y, stride_x) = grad.shape[1], geometry.groups, geometry.stride
    span, group_in = shared_span(c_out, groups, cells.position_groups), c_in // groups
    tile = tile or tile_for("cells", grad.dtype, span, group_in, grad.device)
    class_height, class_width = triton.cdiv(height, stride_y), triton.cdiv(width, stride_x)
    num_pixels = count * class_height * class_width
    blocks = triton.cdiv(num_pixels, tile.m), channel_blocks(c_in, group_in, tile.n)
    _input_kernel[(*blocks, stride_y * stride_x)](
        grad, cell_weight, cells.rows, cells.columns, cells.counts, grad_input, num_pixels, *grad.shape[2:], height,
        width, class_height, class_width, CELLS=cells.size, C_IN=c_in, C_OUT=c_out, GROUPS=groups,
        POSITION_SPAN=c_out // cells.position_groups, SPAN=span, PRECISION=precision(grad.dtype, grad.device),
        **stride_arguments(geometry.stride), **tile.launch(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pixels", "part_pixels", "height", "width", "out_height", "out_width"])
def _weight_kernel(
    grad_ptr, x_ptr, rows_ptr, columns_ptr, counts_ptr, partial_ptr, num_pixels, part_pixels, height, width,
    out_height, out_width, CELLS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr,
    POSITION_SPAN: tl.constexpr, SPAN: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    PRECISION: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[part, cell, m, n] = sum over the part's output pixels of grad[pixel, m] * x[pixel at the cell, n].

    A program computes BLOCK_M output and BLOCK_N input channels of AT_ONCE cells and one part.

    Args:
        grad_ptr: (N, out_height, out_width, C_OUT), the gradient of the output.
        x_ptr: (N, height, width, C_IN), the input.
        rows_ptr, columns_ptr, counts_ptr: (P, CELLS), (P, CELLS) and (P,) int32, see :class:`.spread.Cells`.
        partial_ptr: (parts, CELLS, C_OUT, C_IN / GROUPS) float32, to write up to the counts.
        num_pixels: N * out_height * out_width.
        part_pixels: output pixels of a part.
        height, width, out_height, out_width: in pixels.
        POSITION_SPAN: output channels that share a position group.
        SPAN: those in a row that share a convolution group too.
        PRECISION: of ``tl.dot``.
        AT_ONCE: cells side by side in one product, which share what is read of ``grad``.
    """
    GROUP_IN: tl.constexpr = C_IN // GROUPS
    PROGRAMS: tl.constexpr = (CELLS + AT_ONCE - 1) // AT_ONCE
    span, offs_m, mask_m = channel_block(tl.program_id(1), SPAN, BLOCK_M)
    offs_m, position_group = span * SPAN + offs_m, span * SPAN // POSITION_SPAN
    first, part = tl.program_id(2) % PROGRAMS * AT_ONCE, tl.program_id(2) // PROGRAMS
    count = tl.load(counts_ptr + position_group)
    if first >= count:
        return
    lanes = tl.arange(0, AT_ONCE * BLOCK_N)  # of cells, each with its channels
    row, column = tl.zeros((AT_ONCE * BLOCK_N,), tl.int32), tl.zeros((AT_ONCE * BLOCK_N,), tl.int32)
    for i in tl.static_range(AT_ONCE):  # numbers selected, where loading them for each lane would hide that lanes agree
        j, mask, of_cell = position_group * CELLS + first + i, first + i < count, lanes // BLOCK_N == i
        row = tl.where(of_cell, tl.load(rows_ptr + j, mask=mask, other=OUTSIDE), row)
        column = tl.where(of_cell, tl.load(columns_ptr + j, mask=mask, other=OUTSIDE), column)
    shift = row * width + column
    offs_n = tl.program_id(0) * BLOCK_N + lanes % BLOCK_N
    mask_n = offs_n < GROUP_IN
    channel = span * SPAN // (C_OUT // GROUPS) * GROUP_IN + offs_n
    acc = tl.zeros((BLOCK_M, AT_ONCE * BLOCK_N), tl.float32)
    start, end = part * part_pixels, tl.minimum((part + 1) * part_pixels, num_pixels)
    offs_k = tl.arange(0, BLOCK_K)
    grad_ptr += start.to(tl.int64) * C_OUT
    grad_tile = offs_k[None, :] * C_OUT + offs_m[:, None]
    y, x, pixel = strided_pixels(start + offs_k, height, width, out_height, out_width, STRIDE_Y, STRIDE_X)
    for start_k in range(start, end, BLOCK_K):
        mask_k = offs_k < end - start_k
        grad = tl.load(grad_ptr + grad_tile, mask=mask_k[None, :] & mask_m[:, None], other=0.0)
        mask_x = inside(y[:, None] + row[None, :], height) & inside(x[:, None] + column[None, :], width)
        x_ptrs = x_ptr + (pixel[:, None] + shift[None, :]).to(tl.int64) * C_IN + channel[None, :]
        samples = tl.load(x_ptrs, mask=mask_k[:, None] & mask_n[None, :] & mask_x, other=0.0)
        acc = tl.dot(grad, samples, acc, input_precision=PRECISION)
        grad_ptr += BLOCK_K * C_OUT
        y, x, pixel = next_pixels(y, x, pixel, height, width, out_height, out_width, BLOCK_K, STRIDE_Y, STRIDE_X)
    cell = first + lanes // BLOCK_N
    offs_cell = (part * CELLS + cell).to(tl.int64) * (C_OUT * GROUP_IN) + offs_n
    partial_ptrs = partial_ptr + offs_cell[None, :] + (offs_m * GROUP_IN)[:, None]
    tl.store(partial_ptrs, acc, mask=mask_m[:, None] & (mask_n & (cell < count))[None, :])


def weight_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    tile: Tile | None = None,
    *,
    needs_offsets: bool = True,
) -> tuple[Tensor, ...]:
    """Gradients of weight and positions. No atomics: the same bits every time.

    Args:
        grad: (N, C_out, H_out, W_out), channels_last.
        input: (N, C_in, H, W), channels_last.
        weight: (C_out, C_in/groups, kh, kw), contiguous.
        offsets: (P, K, 2) in pixels, contiguous, float32.
        geometry: of the convolution.
        tile: None: as :mod:`.tiles` has it.
        needs_offsets: whether the gradient of positions is asked for; without it, neighbours of weight 0 cost nothing.

    Returns:
        The gradient as ``weight`` is and, if it is asked for, that as ``offsets`` are.
    """
    cells = find_cells(offsets, geometry, all_neighbours=needs_offsets)
    count, c_out, out_height, out_width = grad.shape
    group_in, groups = weight.shape[1], geometry.groups
    span = shared_span(c_out, groups, cells.position_groups)
    tile = tile or tile_for("weight", grad.dtype, group_in, span, grad.device)
    num_pixels = count * out_height * out_width
    blocks = triton.cdiv(group_in, tile.n), channel_blocks(c_out, span, tile.m)
    at_once = max(1, min(_CELLS_AT_ONCE, _LARGEST_BLOCK // (tile.m * tile.n)))
    programs = triton.cdiv(cells.size, at_once)
    part_pixels, parts = split_pixels(num_pixels, tile.k, math.prod(blocks) * programs, 1024)
    partial = grad.new_empty(parts, cells.size, c_out, group_in, dtype=torch.float32)
    _weight_kernel[(*blocks, programs * parts)](
        grad, input, cells.rows, cells.columns, cells.counts, partial, num_pixels, part_pixels, *input.shape[2:],
        out_height, out_width, CELLS=cells.size, C_IN=input.shape[1], C_OUT=c_out, GROUPS=groups,
        POSITION_SPAN=c_out // cells.position_groups, SPAN=span, PRECISION=precision(grad.dtype, grad.device),
        AT_ONCE=at_once, **stride_arguments(geometry.stride), **tile.launch(),
    )  # fmt: skip
    return gather_gradients(partial, weight, offsets, cells, needs_offsets=needs_offsets)
