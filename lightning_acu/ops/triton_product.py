"""The matrix product of the Triton backend: taps interpolated in registers, one ``tl.dot`` each.

The forward pass and, at stride 1, its adjoint: the gradient of the input is the same product of the output's gradient
with mirrored positions and transposed weight. Images are channels_last.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvGeometry
from . import triton_gemm
from .triton_choices import gemm_from, interpolates_in_half, precision, tile_for
from .triton_sampling import interpolate, neighbours, tap

__all__ = ["adjoint", "forward"]


@triton.jit
def _product_kernel(
    source, weight, bias, offsets, runs, segments, target, pixels, height, width, out_height, out_width, pad_top,
    pad_left, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    SIGN: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The target (N, out_height, out_width, OUT) from source (N, height, width, IN) and weight (TAPS, ROWS, OUT).

    ``runs`` (programs, 4): the channels of a column of programs, and its segments; ``segments`` (n, 4): channels of the
    source that share a position group, the group, and the channel that the weight's row 0 belongs to. SIGN -1: mirrored
    positions. DEPTH and WIDTH divide the channels in ``segments`` and in ``runs``.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < pixels
    run = runs + tl.program_id(1) * 4
    out = tl.multiple_of(tl.load(run), WIDTH) + tl.arange(0, BLOCK_N)
    wanted = out < tl.multiple_of(tl.load(run + 1), WIDTH)
    ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
    if WIDE:
        n = n.to(tl.int64)
    image = n * (height * width * IN)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(tl.load(run + 2), tl.load(run + 3)):
        segment = segments + number * 4
        first, last = tl.multiple_of(tl.load(segment), DEPTH), tl.multiple_of(tl.load(segment + 1), DEPTH)
        position, zero_row = tl.load(segment + 2), tl.load(segment + 3)
        for k in range(TAPS):
            at = offsets + (position * TAPS + k) * 2
            grid_y, grid_x = k // COLUMNS * DILATION_Y - pad_top, k % COLUMNS * DILATION_X - pad_left
            row, fy = tap(tl.load(at) * SIGN, grid_y * SIGN)
            column, fx = tap(tl.load(at + 1) * SIGN, grid_x * SIGN)
            y, x = oy * STRIDE_Y + row, ox * STRIDE_X + column
            read = neighbours(y, x, fy, fx, inside, height, width)
            place = image + (y * width + x) * IN
            for c in range(first, last, BLOCK_K):
                here = source + (place[:, None] + (c + depth)[None, :])
                some = tl.full((1, BLOCK_K), 1, tl.int1) if DEPTH % BLOCK_K == 0 else (c + depth < last)[None, :]
                samples = interpolate(here, read, some, fy, fx, width * IN, IN, HALF)
                rows = k * ROWS + c - zero_row + depth
                known = wanted[None, :] & (c + depth < last)[:, None]
                matrix = tl.load(weight + rows[:, None] * OUT + out[None, :], mask=known, other=0.0)
                total = tl.dot(samples, matrix, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + out, mask=wanted, other=0.0).to(tl.float32)[None, :]
    place = target + m.to(tl.int64)[:, None] * OUT + out[None, :]
    tl.store(place, total.to(target.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


class Tables(NamedTuple):
    """What the programs of a product work on, on the device."""

    runs: Tensor
    segments: Tensor
    width: int  # power of 2 that divides every channel in ``runs``: vectors of so many are aligned
    depth: int  # the same in ``segments``


@functools.lru_cache(maxsize=1024)
def tables_of(
    channels: tuple[int, int], groups: int, positions: int, block: int, device: torch.device, mirrored: bool = False
) -> Tables:
    """For ``channels`` (C_in, C_out), ``block`` channels of the target a program; see ``_product_kernel``."""
    c_in, c_out = channels
    inputs, outputs, shared = c_in // groups, c_out // groups, c_out // positions
    cuts = sorted({*range(0, c_out, outputs), *range(0, c_out, shared), c_out})
    pieces = [(first, last, first // outputs, first // shared) for first, last in itertools.pairwise(cuts)]
    if mirrored:  # from the channels of the output, which a group may have at several positions, to those of the input
        segments = [(first, last, position, group * outputs) for first, last, group, position in pieces]
        starts = [next(i for i, piece in enumerate(pieces) if piece[2] == group) for group in range(groups)]
        between = itertools.pairwise([*starts, len(pieces)])
        spans = [(group * inputs, (group + 1) * inputs, *pair) for group, pair in enumerate(between)]
    else:
        segments = [(g * inputs, (g + 1) * inputs, position, g * inputs) for _, _, g, position in pieces]
        spans = [(first, last, i, i + 1) for i, (first, last, _, _) in enumerate(pieces)]
    runs = [(at, min(at + block, last), *which) for first, last, *which in spans for at in range(first, last, block)]
    width, depth = (_power_of_2(n for first, last, *_ in table for n in (first, last)) for table in (runs, segments))
    runs_there, segments_there = (torch.tensor(t, dtype=torch.int32, device=device) for t in (runs, segments))
    return Tables(runs_there, segments_there, width, depth)


def _power_of_2(numbers: Iterable[int]) -> int:
    common = math.gcd(*numbers)
    return common & -common


def forward(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, output: Tensor
) -> None:
    """Writes ``output``; images channels_last, ``offsets`` (P, K, 2) contiguous float32."""
    packed = weight.permute(2, 3, 1, 0).contiguous()
    _launch(input, packed, offsets, bias, geometry, output, geometry.stride, mirrored=False)


def adjoint(grad: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, grad_input: Tensor) -> None:
    """Writes the gradient of the input from that of the output; stride 1."""
    c_out, inputs, *kernel = weight.shape
    groups = geometry.groups
    packed = weight.view(groups, c_out // groups, inputs, *kernel).permute(3, 4, 1, 0, 2).contiguous()
    _launch(grad, packed, offsets, None, geometry, grad_input, (1, 1), mirrored=True)


def _launch(
    source: Tensor,
    packed: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    target: Tensor,
    stride: tuple[int, int],
    *,
    mirrored: bool,
) -> None:
    count, channels, height, width = target.shape
    groups, positions = geometry.groups, len(offsets)
    depth, columns = source.shape[1] // groups, channels // groups
    if groups == positions == 1 and depth >= gemm_from(source.dtype, source.device):
        triton_gemm.product(source, packed, offsets, bias, geometry, target, stride, mirrored=mirrored)
        return
    shared = (source if mirrored else target).shape[1] // positions
    if mirrored:
        depth = min(depth, shared)
    else:
        columns = min(columns, shared)
    tile = tile_for("product", source.dtype, depth, columns, source.device)
    both = (channels, source.shape[1]) if mirrored else (source.shape[1], channels)
    tables = tables_of(both, groups, positions, tile.n, source.device, mirrored)
    pixels = count * height * width
    _product_kernel[(triton.cdiv(pixels, tile.m), len(tables.runs))](
        source, packed, bias, offsets, tables.runs, tables.segments, target, pixels, *source.shape[2:], height, width,
        geometry.padding[0], geometry.padding[1], IN=source.shape[1], OUT=channels,
        ROWS=source.shape[1] // groups, TAPS=geometry.taps, COLUMNS=geometry.kernel_size[1], STRIDE_Y=stride[0],
        STRIDE_X=stride[1], DILATION_Y=geometry.dilation[0], DILATION_X=geometry.dilation[1],
        SIGN=-1 if mirrored else 1, BIAS=bias is not None, WIDE=source.numel() >= 2**31,
        DEPTH=tables.depth, WIDTH=tables.width, HALF=interpolates_in_half(source.dtype),
        PRECISION=precision(source.dtype), **tile.launch(),
    )  # fmt: skip
