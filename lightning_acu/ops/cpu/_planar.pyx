# distutils: language = c
"""Active convolution of few channels, on planes: the forward pass.

A panel of outputs is interpolated at every tap of every channel and multiplied by the weights of all output channels.
Images may have any strides. The layout is that of `_planar.pxd`; pieces are those of `_packing.pxd`. Work is cut by
geometry alone and no two threads add to the same number.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t

from ._packing cimport Piece, ceil_div, piece_at, transpose_f32
from ._planar cimport (
    Band, Neighbours, Planes, band_at, bands, copy_row, load_planes, neighbours_of, planes_of,
)
from ._vectors cimport Buffer, lanes, multiply_moved, multiply_transposed, real, sample_panel, tile_rows


def reach(const int64_t[:, :, ::1] cell):
    """The largest distance in pixels, along an axis, of a neighbour of a tap from `output * stride`; cell (P, K, 2)."""
    cdef int64_t p, k, axis, found = 0
    for p in range(cell.shape[0]):
        for k in range(cell.shape[1]):
            for axis in range(2):
                found = max(found, max(-cell[p, k, axis], cell[p, k, axis] + 1))
    return found


def forward(
    const real[:, :, :, :] image, const real[:, :, ::1] weight, const real[::1] bias, const int64_t[:, :, ::1] cell,
    const double[:, :, ::1] fraction, int64_t groups, stride, real[:, :, :, :] output, int threads,
):
    """output OUT (N, C_out, H_out, W_out).

    image IN (N, C_in, H, W); weight IN (C_out, C_in/groups, K); bias IN (C_out,) or None; cell IN (P, K, 2) and fraction
    IN (P, K, 2): whole and fractional part of the tap positions.
    """
    cdef int width = 2 * lanes(<real*>NULL), tile = tile_rows(<real*>NULL)
    cdef Planes planes = planes_of(image.shape, output.shape, stride, cell, width)
    cdef int64_t c_out = weight.shape[0], depth = weight.shape[1] * weight.shape[2] + 1, job
    cdef int64_t size = image.shape[1] * planes.channel + depth * width + c_out * planes.outputs
    cdef Buffer packed = Buffer((c_out + (groups + cell.shape[0]) * tile) * depth, sizeof(real))
    cdef Buffer places = Buffer(4 * cell.shape[0] * cell.shape[1], sizeof(int64_t))
    cdef Buffer shares = Buffer(4 * cell.shape[0] * cell.shape[1], sizeof(real))
    cdef Buffer terms = Buffer(cell.shape[0] * (cell.shape[1] + 1), sizeof(int))
    cdef Buffer buffer = Buffer(threads * size, sizeof(real))
    pack(weight, bias, groups, cell.shape[0], <real*>packed.data, tile)
    find_terms(&planes, cell, fraction, <int64_t*>places.data, <real*>shares.data, <int*>terms.data)
    for job in prange(bands(&planes), nogil=True, num_threads=threads, schedule="static"):
        forward_band(
            &planes, image, <const real*>packed.data, <const int64_t*>places.data, <const real*>shares.data,
            <const int*>terms.data, groups, cell.shape[0], cell.shape[1], job, output,
            <real*>buffer.data + threadid() * size, width, tile,
        )


cdef void pack(
    const real[:, :, ::1] weight, const real[::1] bias, int64_t groups, int64_t position_groups, real* packed, int tile
):
    """For each piece, tiles of output channels: [C_in/groups * K, then 1 for the bias][channel of the tile]."""
    cdef int64_t c_out = weight.shape[0], depth = weight.shape[1] * weight.shape[2], channel = 0, count, c
    cdef Piece piece
    while channel < c_out:
        piece = piece_at(channel, c_out, c_out // groups, c_out // position_groups)
        while channel < piece.last:
            count = min(tile, piece.last - channel)
            copy_row(count, depth, &weight[channel, 0, 0], depth, 1, packed, 1, tile)
            for c in range(count):
                packed[depth * tile + c] = 0 if bias is None else bias[channel + c]
            packed += (depth + 1) * tile
            channel += count


cdef void find_terms(
    const Planes* planes, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t* places,
    real* shares, int* terms,
):
    """For each tap the neighbours whose share is not 0: no others are read. A position group's numbers of terms (K) are
    followed by whether all its taps are on whole pixels."""
    cdef int64_t p, k, n, count
    cdef bint whole
    cdef Neighbours found
    for p in range(cell.shape[0]):
        whole = True
        for k in range(cell.shape[1]):
            found = neighbours_of(planes, cell[p, k, 0], cell[p, k, 1], fraction[p, k, 0], fraction[p, k, 1])
            count = 0
            for n in range(4):
                if found.share[n] != 0:
                    places[count], shares[count] = found.place[n], <real>found.share[n]
                    count += 1
            whole = whole and count == 1
            terms[0] = <int>count
            places += 4
            shares += 4
            terms += 1
        terms[0] = whole
        terms += 1


cdef void forward_band(
    const Planes* planes, const real[:, :, :, :] image, const real* packed, const int64_t* places, const real* shares,
    const int* terms, int64_t groups, int64_t position_groups, int64_t taps, int64_t number, real[:, :, :, :] output,
    real* buffer, int width, int tile,
) noexcept nogil:
    cdef Band band = band_at(planes, number)
    cdef int64_t c_out = output.shape[1], inputs = image.shape[1] // groups, depth = inputs * taps
    cdef int64_t panel, channel, i, y
    cdef real* panel_of = buffer + image.shape[1] * planes.channel
    cdef real* found = panel_of + (depth + 1) * width
    cdef real* to
    cdef const real* weights
    cdef const real* source
    cdef const int64_t* places_of
    cdef Piece piece
    load_planes(planes, &band, image, buffer)
    for i in range(width):
        panel_of[depth * width + i] = 1  # what the bias is multiplied by
    for panel in range(planes.outputs // width):
        channel = 0
        weights = packed
        while channel < c_out:
            piece = piece_at(channel, c_out, c_out // groups, c_out // position_groups)
            places_of = places + piece.positions * taps * 4
            source = buffer + piece.group * inputs * planes.channel + planes.origin + panel * width
            to = found + channel * planes.outputs + panel * width
            if terms[piece.positions * (taps + 1) + taps]:
                multiply_moved(
                    piece.last - channel, taps, places_of, inputs, planes.channel, source, weights, to, planes.outputs
                )
            else:
                sample_panel(
                    taps, places_of, shares + piece.positions * taps * 4, terms + piece.positions * (taps + 1), inputs,
                    planes.channel, source, panel_of,
                )
                multiply_transposed(
                    piece.last - channel, width, depth + 1, weights, panel_of, to, planes.outputs, 0
                )
            weights += ceil_div(piece.last - channel, tile) * (depth + 1) * tile
            channel = piece.last
    for i in range(band.images):
        for y in range(band.start, min(planes.out_height, band.start + planes.band_rows)):
            copy_row(
                c_out, planes.out_width, found + (i * planes.rows + y - band.start) * planes.pitch, planes.outputs, 1,
                &output[band.first + i, 0, y, 0], output.strides[1] // <int64_t>sizeof(real),
                output.strides[3] // <int64_t>sizeof(real),
            )
