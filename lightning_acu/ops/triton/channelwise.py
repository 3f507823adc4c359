"""Depthwise layers in the Triton backend: weights spread over integer cells, one load and one multiply-add for each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .blocks import inside, next_pixels, split_pixels, stride_arguments, strided_pixels, unravel_pixels
from .spread import OUTSIDE, Cells, find_cells, gather_gradients, spread_weight
from .tiles import Tile, tile_for

__all__ = ["forward", "input_gradient", "weight_gradient"]


@triton.jit
def _cell_position(
    rows_ptr, columns_ptr, counts_ptr, cell, channel, mask_n, position_span, CELLS: tl.constexpr, UNIFORM: tl.constexpr
):
    """Row and column of a cell for output channels (BLOCK_N,): (1, 1) where UNIFORM, otherwise (1, BLOCK_N).

    Args:
        rows_ptr, columns_ptr, counts_ptr: (P, CELLS), (P, CELLS) and (P,) int32, see :class:`.spread.Cells`.
        cell: its number.
        channel, mask_n: (BLOCK_N,), and whether it exists.
        position_span: output channels that share a position group.
        UNIFORM: whether there is one position group.
    """
    if UNIFORM:
        row, column = tl.load(rows_ptr + cell), tl.load(columns_ptr + cell)
        zero = tl.zeros((1, 1), tl.int32)
        return zero + row, zero + column
    else:
        position_group = channel // position_span
        mask = cell < tl.load(counts_ptr + position_group, mask=mask_n, other=0)
        row = tl.load(rows_ptr + position_group * CELLS + cell, mask=mask, other=OUTSIDE)
        column = tl.load(columns_ptr + position_group * CELLS + cell, mask=mask, other=OUTSIDE)
        return row[None, :], column[None, :]


@triton.jit
def _cell_count(counts_ptr, channel, mask_n, position_span, UNIFORM: tl.constexpr):
    """How many cells the output channel that has most has; arguments as in ``_cell_position``."""
    if UNIFORM:
        return tl.load(counts_ptr)
    else:
        return tl.max(tl.load(counts_ptr + channel // position_span, mask=mask_n, other=0), axis=0)


@triton.jit(do_not_specialize=["num_pixels", "position_span", "height", "width", "out_height", "out_width"])
def _forward_kernel(
    x_ptr, cell_w_ptr, bias_ptr, rows_ptr, columns_ptr, counts_ptr, out_ptr, num_pixels, position_span, height, width,
    out_height, out_width, CELLS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr, UNIFORM: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[m, n] = bias[n] + sum over cells of x[pixel m at the cell, input channel of n] * cell_w[cell, n].

    A program computes BLOCK_M pixels and BLOCK_N channels of ``out``.

    Args:
        x_ptr: (N, height, width, C_IN), the input.
        cell_w_ptr: (CELLS, C_OUT) float32, weights on the cells.
        bias_ptr: (C_OUT,), where HAS_BIAS.
        rows_ptr, columns_ptr, counts_ptr: (P, CELLS), (P, CELLS) and (P,) int32, see :class:`.spread.Cells`.
        out_ptr: (N, out_height, out_width, C_OUT), to write.
        num_pixels: N * out_height * out_width.
        position_span: output channels that share a position group.
        height, width, out_height, out_width: in pixels.
        UNIFORM: whether there is one position group.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_pixels, offs_n < C_OUT
    n, out_y, out_x = unravel_pixels(offs_m, out_height, out_width)
    image = x_ptr + n.to(tl.int64) * (height * width * C_IN)
    channel = offs_n if C_IN == C_OUT else offs_n // (C_OUT // C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for cell in range(_cell_count(counts_ptr, offs_n, mask_n, position_span, UNIFORM)):
        row, column = _cell_position(
            rows_ptr, columns_ptr, counts_ptr, cell, offs_n, mask_n, position_span, CELLS, UNIFORM
        )
        y, x = (out_y * STRIDE_Y)[:, None] + row, (out_x * STRIDE_X)[:, None] + column
        mask_x = mask_m[:, None] & mask_n[None, :] & inside(y, height) & inside(x, width)
        x_ptrs = image[:, None] + (y * width + x) * C_IN + channel[None, :]
        samples = tl.load(x_ptrs, mask=mask_x, other=0.0).to(tl.float32)
        w = tl.load(cell_w_ptr + cell * C_OUT + offs_n, mask=mask_n, other=0.0)
        acc = tl.fma(samples, tl.broadcast_to(w[None, :], (BLOCK_M, BLOCK_N)), acc)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * C_OUT + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["num_pixels", "position_span", "height", "width", "out_height", "out_width"])
def _input_kernel(
    grad_ptr, cell_w_ptr, rows_ptr, columns_ptr, counts_ptr, grad_x_ptr, num_pixels, position_span, height, width,
    out_height, out_width, CELLS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr, UNIFORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_x[m, n] = sum over cells and output channels k of n of grad[pixel that reads m, k] * cell_w[cell, k].

    A program computes BLOCK_M pixels and BLOCK_N channels of ``grad_x``.

    Args:
        grad_ptr: (N, out_height, out_width, C_OUT), the gradient of the output.
        grad_x_ptr: (N, height, width, C_IN), to write.
        num_pixels: N * height * width.
        cell_w_ptr, rows_ptr, columns_ptr, counts_ptr, position_span, height, width, out_height, out_width, UNIFORM: as
            in ``_forward_kernel``.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < num_pixels, offs_n < C_IN
    n, y, x = unravel_pixels(offs_m, height, width)
    image = grad_ptr + n.to(tl.int64) * (out_height * out_width * C_OUT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(C_OUT // C_IN):
        channel = offs_n if C_IN == C_OUT else offs_n * (C_OUT // C_IN) + part
        for cell in range(_cell_count(counts_ptr, channel, mask_n, position_span, UNIFORM)):
            row, column = _cell_position(
                rows_ptr, columns_ptr, counts_ptr, cell, channel, mask_n, position_span, CELLS, UNIFORM
            )
            down, right = y[:, None] - row, x[:, None] - column
            out_y, out_x = down // STRIDE_Y, right // STRIDE_X
            mask_g = mask_m[:, None] & mask_n[None, :]
            mask_g = mask_g & (down >= 0) & (out_y < out_height) & (right >= 0) & (out_x < out_width)
            mask_g &= (down % STRIDE_Y == 0) & (right % STRIDE_X == 0)
            grad_ptrs = image[:, None] + (out_y * out_width + out_x) * C_OUT + channel[None, :]
            grad = tl.load(grad_ptrs, mask=mask_g, other=0.0).to(tl.float32)
            w = tl.load(cell_w_ptr + cell * C_OUT + channel, mask=mask_n, other=0.0)
            acc = tl.fma(grad, tl.broadcast_to(w[None, :], (BLOCK_M, BLOCK_N)), acc)
    grad_x_ptrs = grad_x_ptr + offs_m.to(tl.int64)[:, None] * C_IN + offs_n[None, :]
    tl.store(grad_x_ptrs, acc.to(grad_x_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(
    do_not_specialize=["num_pixels", "part_pixels", "position_span", "height", "width", "out_height", "out_width"]
)
def _weight_kernel(
    grad_ptr, x_ptr, rows_ptr, columns_ptr, counts_ptr, partial_ptr, num_pixels, part_pixels, position_span, height,
    width, out_height, out_width, CELLS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr, UNIFORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[part, cell, n] = sum over the part's output pixels of grad[pixel, n] * x[pixel at the cell].

    A program computes BLOCK_N output channels of one cell and part.

    Args:
        grad_ptr: (N, out_height, out_width, C_OUT), the gradient of the output.
        x_ptr: (N, height, width, C_IN), the input.
        partial_ptr: (parts, CELLS, C_OUT) float32, to write up to the counts.
        num_pixels: N * out_height * out_width.
        part_pixels: output pixels of a part.
        rows_ptr, columns_ptr, counts_ptr, position_span, height, width, out_height, out_width, UNIFORM: as in
            ``_forward_kernel``.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cell, part = tl.program_id(1), tl.program_id(2)
    mask_n = offs_n < C_OUT
    if cell >= _cell_count(counts_ptr, offs_n, mask_n, position_span, UNIFORM):
        return
    row, column = _cell_position(rows_ptr, columns_ptr, counts_ptr, cell, offs_n, mask_n, position_span, CELLS, UNIFORM)
    channel = offs_n if C_IN == C_OUT else offs_n // (C_OUT // C_IN)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start, end = part * part_pixels, tl.minimum((part + 1) * part_pixels, num_pixels)
    offs_m = tl.arange(0, BLOCK_M)
    grad_ptr += start.to(tl.int64) * C_OUT
    grad_tile = offs_m[:, None] * C_OUT + offs_n[None, :]
    y, x, pixel = strided_pixels(start + offs_m, height, width, out_height, out_width, STRIDE_Y, STRIDE_X)
    for start_m in range(start, end, BLOCK_M):
        mask_g = (offs_m < end - start_m)[:, None] & mask_n[None, :]
        mask_x = mask_g & inside(y[:, None] + row, height) & inside(x[:, None] + column, width)
        x_ptrs = x_ptr + (pixel[:, None] + (row * width + column)).to(tl.int64) * C_IN + channel[None, :]
        samples = tl.load(x_ptrs, mask=mask_x, other=0.0).to(tl.float32)
        acc = tl.fma(samples, tl.load(grad_ptr + grad_tile, mask=mask_g, other=0.0).to(tl.float32), acc)
        grad_ptr += BLOCK_M * C_OUT
        y, x, pixel = next_pixels(y, x, pixel, height, width, out_height, out_width, BLOCK_M, STRIDE_Y, STRIDE_X)
    tl.store(partial_ptr + (part * CELLS + cell) * C_OUT + offs_n, tl.sum(acc, axis=0), mask=mask_n)


def forward(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    output: Tensor,
    tile: Tile | None = None,
) -> None:
    """Writes ``output``.

    Args:
        input: (N, C_in, H, W), channels_last.
        weight: (C_out, 1, kh, kw), contiguous.
        offsets: (P, K, 2) in pixels, contiguous, float32.
        bias: (C_out,), contiguous, or None.
        geometry: of the convolution.
        output: (N, C_out, H_out, W_out), channels_last, to write.
        tile: None: as :mod:`.tiles` has it.
    """
    cells = find_cells(offsets, geometry, all_neighbours=False)
    cell_weight = spread_weight(weight, cells, torch.float32)
    tile = tile or _tile(input, weight, cells)
    count, c_out, out_height, out_width = output.shape
    num_pixels = count * out_height * out_width
    _forward_kernel[(triton.cdiv(num_pixels, tile.m), triton.cdiv(c_out, tile.n))](
        input, cell_weight, bias, cells.rows, cells.columns, cells.counts, output, num_pixels,
        c_out // cells.position_groups, *input.shape[2:], out_height, out_width, HAS_BIAS=bias is not None,
        **_arguments(input.shape[1], c_out, cells, geometry, tile),
    )  # fmt: skip


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    grad_input: Tensor,
    tile: Tile | None = None,
) -> None:
    """Writes ``grad_input`` (N, C_in, H, W) from ``grad`` (N, C_out, H_out, W_out); see :func:`forward`."""
    cells = find_cells(offsets, geometry, all_neighbours=False)
    cell_weight = spread_weight(weight, cells, torch.float32)
    tile = tile or _tile(grad, weight, cells)
    count, c_in, height, width = grad_input.shape
    num_pixels, c_out = count * height * width, grad.shape[1]
    _input_kernel[(triton.cdiv(num_pixels, tile.m), triton.cdiv(c_in, tile.n))](
        grad, cell_weight, cells.rows, cells.columns, cells.counts, grad_input, num_pixels,
        c_out // cells.position_groups, height, width, *grad.shape[2:],
        **_arguments(c_in, c_out, cells, geometry, tile),
    )  # fmt: skip


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
    """Gradients of weight and positions; see :func:`.cells.weight_gradient`."""
    cells = find_cells(offsets, geometry, all_neighbours=needs_offsets)
    tile = tile or _tile(grad, weight, cells)
    count, c_out, out_height, out_width = grad.shape
    num_pixels, blocks = count * out_height * out_width, triton.cdiv(c_out, tile.n)
    part_pixels, parts = split_pixels(num_pixels, tile.m, blocks * cells.size, 4096)
    partial = grad.new_empty(parts, cells.size, c_out, 1, dtype=torch.float32)
    _weight_kernel[(blocks, cells.size, parts)](
        grad, input, cells.rows, cells.columns, cells.counts, partial, num_pixels, part_pixels,
        c_out // cells.position_groups, *input.shape[2:], out_height, out_width,
        **_arguments(input.shape[1], c_out, cells, geometry, tile),
    )  # fmt: skip
    return gather_gradients(partial, weight, offsets, cells, needs_offsets=needs_offsets)


def _tile(image: Tensor, weight: Tensor, cells: Cells) -> Tile:
    channels = len(weight)
    return tile_for("channelwise", image.dtype, 1 if cells.position_groups == 1 else channels, channels, image.device)


def _arguments(c_in: int, c_out: int, cells: Cells, geometry: ConvGeometry, tile: Tile) -> dict[str, int]:
    """The compile-time arguments that the three kernels share."""
    constants = {"CELLS": cells.size, "C_IN": c_in, "C_OUT": c_out, "UNIFORM": cells.position_groups == 1}
    return constants | stride_arguments(geometry.stride) | tile.launch()
