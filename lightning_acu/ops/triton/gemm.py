"""Interpolate first, then one GEMM of torch's: the route of the Triton backend for many channels.

There the fused product spends its time multiplying, which torch's library does better, and interpolation is a thin
pass over memory beside it. Samples are made in parts, of at most 16 MB,
which stay in the L2 cache of large GPUs until the GEMM reads them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from .blocks import stride_arguments, tap_arguments, unravel_pixels
from .sampling import interpolate, neighbour_masks, tap_position
from .tiles import interpolates_in_half

__all__ = ["product"]

_BYTES = 16 * 2**20  # of samples at a time
_BLOCK_M, _BLOCK_C = 16, 128


@triton.jit(
    do_not_specialize=["first", "num_pixels", "height", "width", "out_height", "out_width", "pad_top", "pad_left"]
)
def _sample_kernel(
    x_ptr, offsets_ptr, samples_ptr, first, num_pixels, height, width, out_height, out_width, pad_top, pad_left,
    C_IN: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, SIGN: tl.constexpr, HALF: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """samples[m, tap, c] = x at the tap of output pixel first + m.

    A program computes BLOCK_M pixels and BLOCK_C channels of one tap.

    Args:
        x_ptr: (N, height, width, C_IN).
        offsets_ptr: (TAPS, 2) float32, (dy, dx) of each tap in pixels.
        samples_ptr: (num_pixels - first, TAPS, C_IN), to write.
        first, num_pixels: the first output pixel, and the one after the last.
        height, width, out_height, out_width: in pixels.
        pad_top, pad_left: in pixels.
        SIGN: -1 mirrors the taps; see :func:`.sampling.tap_position`.
        HALF: see :func:`.sampling.interpolate`.
    """
    offs_s = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # rows of samples
    tap, offs_c = tl.program_id(1), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = first + offs_s
    mask_m, mask_c = offs_m < num_pixels, (offs_c < C_IN)[None, :]
    n, out_y, out_x = unravel_pixels(offs_m, out_height, out_width)
    cell_y, cell_x, frac_y, frac_x = tap_position(
        offsets_ptr + 2 * tap, tap, pad_top, pad_left, KERNEL_W, DILATION_Y, DILATION_X, SIGN
    )
    y, x = out_y * STRIDE_Y + cell_y, out_x * STRIDE_X + cell_x
    masks = neighbour_masks(y, x, frac_y, frac_x, mask_m, height, width)
    pixel = n.to(tl.int64) * (height * width * C_IN) + (y * width + x) * C_IN
    x_ptrs = x_ptr + pixel[:, None] + offs_c[None, :]
    samples = interpolate(x_ptrs, masks, mask_c, frac_y, frac_x, width * C_IN, C_IN, HALF)
    samples_ptrs = samples_ptr + (offs_s.to(tl.int64) * TAPS + tap)[:, None] * C_IN + offs_c[None, :]
    tl.store(samples_ptrs, samples, mask=mask_m[:, None] & mask_c)


def product(
    x: Tensor,
    packed: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    out: Tensor,
    stride: tuple[int, int],
    *,
    mirrored: bool,
) -> None:
    """Writes ``out`` as the fused product does, for one group and one position group.

    Args:
        x: (N, C_in, H, W), channels_last: the input, or the output's gradient where ``mirrored``.
        packed: as ``product.pack_weight`` makes it.
        offsets: (1, K, 2) in pixels, contiguous, float32.
        bias: (C_out,) or None.
        geometry: of the convolution.
        out: (N, C_out, H_out, W_out), channels_last, to write.
        stride: in pixels.
        mirrored: whether taps are mirrored.
    """
    c_in, (out_height, out_width) = x.shape[1], out.shape[2:]
    rows, matrix = out.permute(0, 2, 3, 1).flatten(0, 2), packed.view(geometry.taps * c_in, -1)
    num_pixels, limit = len(rows), _BYTES // (geometry.taps * c_in * x.element_size())
    if not num_pixels:
        return
    part = min(num_pixels, max(_BLOCK_M, limit // _BLOCK_M * _BLOCK_M))
    samples = x.new_empty(part, geometry.taps * c_in)
    for first in range(0, num_pixels, part):
        count = min(part, num_pixels - first)
        grid = triton.cdiv(count, _BLOCK_M), geometry.taps, triton.cdiv(c_in, _BLOCK_C)
        _sample_kernel[grid](
            x, offsets, samples, first, first + count, *x.shape[2:], out_height, out_width, *geometry.padding[:2],
            C_IN=c_in, SIGN=-1 if mirrored else 1, HALF=interpolates_in_half(x.dtype), BLOCK_M=_BLOCK_M,
            BLOCK_C=_BLOCK_C, **tap_arguments(geometry), **stride_arguments(stride),
        )  # fmt: skip
        if bias is None:
            torch.mm(samples[:count], matrix, out=rows[first : first + count])
        else:
            torch.addmm(bias, samples[:count], matrix, out=rows[first : first + count])
