"""The matrix product of the Triton backend: taps interpolated in registers, one ``tl.dot`` each.

The forward pass and, at stride 1, its adjoint: the gradient of the input is the same product of the output's gradient
with mirrored positions and transposed weight. Images are channels_last.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from . import gemm
from .sampling import interpolate, neighbours, tap
from .tiles import gemm_from, interpolates_in_half, precision, tile_for

__all__ = ["adjoint", "columns", "forward", "piece_of", "programs"]


@triton.jit
def columns(program, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Of runs of SPAN channels that are cut into blocks: the program's run, its places in it, and which there are."""
    blocks: tl.constexpr = (SPAN + BLOCK - 1) // BLOCK
    place = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, place, place < SPAN


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width", "pad_top", "pad_left"])
def _product_kernel(
    source, weight, bias, offsets, target, pixels, height, width, out_height, out_width, pad_top, pad_left,
    IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr, PIECE: tl.constexpr,
    MIRRORED: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The target (N, out_height, out_width, OUT) from source (N, height, width, IN) and weight (TAPS, rows, OUT).

    Rows: the source's channels of a group. SHARED output channels of the convolution share a position group, and pieces
    of PIECE a group too. MIRRORED: from the gradient of the output to that of the input, with mirrored positions.
    """
    SIGN: tl.constexpr = -1 if MIRRORED else 1
    ROWS: tl.constexpr = IN // GROUPS
    SPAN: tl.constexpr = OUT // GROUPS if MIRRORED else PIECE
    DEPTH: tl.constexpr = PIECE if MIRRORED else ROWS  # channels of the source that meet the same taps
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < pixels
    run, place, wanted = columns(tl.program_id(1), SPAN, BLOCK_N)
    out = run * SPAN + place
    ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
    if WIDE:
        n = n.to(tl.int64)
    image = n * (height * width * IN)
    depth = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(ROWS // DEPTH):
        group = run if MIRRORED else run * PIECE // (OUT // GROUPS)
        position = (run * ROWS + part * PIECE if MIRRORED else run * PIECE) // SHARED
        for k in range(TAPS):
            at = offsets + (position * TAPS + k) * 2
            grid_y, grid_x = k // COLUMNS * DILATION_Y - pad_top, k % COLUMNS * DILATION_X - pad_left
            row, fy = tap(tl.load(at) * SIGN, grid_y * SIGN)
            column, fx = tap(tl.load(at + 1) * SIGN, grid_x * SIGN)
            y, x = oy * STRIDE_Y + row, ox * STRIDE_X + column
            read = neighbours(y, x, fy, fx, inside, height, width)
            pixel = image + (y * width + x) * IN + group * ROWS
            for c in range(0, DEPTH, BLOCK_K):
                channel = part * DEPTH + c + depth
                here = source + (pixel[:, None] + channel[None, :])
                some = tl.full((1, BLOCK_K), 1, tl.int1) if DEPTH % BLOCK_K == 0 else (c + depth < DEPTH)[None, :]
                samples = interpolate(here, read, some, fy, fx, width * IN, IN, HALF)
                known = wanted[None, :] & (c + depth < DEPTH)[:, None]
                rows = (k * ROWS + channel) * OUT
                matrix = tl.load(weight + rows[:, None] + out[None, :], mask=known, other=0.0)
                total = tl.dot(samples, matrix, total, input_precision=PRECISION)
    if BIAS:
        total += tl.load(bias + out, mask=wanted, other=0.0).to(tl.float32)[None, :]
    there = target + m.to(tl.int64)[:, None] * OUT + out[None, :]
    tl.store(there, total.to(target.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


def piece_of(c_out: int, groups: int, positions: int) -> int:
    """Output channels in a row that surely share both their group and their position group."""
    return math.gcd(c_out // groups, c_out // positions)


def programs(channels: int, span: int, block: int) -> int:
    """Of ``channels`` in runs of ``span`` that are cut into blocks: see :func:`columns`."""
    return channels // span * triton.cdiv(span, block)


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
    if groups == positions == 1 and source.shape[1] >= gemm_from(source.dtype, source.device):
        gemm.product(source, packed, offsets, bias, geometry, target, stride, mirrored=mirrored)
        return
    c_out = source.shape[1] if mirrored else channels
    piece = piece_of(c_out, groups, positions)
    span, depth = (channels // groups, piece) if mirrored else (piece, source.shape[1] // groups)
    tile = tile_for("product", source.dtype, depth, span, source.device)
    pixels = count * height * width
    _product_kernel[(triton.cdiv(pixels, tile.m), programs(channels, span, tile.n))](
        source, packed, bias, offsets, target, pixels, *source.shape[2:], height, width, *geometry.padding[:2],
        IN=source.shape[1], OUT=channels, GROUPS=groups, SHARED=c_out // positions, PIECE=piece, MIRRORED=mirrored,
        TAPS=geometry.taps, COLUMNS=geometry.kernel_size[1], STRIDE_Y=stride[0], STRIDE_X=stride[1],
        DILATION_Y=geometry.dilation[0], DILATION_X=geometry.dilation[1], BIAS=bias is not None,
        WIDE=source.numel() >= 2**31, HALF=interpolates_in_half(source.dtype),
        PRECISION=precision(source.dtype, source.device), **tile.launch(),
    )  # fmt: skip
