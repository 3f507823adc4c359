"""Bilinear sampling inside kernels: where a tap reads, and what it reads there."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["interpolate", "neighbour_masks", "split_position", "tap_position"]

_FAR = tl.constexpr(2.0**20)  # as expansion.FAR


@triton.jit
def split_position(offset, grid):
    """The cell and the fraction of a position along one axis.

    Args:
        offset: pixels from ``grid``, float32; clamped to 2^20 either way, where no image reaches.
        grid: whole pixels, int32.

    Returns:
        (cell, fraction): int32, and float32 in [0, 1). A NaN stays in the fraction; its cell is ``grid``.
    """
    offset = tl.where(offset > _FAR, _FAR, tl.where(offset < -_FAR, -_FAR, offset))
    whole = tl.floor(offset)
    return grid + tl.where(whole == whole, whole, 0.0).to(tl.int32), offset - whole


@triton.jit
def tap_position(
    tap_ptr, tap, pad_top, pad_left, KERNEL_W: tl.constexpr, DILATION_Y: tl.constexpr, DILATION_X: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """Where a tap reads, seen from input pixel ``output * stride``; SIGN -1 mirrors it there.

    Args:
        tap_ptr: (2,) float32, the tap's offset (dy, dx) in pixels.
        tap: its number in raster order.
        pad_top, pad_left: pixels of padding.

    Returns:
        (cell_y, cell_x, frac_y, frac_x): see :func:`split_position`.
    """
    grid_y, grid_x = tap // KERNEL_W * DILATION_Y - pad_top, tap % KERNEL_W * DILATION_X - pad_left
    cell_y, frac_y = split_position(tl.load(tap_ptr) * SIGN, grid_y * SIGN)
    cell_x, frac_x = split_position(tl.load(tap_ptr + 1) * SIGN, grid_x * SIGN)
    return cell_y, cell_x, frac_y, frac_x


@triton.jit
def neighbour_masks(y, x, frac_y, frac_x, mask_m, height, width):
    """Which pixels read their neighbours 00, 01, 10 and 11: those inside the image and of a weight other than 0.

    Args:
        y, x: (BLOCK_M,) int32, the cell of each pixel.
        frac_y, frac_x: float32 scalars, the tap's fractions.
        mask_m: (BLOCK_M,), the pixels to compute.
        height, width: of the image.

    Returns:
        Four masks (BLOCK_M,).
    """
    # The interpreter cannot combine a scalar condition with a vector: limits instead of `& (frac_y != 0)`.
    last_y, last_x = tl.where(frac_y != 0, height - 1, -1), tl.where(frac_x != 0, width - 1, -1)
    upper, lower = mask_m & (y >= 0) & (y < height), mask_m & (y >= -1) & (y < last_y)
    left, right = (x >= 0) & (x < width), (x >= -1) & (x < last_x)
    return upper & left, upper & right, lower & left, lower & right


@triton.jit
def interpolate(x_ptrs, masks, mask_c, frac_y, frac_x, stride_y, stride_x, HALF: tl.constexpr):
    """Samples (BLOCK_M, BLOCK_C) of an image, in its own dtype.

    Args:
        x_ptrs: (BLOCK_M, BLOCK_C) pointers to neighbour 00.
        masks: four masks (BLOCK_M,), see :func:`neighbour_masks`.
        mask_c: (1, BLOCK_C), the channels to read.
        frac_y, frac_x: float32 scalars, the tap's fractions.
        stride_y, stride_x: elements from a pixel to the one below it and to the one right of it.
        HALF: interpolate in the image's own precision, two numbers an instruction; otherwise in float32, with one
            rounding at the end.
    """
    x00 = tl.load(x_ptrs, mask=masks[0][:, None] & mask_c, other=0.0)
    x01 = tl.load(x_ptrs + stride_x, mask=masks[1][:, None] & mask_c, other=0.0)
    x10 = tl.load(x_ptrs + stride_y, mask=masks[2][:, None] & mask_c, other=0.0)
    x11 = tl.load(x_ptrs + (stride_y + stride_x), mask=masks[3][:, None] & mask_c, other=0.0)
    dtype: tl.constexpr = x00.dtype if HALF else tl.float32
    zeros = tl.zeros(x00.shape, dtype)
    acc = x00.to(dtype) * (zeros + ((1 - frac_y) * (1 - frac_x)).to(dtype))
    acc = tl.fma(x01.to(dtype), zeros + ((1 - frac_y) * frac_x).to(dtype), acc)
    acc = tl.fma(x10.to(dtype), zeros + (frac_y * (1 - frac_x)).to(dtype), acc)
    return tl.fma(x11.to(dtype), zeros + (frac_y * frac_x).to(dtype), acc).to(x00.dtype)
