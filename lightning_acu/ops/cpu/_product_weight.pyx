# distutils: language = c
"""Active convolution as a matrix product: the gradient of the weights. Names and rules as in `_product.pyx`."""

from cython.parallel cimport prange
from libc.stdint cimport int64_t
from libc.string cimport memset

from ._packing cimport Piece, ceil_div, pack_transposed, piece_at
from ._sampling cimport Grid, Tap, grid_of, sample, tap_at
from ._vectors cimport Buffer, lanes, multiply_transposed, real, tile_rows

cdef enum:
    #: Output pixels over which one product sums, and output channels it covers.
    LONG_BLOCK = 240
    CHANNELS = 504


def backward_weight(
    const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const int64_t[:, :, ::1] cell,
    const double[:, :, ::1] fraction, int64_t groups, stride, real[:, :, ::1] grad_weight, int threads,
):
    """grad_weight OUT (C_out, K, C_in/groups), from gradient IN (N, H_out, W_out, C_out) and image IN (N, H, W, C_in).

    The taps are interpolated again: nothing but the image is kept from the forward pass.
    """
    cdef Grid grid = grid_of(image.shape, gradient.shape, stride)
    cdef int width = 2 * lanes(<real*>NULL), tile = tile_rows(<real*>NULL)
    cdef int64_t c_out = gradient.shape[3], inputs = grid.channels // groups, units = 0, channel = 0, thread
    cdef int64_t size = LONG_BLOCK * (width + ceil_div(min(CHANNELS, c_out // groups), tile) * tile)
    cdef Buffer buffer = Buffer(threads * size, sizeof(real))
    while channel < c_out:
        channel = piece_at(channel, channel + CHANNELS, c_out // groups, c_out // cell.shape[0]).last
        units += cell.shape[1] * ceil_div(inputs, width)
    for thread in prange(threads, nogil=True, num_threads=threads, schedule="static", chunksize=1):
        backward_weight_units(
            &grid, gradient, image, cell, fraction, groups, units * thread // threads, units * (thread + 1) // threads,
            grad_weight, <real*>buffer.data + thread * size, width,
        )


cdef void backward_weight_units(
    const Grid* grid, const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const int64_t[:, :, ::1] cell,
    const double[:, :, ::1] fraction, int64_t groups, int64_t first_unit, int64_t last_unit,
    real[:, :, ::1] grad_weight, real* buffer, int64_t width,
) noexcept nogil:
    """Units first to last: one unit is a piece (of at most CHANNELS), a tap and a panel of input channels."""
    cdef int64_t c_out = gradient.shape[3], inputs = grid.channels // groups, taps = cell.shape[1]
    cdef int64_t pixels = gradient.shape[0] * gradient.shape[1] * gradient.shape[2]
    cdef int64_t panels = ceil_div(inputs, width), unit, block, start, first, last, channel, k, panel
    cdef int64_t tile = tile_rows(&grad_weight[0, 0, 0])
    cdef real* samples = buffer
    cdef real* packed = buffer + LONG_BLOCK * width
    cdef const real* source = &image[0, 0, 0, 0]
    cdef Piece piece
    cdef Tap tap
    memset(samples, 0, LONG_BLOCK * width * sizeof(real))
    for block in range(ceil_div(pixels, LONG_BLOCK)):
        first = block * LONG_BLOCK
        last = min(first + LONG_BLOCK, pixels)
        channel = start = 0  # start: first unit of the piece
        while channel < c_out and start < last_unit:
            piece = piece_at(channel, channel + CHANNELS, c_out // groups, c_out // cell.shape[0])
            if start + taps * panels > first_unit:
                pack_transposed(&gradient[0, 0, 0, 0], c_out, first, last, piece, packed, tile)
                for unit in range(max(first_unit, start), min(last_unit, start + taps * panels)):
                    k, panel = (unit - start) // panels, (unit - start) % panels
                    tap = tap_at(cell, fraction, piece.positions, k)
                    sample(
                        grid, &tap, source, piece.group * inputs + panel * width, min(width, inputs - panel * width),
                        first, last, samples, width,
                    )
                    multiply_transposed(
                        piece.last - piece.first, min(width, inputs - panel * width), last - first, packed, samples,
                        &grad_weight[piece.first, k, panel * width], taps * inputs, first > 0,
                    )
            start += taps * panels
            channel = piece.last
