"""Bilinear sampling inside kernels: where a tap reads, and what lies there."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["interpolate", "neighbours", "tap"]

_FAR = tl.constexpr(2.0**20)  # as positions.FAR


@triton.jit
def tap(offset, grid):
    """(cell, fraction) of a tap along one axis, ``offset`` pixels from ``grid``. NaN stays in the fraction."""
    offset = tl.where(offset > _FAR, _FAR, tl.where(offset < -_FAR, -_FAR, offset))
    whole = tl.floor(offset)
    return grid + tl.where(whole == whole, whole, 0.0).to(tl.int32), offset - whole


@triton.jit
def neighbours(y, x, fy, fx, inside, height, width):
    """Which pixels (M,) read their neighbours 00, 01, 10, 11 of the cell (y, x). Those of weight 0 are not read."""
    # The interpreter cannot combine a scalar condition with a vector: limits instead of `& (fy != 0)`.
    last_y, last_x = tl.where(fy != 0, height - 1, -1), tl.where(fx != 0, width - 1, -1)
    upper, lower = inside & (y >= 0) & (y < height), inside & (y >= -1) & (y < last_y)
    left, right = (x >= 0) & (x < width), (x >= -1) & (x < last_x)
    return upper & left, upper & right, lower & left, lower & right


@triton.jit
def interpolate(here, read, some, fy, fx, down, right, HALF: tl.constexpr):
    """Samples (M, C) of a channels_last image at ``here``, pointers (M, C) to neighbour 00; the others are ``right``
    and ``down`` elements away. ``read``: see :func:`neighbours`; ``some`` (1, C): channels that there are.

    In float32 with one rounding at the end; HALF: in the image's own precision, two numbers an instruction.
    """
    x00 = tl.load(here, mask=read[0][:, None] & some, other=0.0)
    x01 = tl.load(here + right, mask=read[1][:, None] & some, other=0.0)
    x10 = tl.load(here + down, mask=read[2][:, None] & some, other=0.0)
    x11 = tl.load(here + (down + right), mask=read[3][:, None] & some, other=0.0)
    precision: tl.constexpr = x00.dtype if HALF else tl.float32
    zero = tl.zeros(x00.shape, precision)
    value = x00.to(precision) * (zero + ((1 - fy) * (1 - fx)).to(precision))
    value = tl.fma(x01.to(precision), zero + ((1 - fy) * fx).to(precision), value)
    value = tl.fma(x10.to(precision), zero + (fy * (1 - fx)).to(precision), value)
    return tl.fma(x11.to(precision), zero + (fy * fx).to(precision), value).to(x00.dtype)
