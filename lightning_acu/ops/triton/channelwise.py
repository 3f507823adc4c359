"""Depthwise layers in the Triton backend: weights spread over integer cells, one load and one multiply-add for each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .cells import gather
from .spread import find_cells, spread_weight
from .tiles import tile_for

__all__ = ["forward", "input_gradient", "weight_gradient"]

_OUTSIDE = tl.constexpr(-(2**24))  # a row that no image has, for cells beyond a position group's last


@triton.jit
def _cell(rows, columns, counts, channel, wanted, number, shared, CELLS: tl.constexpr, UNIFORM: tl.constexpr):
    """Row and column of a cell, (1, 1), or (1, channels) where channels differ in their positions."""
    if UNIFORM:
        row, column = tl.load(rows + number), tl.load(columns + number)
        one = tl.zeros((1, 1), tl.int32)
        return one + row, one + column
    else:
        position = channel // shared
        known = number < tl.load(counts + position, mask=wanted, other=0)
        row = tl.load(rows + position * CELLS + number, mask=known, other=_OUTSIDE)
        column = tl.load(columns + position * CELLS + number, mask=known, other=_OUTSIDE)
        return row[None, :], column[None, :]


@triton.jit
def _count(counts, channel, wanted, shared, UNIFORM: tl.constexpr):
    """How many cells there are, of the channel that has most."""
    if UNIFORM:
        return tl.load(counts)
    else:
        return tl.max(tl.load(counts + channel // shared, mask=wanted, other=0), axis=0)


@triton.jit(do_not_specialize=["pixels", "shared", "height", "width", "out_height", "out_width"])
def _forward_kernel(
    source, spread, bias, rows, columns, counts, target, pixels, shared, height, width, out_height, out_width,
    CELLS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    UNIFORM: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, wanted = m < pixels, out < OUT
    ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
    image = source + n.to(tl.int64) * (height * width * IN)
    channel = out if IN == OUT else out // (OUT // IN)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(_count(counts, out, wanted, shared, UNIFORM)):
        row, column = _cell(rows, columns, counts, out, wanted, number, shared, CELLS, UNIFORM)
        y, x = (oy * STRIDE_Y)[:, None] + row, (ox * STRIDE_X)[:, None] + column
        known = inside[:, None] & wanted[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        place = image[:, None] + (y * width + x) * IN + channel[None, :]
        value = tl.load(place, mask=known, other=0.0).to(tl.float32)
        weight = tl.load(spread + number * OUT + out, mask=wanted, other=0.0)
        total = tl.fma(value, tl.broadcast_to(weight[None, :], (BLOCK_M, BLOCK_N)), total)
    if BIAS:
        total += tl.load(bias + out, mask=wanted, other=0.0).to(tl.float32)[None, :]
    place = target + m.to(tl.int64)[:, None] * OUT + out[None, :]
    tl.store(place, total.to(target.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["pixels", "shared", "height", "width", "out_height", "out_width"])
def _input_kernel(
    grad, spread, rows, columns, counts, target, pixels, shared, height, width, out_height, out_width,
    CELLS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    UNIFORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The target (N, height, width, IN) from grad (N, out_height, out_width, OUT)."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, wanted = m < pixels, channel < IN
    x, y, n = m % width, m // width % height, m // (width * height)
    image = grad + n.to(tl.int64) * (out_height * out_width * OUT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(OUT // IN):
        out = channel if IN == OUT else channel * (OUT // IN) + part
        for number in range(_count(counts, out, wanted, shared, UNIFORM)):
            row, column = _cell(rows, columns, counts, out, wanted, number, shared, CELLS, UNIFORM)
            down, right = y[:, None] - row, x[:, None] - column
            oy, ox = down // STRIDE_Y, right // STRIDE_X
            known = (
                inside[:, None] & wanted[None, :] & (down >= 0) & (oy < out_height) & (right >= 0) & (ox < out_width)
            )
            known &= (down % STRIDE_Y == 0) & (right % STRIDE_X == 0)
            place = image[:, None] + (oy * out_width + ox) * OUT + out[None, :]
            value = tl.load(place, mask=known, other=0.0).to(tl.float32)
            weight = tl.load(spread + number * OUT + out, mask=wanted, other=0.0)
            total = tl.fma(value, tl.broadcast_to(weight[None, :], (BLOCK_M, BLOCK_N)), total)
    place = target + m.to(tl.int64)[:, None] * IN + channel[None, :]
    tl.store(place, total.to(target.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["pixels", "share", "shared", "height", "width", "out_height", "out_width"])
def _weight_kernel(
    grad, source, rows, columns, counts, partial, pixels, share, shared, height, width, out_height, out_width,
    CELLS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    UNIFORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[split, cell, co] = sum over ``share`` pixels of grad * image at the cell."""
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    number, split = tl.program_id(1), tl.program_id(2)
    wanted = out < OUT
    if number >= _count(counts, out, wanted, shared, UNIFORM):
        return
    row, column = _cell(rows, columns, counts, out, wanted, number, shared, CELLS, UNIFORM)
    channel = out if IN == OUT else out // (OUT // IN)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = tl.minimum((split + 1) * share, pixels)
    for start in range(split * share, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < last)[:, None] & wanted[None, :]
        ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
        y, x = (oy * STRIDE_Y)[:, None] + row, (ox * STRIDE_X)[:, None] + column
        known = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        image = source + n.to(tl.int64) * (height * width * IN)
        place = image[:, None] + (y * width + x) * IN + channel[None, :]
        value = tl.load(place, mask=known, other=0.0).to(tl.float32)
        place = grad + m.to(tl.int64)[:, None] * OUT + out[None, :]
        total = tl.fma(value, tl.load(place, mask=inside, other=0.0).to(tl.float32), total)
    tl.store(partial + (split * CELLS + number) * OUT + out, tl.sum(total, axis=0), mask=wanted)


def forward(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, output: Tensor
) -> None:
    """Writes ``output``; images channels_last, ``weight`` (C_out, 1, kh, kw) contiguous, ``offsets`` float32."""
    cells = find_cells(offsets, geometry, all_neighbours=False)
    spread = spread_weight(weight, cells, torch.float32)
    tile = tile_for("channelwise", input.dtype, 1, len(weight), input.device)
    count, c_out, height, width = output.shape
    pixels = count * height * width
    _forward_kernel[(triton.cdiv(pixels, tile.m), triton.cdiv(c_out, tile.n))](
        input, spread, bias, cells.rows, cells.columns, cells.counts, output, pixels, c_out // cells.positions,
        *input.shape[2:], height, width, CELLS=cells.size, IN=input.shape[1], OUT=c_out, STRIDE_Y=geometry.stride[0],
        STRIDE_X=geometry.stride[1], UNIFORM=cells.positions == 1, BIAS=bias is not None, **tile.launch(),
    )  # fmt: skip


def input_gradient(grad: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, grad_input: Tensor) -> None:
    """Writes ``grad_input``."""
    cells = find_cells(offsets, geometry, all_neighbours=False)
    spread = spread_weight(weight, cells, torch.float32)
    tile = tile_for("channelwise", grad.dtype, 1, len(weight), grad.device)
    count, c_in, height, width = grad_input.shape
    pixels, c_out = count * height * width, grad.shape[1]
    _input_kernel[(triton.cdiv(pixels, tile.m), triton.cdiv(c_in, tile.n))](
        grad, spread, cells.rows, cells.columns, cells.counts, grad_input, pixels, c_out // cells.positions,
        height, width, *grad.shape[2:], CELLS=cells.size, IN=c_in, OUT=c_out, STRIDE_Y=geometry.stride[0],
        STRIDE_X=geometry.stride[1], UNIFORM=cells.positions == 1, **tile.launch(),
    )  # fmt: skip


def weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """Gradients of ``weight`` and of the positions (P, K, 2), float32. No atomics: the same every time."""
    cells = find_cells(offsets, geometry, all_neighbours=True)
    tile = tile_for("channelwise", grad.dtype, 1, len(weight), grad.device)
    count, c_out, out_height, out_width = grad.shape
    pixels, columns = count * out_height * out_width, triton.cdiv(c_out, tile.n)
    splits = max(1, min(triton.cdiv(pixels, 8 * tile.m), triton.cdiv(2048, columns * cells.size // 2)))
    share = triton.cdiv(pixels, splits)
    splits = triton.cdiv(pixels, share)
    partial = grad.new_empty(splits, cells.size, c_out, 1, dtype=torch.float32)
    _weight_kernel[(columns, cells.size, splits)](
        grad, input, cells.rows, cells.columns, cells.counts, partial, pixels, share, c_out // cells.positions,
        *input.shape[2:], out_height, out_width, CELLS=cells.size, IN=input.shape[1], OUT=c_out,
        STRIDE_Y=geometry.stride[0], STRIDE_X=geometry.stride[1], UNIFORM=cells.positions == 1, **tile.launch(),
    )  # fmt: skip
    return gather(partial, weight, offsets, cells)
