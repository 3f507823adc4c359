"""How programs divide pixels and channels, and the compile-time arguments that all kernels take from a geometry.

The compiler reads 16 bytes at a time where it knows what channel numbers are multiples of. They are therefore
arithmetic on compile-time numbers: channels are cut into spans whose output channels share their convolution group and
their position group, and a program works on a block of one span.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...geometry import ConvGeometry

__all__ = [
    "channel_block",
    "channel_blocks",
    "inside",
    "next_pixels",
    "shared_span",
    "split_pixels",
    "stride_arguments",
    "strided_pixels",
    "tap_arguments",
    "unravel_pixels",
]


@triton.jit
def unravel_pixels(offs_m, height, width):
    """(n, y, x) of pixels (BLOCK_M,) that are numbered through a batch of images."""
    return offs_m // (width * height), offs_m // width % height, offs_m % width


@triton.jit
def strided_pixels(offs_m, height, width, out_height, out_width, STRIDE_Y: tl.constexpr, STRIDE_X: tl.constexpr):
    """Where output pixels (BLOCK_M,) lie in the input: (y, x, pixel), with ``pixel`` numbered through the batch."""
    n, out_y, out_x = unravel_pixels(offs_m, out_height, out_width)
    y, x = out_y * STRIDE_Y, out_x * STRIDE_X
    return y, x, (n * height + y) * width + x


@triton.jit
def next_pixels(
    y, x, pixel, height, width, out_height, out_width, STEP: tl.constexpr, STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
):  # fmt: skip
    """:func:`strided_pixels` of the output pixels STEP further on: carries instead of divisions.

    The quotients of STEP are the same in every step of a loop, so that the compiler computes them once.
    """
    step_n, step_y, step_x = unravel_pixels(STEP, out_height, out_width)
    x += step_x * STRIDE_X
    wraps_x = x >= out_width * STRIDE_X
    x = tl.where(wraps_x, x - out_width * STRIDE_X, x)
    y = tl.where(wraps_x, y + (step_y + 1) * STRIDE_Y, y + step_y * STRIDE_Y)
    wraps_y = y >= out_height * STRIDE_Y
    y = tl.where(wraps_y, y - out_height * STRIDE_Y, y)
    pixel += (step_n * height + step_y * STRIDE_Y) * width + step_x * STRIDE_X
    pixel += tl.where(wraps_x, STRIDE_Y * width - out_width * STRIDE_X, 0)
    return y, x, pixel + tl.where(wraps_y, (height - out_height * STRIDE_Y) * width, 0)


@triton.jit
def inside(position, size):
    """0 <= position < size, in one comparison."""
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def channel_block(pid, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """The block of channels of program ``pid``, where channels in spans of SPAN are cut into blocks of BLOCK.

    Returns:
        (span, offs, mask): the number of the span; (BLOCK,) channels within it; (BLOCK,) whether they exist.
    """
    BLOCKS: tl.constexpr = (SPAN + BLOCK - 1) // BLOCK
    offs = pid % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    return pid // BLOCKS, offs, offs < SPAN


def channel_blocks(channels: int, span: int, block: int) -> int:
    """How many programs :func:`channel_block` makes of ``channels``."""
    return channels // span * triton.cdiv(span, block)


def shared_span(c_out: int, groups: int, position_groups: int) -> int:
    """The longest spans of output channels in each of which all share a convolution group and a position group."""
    return math.gcd(c_out // groups, c_out // position_groups)


def split_pixels(num_pixels: int, step: int, programs: int, wanted: int) -> tuple[int, int]:
    """Cut a sum over pixels into parts for programs of their own, so that a GPU has enough of them.

    Args:
        num_pixels: at least 1.
        step: pixels that a program adds at a time; a part has about 8 steps at least, or all pixels.
        programs: those that there are for each part.
        wanted: how many programs are enough.

    Returns:
        (pixels of a part, a multiple of ``step``; number of parts).
    """
    parts = max(1, min(triton.cdiv(num_pixels, 8 * step), triton.cdiv(wanted, programs)))
    size = triton.cdiv(triton.cdiv(num_pixels, parts), step) * step
    return size, triton.cdiv(num_pixels, size)


def stride_arguments(stride: tuple[int, int]) -> dict[str, int]:
    """STRIDE_Y and STRIDE_X."""
    return {"STRIDE_Y": stride[0], "STRIDE_X": stride[1]}


def tap_arguments(geometry: ConvGeometry) -> dict[str, int]:
    """Those that :func:`.sampling.tap_position` and loops over taps take."""
    dilation_y, dilation_x = geometry.dilation
    return {
        "TAPS": geometry.taps,
        "KERNEL_W": geometry.kernel_size[1],
        "DILATION_Y": dilation_y,
        "DILATION_X": dilation_x,
    }
