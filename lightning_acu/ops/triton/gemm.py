"""Interpolate first, then one GEMM of torch's: the route of the Triton backend for many channels.

There the fused product spends its time multiplying, which torch's library does better, and interpolation is a thin
pass over memory beside it. Samples are made in parts, so that they never take more than 64 MB.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .sampling import interpolate, neighbours, tap
from .tiles import interpolates_in_half

__all__ = ["product"]

_BYTES = 64 * 2**20  # of samples at a time
_BLOCK_M, _BLOCK_C = 16, 128


@triton.jit(do_not_specialize=["start", "pixels", "height", "width", "out_height", "out_width", "pad_top", "pad_left"])
def _sample_kernel(
    source, offsets, samples, start, pixels, height, width, out_height, out_width, pad_top, pad_left,
    IN: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, SIGN: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """samples[m, k, c] of the pixels from ``start`` on, at tap k of source (N, height, width, IN)."""
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k, channel = tl.program_id(1), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = start + local
    inside = m < pixels
    ox, oy, n = m % out_width, m // out_width % out_height, m // (out_width * out_height)
    grid_y, grid_x = k // COLUMNS * DILATION_Y - pad_top, k % COLUMNS * DILATION_X - pad_left
    row, fy = tap(tl.load(offsets + 2 * k) * SIGN, grid_y * SIGN)
    column, fx = tap(tl.load(offsets + 2 * k + 1) * SIGN, grid_x * SIGN)
    y, x = oy * STRIDE_Y + row, ox * STRIDE_X + column
    read = neighbours(y, x, fy, fx, inside, height, width)
    place = n.to(tl.int64) * (height * width * IN) + (y * width + x) * IN
    some = (channel < IN)[None, :]
    found = interpolate(source + place[:, None] + channel[None, :], read, some, fy, fx, width * IN, IN, HALF)
    target = samples + (local.to(tl.int64) * TAPS + k)[:, None] * IN + channel[None, :]
    tl.store(target, found, mask=inside[:, None] & some)


def product(
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
    """Writes ``target``: as the fused product does, for one group and one position group."""
    depth, (height, width) = source.shape[1], target.shape[2:]
    flat, kernel = target.permute(0, 2, 3, 1).flatten(0, 2), packed.view(geometry.taps * depth, -1)
    pixels, most = len(flat), _BYTES // (geometry.taps * depth * source.element_size())
    part = min(pixels, max(_BLOCK_M, most // _BLOCK_M * _BLOCK_M))
    if not pixels:
        return
    samples = source.new_empty(part, geometry.taps * depth)
    for start in range(0, pixels, part):
        count = min(part, pixels - start)
        grid = triton.cdiv(count, _BLOCK_M), geometry.taps, triton.cdiv(depth, _BLOCK_C)
        _sample_kernel[grid](
            source, offsets, samples, start, min(start + part, pixels), *source.shape[2:], height, width,
            geometry.padding[0], geometry.padding[1], IN=depth, TAPS=geometry.taps, COLUMNS=geometry.kernel_size[1],
            STRIDE_Y=stride[0], STRIDE_X=stride[1], DILATION_Y=geometry.dilation[0], DILATION_X=geometry.dilation[1],
            SIGN=-1 if mirrored else 1, HALF=interpolates_in_half(source.dtype), BLOCK_M=_BLOCK_M, BLOCK_C=_BLOCK_C,
        )  # fmt: skip
        if bias is None:
            torch.mm(samples[:count], kernel, out=flat[start : start + count])
        else:
            torch.addmm(bias, samples[:count], kernel, out=flat[start : start + count])
