"""Runs of channels that belong together, and matrices packed for the matrix product."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from ._vectors cimport real

cdef extern from "_transpose.h" nogil:
    void transpose_f32(
        int64_t rows, int64_t columns, const float* source, int64_t source_step, float* to, int64_t to_step
    )

cdef struct Piece:
    int64_t first  # output channels
    int64_t last
    int64_t group
    int64_t positions


cdef inline Piece piece_at(int64_t channel, int64_t end, int64_t per_group, int64_t per_position) noexcept nogil:
    """The piece that starts at output `channel`; it ends at `end` at the latest."""
    cdef Piece piece
    piece.first = channel
    piece.group = channel // per_group
    piece.positions = channel // per_position
    piece.last = min(min((piece.group + 1) * per_group, (piece.positions + 1) * per_position), end)
    return piece


cdef inline int64_t ceil_div(int64_t a, int64_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline void pack_output_block(
    const real[:, :, :] weight, int64_t first, int64_t last, int64_t ci_first, int64_t ci_last, int64_t k_first,
    int64_t k_last, real* to, int64_t width,
) noexcept nogil:
    cdef int64_t lane, ci, k, inputs = weight.shape[1]
    if real is float and weight.strides[1] == sizeof(real):
        for k in range(k_first, k_last):
            transpose_f32(
                last - first, ci_last - ci_first, &weight[first, ci_first, k], weight.strides[0] //
                <int64_t>sizeof(real), to + (k * inputs + ci_first) * width, width,
            )
        return
    for lane in range(last - first):
        for k in range(k_first, k_last):
            for ci in range(ci_first, ci_last):
                to[(k * inputs + ci) * width + lane] = weight[first + lane, ci, k]


cdef inline void pack_output_panel(
    const real[:, :, :] weight, int64_t first, int64_t last, real* to, int64_t width
) noexcept nogil:
    """Output channels first to last: to[k * C_in/groups + ci, co - first]; in blocks that fit the L1 cache."""
    cdef int64_t inputs = weight.shape[1], taps = weight.shape[2]
    cdef int64_t apart = taps if weight.strides[2] > weight.strides[1] else 1  # channels_last weights: tap after tap
    cdef int64_t step, block, k_first, k_last
    if last - first < width:
        memset(to, 0, inputs * taps * width * sizeof(real))
    for step in range(apart):
        k_first, k_last = step, step + 1
        if apart == 1:
            k_last = taps
        for block in range(0, inputs, 16):
            pack_output_block(weight, first, last, block, min(block + 16, inputs), k_first, k_last, to, width)


cdef inline void pack_input_panel(
    const real[:, :, :] weight, int64_t groups, int64_t group, int64_t first, real* packed, int width
) noexcept nogil:
    cdef int64_t per_group = weight.shape[0] // groups, inputs = weight.shape[1], taps = weight.shape[2], co, k, ci
    cdef int64_t last = min(first + width, inputs)
    cdef real* to = packed + (group * ceil_div(inputs, width) + first // width) * taps * per_group * width
    if last - first < width:
        memset(to, 0, taps * per_group * width * sizeof(real))
    if weight.strides[1] == sizeof(real):  # channels_last weights: whole rows, written one after the other
        for k in range(taps):
            for co in range(per_group):
                memcpy(
                    to + (k * per_group + co) * width, &weight[group * per_group + co, first, k],
                    (last - first) * sizeof(real),
                )
        return
    for co in range(per_group):
        for k in range(taps):
            for ci in range(first, last):
                to[(k * per_group + co) * width + ci - first] = weight[group * per_group + co, ci, k]


cdef inline void pack_transposed(
    const real* gradient, int64_t c_out, int64_t first, int64_t last, Piece piece, real* to, int64_t tile
) noexcept nogil:
    """Output channels of `piece` in tiles: to[tile][pixel - first][channel of the tile]."""
    cdef int64_t channel = piece.first, pixel, count
    while channel < piece.last:
        count = min(tile, piece.last - channel)
        for pixel in range(first, last):
            memcpy(to, gradient + pixel * c_out + channel, count * sizeof(real))
            to += tile
        channel += tile
