# distutils: language = c
"""Active convolution as a matrix product over interpolated taps, on channels_last images.

A block of output pixels is interpolated at every tap into a buffer that stays in the cache and is multiplied there by
the packed weight. Work is cut by geometry alone and no two threads add to the same number, so results do not depend on
the number of threads. Arrays are allocated and checked by the caller (`backend.py`).

Names: N images, K taps, P position groups; a *piece* is a run of output channels that share one convolution group and
one position group; a *panel* is WIDTH = 2 * lanes columns of a packed matrix, the last one of a run filled with zeros.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from ._packing cimport Piece, ceil_div, pack_input_panel, pack_output_panel, piece_at
from ._sampling cimport Grid, Tap, grid_of, sample, spread, tap_at
from ._vectors cimport DEPTH, DEPTH_STRIDE, Buffer, lanes, multiply_rows, real

cdef enum:
    #: Output pixels of a block: a multiple of every tile's height. A thread's buffer is as large as they need.
    BLOCK = 96
    #: Ranges of images, at most, over which the gradient of positions is summed separately: work for threads.
    RANGES = 32


cdef void pack_for_output(
    const real[:, :, :] weight, int64_t groups, int64_t position_groups, real* packed, int threads, int width
):
    """weight (C_out, C_in/groups, K) to packed: for each piece and panel, (K * C_in/groups, WIDTH)."""
    cdef int64_t c_out = weight.shape[0], depth = weight.shape[1] * weight.shape[2], channel = 0, panel
    cdef Piece piece
    while channel < c_out:
        piece = piece_at(channel, c_out, c_out // groups, c_out // position_groups)
        for panel in prange(ceil_div(piece.last - channel, width), nogil=True, num_threads=threads):
            pack_output_panel(
                weight, piece.first + panel * width, min(piece.first + (panel + 1) * width, piece.last),
                packed + panel * depth * width, width,
            )
        packed += ceil_div(piece.last - channel, width) * depth * width
        channel = piece.last


cdef void pack_for_input(const real[:, :, :] weight, int64_t groups, real* packed, int threads, int width):
    """weight (C_out, C_in/groups, K) to packed: for each group and panel of its inputs, (K, C_out/groups, WIDTH)."""
    cdef int64_t panels = ceil_div(weight.shape[1], width), job
    for job in prange(groups * panels, nogil=True, num_threads=threads):
        pack_input_panel(weight, groups, job // panels, job % panels * width, packed, width)


def forward(
    const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias, const int64_t[:, :, ::1] cell,
    const double[:, :, ::1] fraction, int64_t groups, stride, real[:, :, :, ::1] output, int threads,
):
    """output OUT (N, H_out, W_out, C_out).

    image IN (N, H, W, C_in); weight IN (C_out, C_in/groups, K), any strides; bias IN (C_out,) or None; cell IN
    (P, K, 2) and fraction IN (P, K, 2): whole and fractional part of the tap positions.
    """
    cdef Grid grid = grid_of(image.shape, output.shape, stride)
    cdef int64_t pixels = output.shape[0] * output.shape[1] * output.shape[2], c_out = output.shape[3]
    cdef int64_t pieces = groups + cell.shape[0], blocks = ceil_div(pixels, BLOCK), slices = 1, job
    cdef int width = 2 * lanes(<real*>NULL)
    cdef Buffer packed = Buffer(
        (c_out + pieces * width) * weight.shape[1] * weight.shape[2], sizeof(real)
    )
    cdef Buffer buffer = Buffer(threads * BLOCK * DEPTH_STRIDE, sizeof(real))
    pack_for_output(weight, groups, cell.shape[0], <real*>packed.data, threads, width)
    if blocks < threads:  # too few pixels for all threads: they share the output channels as well
        slices = max(1, min(ceil_div(threads, max(blocks, 1)), ceil_div(c_out, width)))
    else:  # as many pixels for each thread
        blocks = ceil_div(blocks, threads) * threads
    for job in prange(blocks * slices, nogil=True, num_threads=threads, schedule="static"):
        forward_block(
            &grid, image, <const real*>packed.data, bias, cell, fraction, groups, pixels * (job // slices) // blocks,
            pixels * (job // slices + 1) // blocks, job % slices, slices, output,
            <real*>buffer.data + threadid() * BLOCK * DEPTH_STRIDE, width,
        )


cdef void forward_block(
    const Grid* grid, const real[:, :, :, ::1] image, const real* packed, const real[::1] bias,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t groups, int64_t first, int64_t last,
    int64_t part, int64_t parts, real[:, :, :, ::1] output, real* buffer, int64_t width,
) noexcept nogil:
    """Output pixels first to last and, of every piece, one of `parts` equal shares of its panels."""
    cdef int64_t c_out = output.shape[3], inputs = grid.channels // groups, depth = inputs * cell.shape[1]
    cdef int64_t channel = 0, offset = 0, panels, start, columns, q, end, at, k, count
    cdef const real* source = &image[0, 0, 0, 0]
    cdef real* to = &output[0, 0, 0, 0] + first * c_out
    cdef Piece piece
    cdef Tap tap
    while channel < c_out:
        piece = piece_at(channel, c_out, c_out // groups, c_out // cell.shape[0])
        panels = ceil_div(piece.last - channel, width)
        start = panels * part // parts * width
        columns = min(panels * (part + 1) // parts * width, piece.last - channel) - start
        q = 0 if columns > 0 else depth
        while q < depth:
            end = min(q + DEPTH, depth)
            at = q
            while at < end:
                k = at // inputs
                count = min((k + 1) * inputs, end) - at
                tap = tap_at(cell, fraction, piece.positions, k)
                sample(
                    grid, &tap, source, piece.group * inputs + at - k * inputs, count, first, last, buffer + at - q,
                    DEPTH_STRIDE,
                )
                at += count
            multiply_rows(
                last - first, columns, end - q, buffer, packed + offset + start * depth + q * width, depth * width,
                to + channel + start, c_out, <const real*>NULL if bias is None or q else &bias[channel + start], q > 0,
            )
            q = end
        offset += panels * depth * width
        channel = piece.last


def backward_image(
    const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const real[:, :, :] weight,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t groups, stride,
    real[:, :, :, ::1] grad_image, double[:, :, ::1] grad_cell, int threads,
):
    """The gradients of image and positions, from that of the samples: the adjoint of interpolation.

    gradient IN (N, H_out, W_out, C_out); grad_image INOUT (N, H, W, C_in), zeros on entry; grad_cell INOUT (P, K, 2),
    added to. Either of the last two may be None: it is not computed then.
    """
    cdef Grid grid = grid_of(image.shape, gradient.shape, stride)
    cdef int width = 2 * lanes(<real*>NULL)
    cdef int64_t per_group = weight.shape[0] // groups, panels = groups * ceil_div(weight.shape[1], width)
    cdef int64_t images = image.shape[0], ranges = min(images, RANGES), parts = 1, job
    cdef int64_t positions = cell.shape[0] // groups + 2, sums_size = positions * cell.shape[1] * 4
    cdef int64_t size = width + BLOCK * (width + ceil_div(per_group, DEPTH) * DEPTH_STRIDE)
    cdef Buffer packed = Buffer(panels * weight.shape[2] * per_group * width, sizeof(real))
    cdef Buffer buffer = Buffer(threads * size, sizeof(real))
    cdef Buffer sums = Buffer(0 if grad_cell is None else ranges * panels * sums_size, sizeof(double))
    if grad_cell is not None:
        memset(sums.data, 0, ranges * panels * sums_size * sizeof(double))
    pack_for_input(weight, groups, <real*>packed.data, threads, width)
    if ranges < 4 * threads:
        parts = min(panels, ceil_div(4 * threads, max(ranges, 1)))
    for job in prange(ranges * parts, nogil=True, num_threads=threads, schedule="static"):
        backward_image_range(
            &grid, gradient, image, <const real*>packed.data, cell, fraction, groups,
            images * (job // parts) // ranges, images * (job // parts + 1) // ranges,
            panels * (job % parts) // parts, panels * (job % parts + 1) // parts, grad_image,
            NULL if grad_cell is None else <double*>sums.data + job // parts * panels * sums_size, sums_size,
            <real*>buffer.data + threadid() * size, width,
        )
    if grad_cell is not None:
        with nogil:
            positions_from_sums(<double*>sums.data, ranges, panels, sums_size, groups, fraction, grad_cell)


cdef inline int64_t first_position(int64_t group, int64_t groups, int64_t position_groups) noexcept nogil:
    """The first position group that a convolution group touches."""
    return group * position_groups // groups


cdef void positions_from_sums(
    const double* sums, int64_t ranges, int64_t panels, int64_t size, int64_t groups, const double[:, :, ::1] fraction,
    double[:, :, ::1] grad_cell,
) noexcept nogil:
    """grad_cell (P, K, 2) += from sums[range of images, panel, position of the panel's group, K, row of the cell,
    (gradient of the row's share, gradient along the row)]."""
    cdef int64_t i, p, k, first, position_groups = fraction.shape[0], taps = fraction.shape[1]
    cdef const double* found
    cdef double fy
    for i in range(ranges * panels):
        first = first_position(i % panels // (panels // groups), groups, position_groups)
        for p in range(first, min(first + size // (taps * 4), position_groups)):
            for k in range(taps):
                found = sums + i * size + ((p - first) * taps + k) * 4
                fy = fraction[p, k, 0]
                grad_cell[p, k, 0] += found[2] - found[0]
                grad_cell[p, k, 1] += (1 - fy) * found[1] + fy * found[3]


cdef void backward_image_range(
    const Grid* grid, const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const real* packed,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t groups, int64_t first, int64_t last,
    int64_t first_panel, int64_t last_panel, real[:, :, :, ::1] grad_image, double* sums, int64_t sums_size,
    real* buffer, int64_t width,
) noexcept nogil:
    cdef int64_t number
    for number in range(first, last):
        backward_image_block(
            grid, gradient, image, packed, cell, fraction, groups, number, first_panel, last_panel, grad_image, sums,
            sums_size, buffer, width,
        )


cdef void backward_image_block(
    const Grid* grid, const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const real* packed,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t groups, int64_t number,
    int64_t first_panel, int64_t last_panel, real[:, :, :, ::1] grad_image, double* sums, int64_t sums_size,
    real* buffer, int64_t width,
) noexcept nogil:
    """One image, panels (counted through all groups) first to last."""
    cdef int64_t c_out = gradient.shape[3], inputs = grid.channels // groups, outputs = c_out // groups
    cdef int64_t panels = ceil_div(inputs, width), pixels = grid.out_height * grid.out_width, taps = cell.shape[1]
    cdef int64_t group, panel, channel, first, last, pixel, q, k, start, columns, block, part, parts
    cdef real* zeros = buffer
    cdef real* samples = buffer + width
    cdef real* rows = samples + BLOCK * width
    cdef const real* source = <const real*>NULL if sums == NULL else &image[0, 0, 0, 0]
    cdef real* target = NULL if grad_image is None else &grad_image[0, 0, 0, 0]
    cdef const real* grads = &gradient[0, 0, 0, 0] + number * pixels * c_out
    cdef const real* weights
    cdef Piece piece
    cdef Tap tap
    memset(zeros, 0, width * sizeof(real))
    for block in range(ceil_div(pixels, BLOCK)):
        first = block * BLOCK
        last = min(first + BLOCK, pixels)
        for group in range(first_panel // panels, ceil_div(last_panel, panels)):
            channel = group * outputs
            while channel < (group + 1) * outputs:
                piece = piece_at(channel, (group + 1) * outputs, outputs, c_out // cell.shape[0])
                parts = ceil_div(piece.last - channel, DEPTH)
                for part in range(parts):
                    q = channel + part * DEPTH
                    for pixel in range(first, last):
                        memcpy(
                            rows + (part * BLOCK + pixel - first) * DEPTH_STRIDE, grads + pixel * c_out + q,
                            min(DEPTH, piece.last - q) * sizeof(real),
                        )
                for panel in range(max(first_panel, group * panels), min(last_panel, (group + 1) * panels)):
                    start = (panel - group * panels) * width
                    columns = min(width, inputs - start)
                    for k in range(taps):
                        tap = tap_at(cell, fraction, piece.positions, k)
                        weights = packed + ((panel * taps + k) * outputs + channel - group * outputs) * width
                        for part in range(parts):
                            multiply_rows(
                                last - first, columns, min(DEPTH, piece.last - channel - part * DEPTH),
                                rows + part * BLOCK * DEPTH_STRIDE, weights + part * DEPTH * width, 0, samples, width,
                                <const real*>NULL, part > 0,
                            )
                        spread(
                            grid, &tap, target, source, group * inputs + start, columns, number * pixels + first,
                            number * pixels + last, samples, width, zeros,
                            NULL if sums == NULL else sums + panel * sums_size + (
                                (piece.positions - first_position(group, groups, cell.shape[0])) * taps + k
                            ) * 4,
                        )
                channel = piece.last
