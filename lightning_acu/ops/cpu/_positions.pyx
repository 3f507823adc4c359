# distutils: language = c
"""Offsets to cells and fractions: few numbers, but in every call."""

from cython cimport floating
from libc.math cimport floor
from libc.stdint cimport int64_t


def locate(
    const floating[:, :, :] offsets, int64_t columns, int64_t dilation_y, int64_t dilation_x, int64_t top, int64_t left,
    double far, int64_t[:, :, ::1] cell, double[:, :, ::1] fraction,
):
    """offsets IN (P, K, 2) to cell OUT (P, K, 2), seen from input pixel `output * stride`, and fraction OUT in [0, 1].

    Offsets beyond +-far count as far; a NaN offset leaves the tap in its cell on the grid, with a fraction of NaN.
    Returns whether any offset is NaN.
    """
    cdef int64_t p, k, axis, grid
    cdef double offset, whole
    cdef bint any_nan = False
    for p in range(offsets.shape[0]):
        for k in range(offsets.shape[1]):
            for axis in range(2):
                grid = k % columns * dilation_x - left if axis else k // columns * dilation_y - top
                offset = offsets[p, k, axis]
                offset = far if offset > far else -far if offset < -far else offset
                whole = floor(offset)
                fraction[p, k, axis] = offset - whole
                cell[p, k, axis] = grid + (<int64_t>whole if whole == whole else 0)
                any_nan |= whole != whole
    return any_nan


def any_fraction(const floating[:, :, :] offsets):
    """Whether any offset is not a whole number (infinity counts as one, NaN does not)."""
    cdef int64_t p, k, axis
    for p in range(offsets.shape[0]):
        for k in range(offsets.shape[1]):
            for axis in range(2):
                if floor(<double>offsets[p, k, axis]) != offsets[p, k, axis]:
                    return True
    return False


def any_shift(const floating[:, :, :] offsets):
    """Whether any offset is not zero."""
    cdef int64_t p, k, axis
    for p in range(offsets.shape[0]):
        for k in range(offsets.shape[1]):
            for axis in range(2):
                if offsets[p, k, axis] != 0:
                    return True
    return False
