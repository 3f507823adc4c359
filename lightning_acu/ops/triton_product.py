"""The matrix product of the Triton backend: taps interpolated in registers, one ``tl.dot`` each.

The forward pass and, at stride 1, its adjoint: the gradient of the input is the same product of the output's gradient
with mirrored positions and transposed weight. Images are channels_last.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..geometry import ConvGeometry
from .triton_taps import tap

__all__ = ["adjoint", "forward"]


@triton.jit
def _blend(x00, x01, x10, x11, fy, fx):
    """Bilinear interpolation in float32, with one rounding at the end."""
    zero = tl.zeros(x00.shape, tl.float32)
    value = x00.to(tl.float32) * ((1 - fy) * (1 - fx))
    value = tl.fma(x01.to(tl.float32), zero + (1 - fy) * fx, value)
    value = tl.fma(x10.to(tl.float32), zero + fy * (1 - fx), value)
    return tl.fma(x11.to(tl.float32), zero + fy * fx, value).to(x00.dtype)


@triton.jit
def _product_kernel(
    source, weight, bias, offsets, runs, segments, target, pixels, height, width, out_height, out_width, pad_top,
    pad_left, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr,
    STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    SIGN: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The target (N, out_height, out_width, OUT) from source (N, height, width, IN) and weight (TAPS, ROWS, OUT).

    ``runs`` (programs, 4): the channels of a column of programs, and its segments; ``segments`` (n, 4): channels of the
    source that share a position group, the group, and the channel that the weight's row 0 belongs to. SIGN -1: mirrored
    positions. EVEN: no segment ends inside a block of BLOCK_K channels.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < pixels
    run = runs + tl.program_id(1) * 4
    out = tl.load(run) + tl.arange(0, BLOCK_N)
    wanted = out < tl.load(run + 1)
    ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
    if WIDE:
        n = n.to(tl.int64)
    image = n * (height * width * IN)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(tl.load(run + 2), tl.load(run + 3)):
        segment = segments + number * 4
        first, last = tl.load(segment), tl.load(segment + 1)
        position, zero_row = tl.load(segment + 2), tl.load(segment + 3)
        for k in range(TAPS):
            at = offsets + (position * TAPS + k) * 2
            grid_y, grid_x = k // COLUMNS * DILATION_Y - pad_top, k % COLUMNS * DILATION_X - pad_left
            row, fy = tap(tl.load(at) * SIGN, grid_y * SIGN)
            column, fx = tap(tl.load(at + 1) * SIGN, grid_x * SIGN)
            y, x = oy * STRIDE_Y + row, ox * STRIDE_X + column
            # Neighbours of weight 0 are not read. (The interpreter cannot combine a scalar condition with a vector.)
            last_y, last_x = tl.where(fy != 0, height - 1, -1), tl.where(fx != 0, width - 1, -1)
            upper, lower = inside & (y >= 0) & (y < height), inside & (y >= -1) & (y < last_y)
            left, right = (x >= 0) & (x < width), (x >= -1) & (x < last_x)
            place = image + (y * width + x) * IN
            for c in range(first, last, BLOCK_K):
                here = source + (place[:, None] + (c + depth)[None, :])
                some = tl.full((1, BLOCK_K), 1, tl.int1) if EVEN else (c + depth < last)[None, :]
                x00 = tl.load(here, mask=(upper & left)[:, None] & some, other=0.0)
                x01 = tl.load(here + IN, mask=(upper & right)[:, None] & some, other=0.0)
                x10 = tl.load(here + width * IN, mask=(lower & left)[:, None] & some, other=0.0)
                x11 = tl.load(here + (width * IN + IN), mask=(lower & right)[:, None] & some, other=0.0)
                samples = _blend(x00, x01, x10, x11, fy, fx)
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
    common: int  # divides the channels of every segment


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
    common = math.gcd(*(last - first for first, last, *_ in segments))
    runs_there, segments_there = (torch.tensor(t, dtype=torch.int32, device=device) for t in (runs, segments))
    return Tables(runs_there, segments_there, common)


def blocks_for(dtype: torch.dtype, depth: int, columns: int) -> dict[str, int]:
    """The tile for products of ``depth`` channels with runs of ``columns``: the largest that compile without spills."""
    n, k = (64, 16) if dtype == torch.float32 else (128, 32)
    n = min(max(triton.next_power_of_2(columns), 16), n)
    k = min(max(triton.next_power_of_2(depth), 16), k)
    return {"BLOCK_M": 64, "BLOCK_N": n, "BLOCK_K": k, "num_warps": 8, "num_stages": 1}


def precision(dtype: torch.dtype) -> str:
    """TF32 where torch's convolutions use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.allow_tf32 else "ieee"


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
    shared = (source if mirrored else target).shape[1] // positions
    if mirrored:
        depth = min(depth, shared)
    else:
        columns = min(columns, shared)
    blocks = blocks_for(source.dtype, depth, columns)
    both = (channels, source.shape[1]) if mirrored else (source.shape[1], channels)
    tables = tables_of(both, groups, positions, blocks["BLOCK_N"], source.device, mirrored)
    pixels = count * height * width
    _product_kernel[(triton.cdiv(pixels, blocks["BLOCK_M"]), len(tables.runs))](
        source, packed, bias, offsets, tables.runs, tables.segments, target, pixels, *source.shape[2:], height, width,
        geometry.padding[0], geometry.padding[1], IN=source.shape[1], OUT=channels,
        ROWS=source.shape[1] // groups, TAPS=geometry.taps, COLUMNS=geometry.kernel_size[1], STRIDE_Y=stride[0],
        STRIDE_X=stride[1], DILATION_Y=geometry.dilation[0], DILATION_X=geometry.dilation[1],
        SIGN=-1 if mirrored else 1, BIAS=bias is not None, WIDE=source.numel() >= 2**31,
        EVEN=tables.common % blocks["BLOCK_K"] == 0, PRECISION=precision(source.dtype), **blocks,
    )  # fmt: skip
