"""The matrix product of the Triton backend: taps interpolated in registers, one ``tl.dot`` each.

The forward pass and, at stride 1, its adjoint: the gradient of the input is the same product of the output's gradient
with mirrored positions and transposed weight. Images are channels_last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from . import gemm
from .blocks import channel_block, channel_blocks, shared_span, stride_arguments, tap_arguments, unravel_pixels
from .sampling import interpolate, neighbour_masks, tap_position
from .tiles import Tile, gemm_from, interpolates_in_half, precision, tile_for

__all__ = ["forward", "input_gradient", "pack_weight"]


@triton.jit(do_not_specialize=["num_pixels", "height", "width", "out_height", "out_width", "pad_top", "pad_left"])
def _product_kernel(
    x_ptr, w_ptr, bias_ptr, offsets_ptr, out_ptr, num_pixels, height, width, out_height, out_width, pad_top, pad_left,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUPS: tl.constexpr, POSITION_SPAN: tl.constexpr, SPAN: tl.constexpr,
    MIRRORED: tl.constexpr, TAPS: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr, HAS_BIAS: tl.constexpr, INT64: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] = bias[n] + sum over taps and k of (x sampled at the tap)[m, k] * w[tap, k, n].

    A program computes BLOCK_M pixels and BLOCK_N channels of ``out``.

    Args:
        x_ptr: (N, height, width, C_IN), the input; MIRRORED: the gradient of the output.
        w_ptr: (TAPS, C_IN / GROUPS, C_OUT), see :func:`pack_weight`.
        bias_ptr: (C_OUT,), where HAS_BIAS.
        offsets_ptr: (P, TAPS, 2) float32, (dy, dx) of each tap in pixels.
        out_ptr: (N, out_height, out_width, C_OUT), to write: the output; MIRRORED: the gradient of the input.
        num_pixels: N * out_height * out_width.
        height, width, out_height, out_width: in pixels.
        pad_top, pad_left: in pixels.
        POSITION_SPAN: output channels of the convolution that share a position group.
        SPAN: those in a row that share a convolution group too.
        INT64: whether ``x`` has more elements than 32 bits count.
        HALF: see :func:`.sampling.interpolate`.
        PRECISION: of ``tl.dot``.
    """
    SIGN: tl.constexpr = -1 if MIRRORED else 1
    GROUP_IN: tl.constexpr = C_IN // GROUPS
    N_SPAN: tl.constexpr = C_OUT // GROUPS if MIRRORED else SPAN
    K_SPAN: tl.constexpr = SPAN if MIRRORED else GROUP_IN  # channels of x that are read at the same positions
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_pixels
    span, offs_n, mask_n = channel_block(pid_n, N_SPAN, BLOCK_N)
    offs_n = span * N_SPAN + offs_n
    n, out_y, out_x = unravel_pixels(offs_m, out_height, out_width)
    if INT64:
        n = n.to(tl.int64)
    image = n * (height * width * C_IN)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in range(GROUP_IN // K_SPAN):
        group = span if MIRRORED else span * SPAN // (C_OUT // GROUPS)
        position_group = (span * GROUP_IN + part * SPAN if MIRRORED else span * SPAN) // POSITION_SPAN
        for tap in range(TAPS):
            tap_ptr = offsets_ptr + (position_group * TAPS + tap) * 2
            cell_y, cell_x, frac_y, frac_x = tap_position(
                tap_ptr, tap, pad_top, pad_left, KERNEL_W, DILATION_Y, DILATION_X, SIGN
            )
            y, x = out_y * STRIDE_Y + cell_y, out_x * STRIDE_X + cell_x
            masks = neighbour_masks(y, x, frac_y, frac_x, mask_m, height, width)
            pixel = image + (y * width + x) * C_IN + group * GROUP_IN
            for start_k in range(0, K_SPAN, BLOCK_K):
                channel = part * K_SPAN + start_k + offs_k
                x_ptrs = x_ptr + (pixel[:, None] + channel[None, :])
                if K_SPAN % BLOCK_K == 0:
                    mask_c = tl.full((1, BLOCK_K), 1, tl.int1)
                else:
                    mask_c = (start_k + offs_k < K_SPAN)[None, :]
                samples = interpolate(x_ptrs, masks, mask_c, frac_y, frac_x, width * C_IN, C_IN, HALF)
                w_ptrs = w_ptr + ((tap * GROUP_IN + channel) * C_OUT)[:, None] + offs_n[None, :]
                mask_w = mask_n[None, :] & (start_k + offs_k < K_SPAN)[:, None]
                w = tl.load(w_ptrs, mask=mask_w, other=0.0)
                acc = tl.dot(samples, w, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * C_OUT + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


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
        weight: (C_out, C_in/groups, kh, kw).
        offsets: (P, K, 2) in pixels, contiguous, float32.
        bias: (C_out,), contiguous, or None.
        geometry: of the convolution.
        output: (N, C_out, H_out, W_out), channels_last, to write.
        tile: of the fused kernel; None: kernel and tile as :mod:`.tiles` has them.
    """
    packed = pack_weight(weight, geometry, mirrored=False)
    _product(input, packed, offsets, bias, geometry, output, geometry.stride, tile, mirrored=False)


def input_gradient(
    grad: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    grad_input: Tensor,
    tile: Tile | None = None,
) -> None:
    """Writes ``grad_input`` (N, C_in, H, W) from ``grad`` (N, C_out, H_out, W_out); see :func:`forward`. Stride 1."""
    packed = pack_weight(weight, geometry, mirrored=True)
    _product(grad, packed, offsets, None, geometry, grad_input, (1, 1), tile, mirrored=True)


def pack_weight(weight: Tensor, geometry: ConvGeometry, *, mirrored: bool) -> Tensor:
    """Weight (C_out, C_in/groups, kh, kw) as the product reads it, contiguous.

    Returns:
        (kh, kw, C_in/groups, C_out); ``mirrored``: (kh, kw, C_out/groups, groups, C_in/groups).
    """
    if not mirrored:
        return weight.permute(2, 3, 1, 0).contiguous()
    return weight.unflatten(0, (geometry.groups, -1)).permute(3, 4, 1, 0, 2).contiguous()


def _product(
    x: Tensor,
    packed: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    out: Tensor,
    stride: tuple[int, int],
    tile: Tile | None,
    *,
    mirrored: bool,
) -> None:
    groups, position_groups, c_in = geometry.groups, len(offsets), x.shape[1]
    if tile is None and groups == position_groups == 1 and c_in >= gemm_from(x.dtype, x.device):
        gemm.product(x, packed, offsets, bias, geometry, out, stride, mirrored=mirrored)
        return
    count, c_out, out_height, out_width = out.shape
    conv_out = c_in if mirrored else c_out
    span = shared_span(conv_out, groups, position_groups)
    n_span, k_span = (c_out // groups, span) if mirrored else (span, c_in // groups)
    tile = tile or tile_for("product", x.dtype, k_span, n_span, x.device)
    num_pixels = count * out_height * out_width
    _product_kernel[(triton.cdiv(num_pixels, tile.m), channel_blocks(c_out, n_span, tile.n))](
        x, packed, bias, offsets, out, num_pixels, *x.shape[2:], out_height, out_width, *geometry.padding[:2],
        C_IN=c_in, C_OUT=c_out, GROUPS=groups, POSITION_SPAN=conv_out // position_groups, SPAN=span,
        MIRRORED=mirrored, HAS_BIAS=bias is not None, INT64=x.numel() >= 2**31, HALF=interpolates_in_half(x.dtype),
        PRECISION=precision(x.dtype, x.device), **tap_arguments(geometry), **stride_arguments(stride), **tile.launch(),
    )  # fmt: skip
