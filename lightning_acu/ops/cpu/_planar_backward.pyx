# distutils: language = c
"""Active convolution of few channels, on planes: the gradients. Names and layout as in `_planar.pxd`.

One input channel at a time: the gradient of its samples at every tap is a product of the weights and the output's
gradient. Moved to the pixels that the samples came from, it is the input's gradient; multiplied by the image's neighbours
of each tap, that of the positions. The weight's gradient multiplies the output's by the samples, interpolated again.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memset

from ._packing cimport Piece, ceil_div, piece_at
from ._planar cimport (
    Band, Neighbours, Planes, band_at, bands, copy_row, load_planes, neighbours_of, planes_of, store_planes,
)
from ._vectors cimport (
    Buffer, all_finite, dot_panels, gather_row, lanes, multiply_transposed, real, sample_row, tile_rows,
)

cdef enum:
    #: Ranges of bands, at most, over which the gradients of weights and positions are summed separately.
    RANGES = 32
    #: Outputs whose samples at all taps stay in the L1 cache: a multiple of every panel.
    CHUNK = 512


cdef struct Task:  # what all bands have in common
    int64_t groups
    int64_t position_groups
    int64_t taps
    int64_t inputs  # channels of a group
    int64_t outputs
    int64_t tiled  # taps, rounded up to whole tiles
    bint want_image
    bint want_weight
    bint want_cell
    int width
    int tile
    const int64_t* places  # of the 4 neighbours of all taps
    const int64_t* gather  # terms of the input's gradient: for each position group and phase, 4 K places
    const int64_t* gathered  # how many there are


def backward(
    const real[:, :, :, :] gradient, const real[:, :, :, :] image, const real[:, :, ::1] weight,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t groups, stride,
    real[:, :, :, :] grad_image, real[:, :, ::1] grad_weight, double[:, :, ::1] grad_cell, int threads,
):
    """Gradients; whether all numbers read are finite. If not, nothing that was written is of use.

    gradient IN (N, C_out, H_out, W_out); image IN (N, C_in, H, W); weight IN (C_out, C_in/groups, K); cell and fraction IN
    (P, K, 2). grad_image OUT (N, C_in, H, W), grad_weight OUT (C_out, C_in/groups, K), grad_cell INOUT (P, K, 2), added
    to; None: not computed.
    """
    cdef Task task
    cdef int width = 2 * lanes(<real*>NULL), tile = tile_rows(<real*>NULL)
    cdef Planes planes = planes_of(image.shape, gradient.shape, stride, cell, width)
    cdef int64_t c_in = image.shape[1], c_out = weight.shape[0], taps = cell.shape[1], count = bands(&planes), job, i
    cdef int64_t ranges = min(count, RANGES), weights = weight.shape[0] * weight.shape[1] * taps
    cdef int64_t phases = planes.stride_y * planes.stride_x, margin_panels = planes.out_margin // width
    cdef bint finite = weights == 0 or all_finite(weights, &weight[0, 0, 0])
    task.groups, task.position_groups, task.taps = groups, cell.shape[0], taps
    task.inputs, task.outputs = c_in // groups, c_out // groups
    task.width, task.tile, task.tiled = width, tile, ceil_div(taps, tile) * tile
    task.want_image, task.want_weight = grad_image is not None, grad_weight is not None
    task.want_cell = grad_cell is not None
    cdef int64_t size = (
        2 * c_in * planes.channel + (c_out + taps) * planes.out_margin + taps * CHUNK
    )
    cdef Buffer packed = Buffer(c_in * task.tiled * task.outputs, sizeof(real))
    cdef Buffer places = Buffer(4 * cell.shape[0] * taps, sizeof(int64_t))
    cdef Buffer shares = Buffer(4 * cell.shape[0] * taps, sizeof(real))
    cdef Buffer gather = Buffer(4 * cell.shape[0] * phases * taps, sizeof(int64_t))
    cdef Buffer gather_shares = Buffer(4 * cell.shape[0] * phases * taps, sizeof(real))
    cdef Buffer gathered = Buffer(cell.shape[0] * phases, sizeof(int64_t))
    cdef Buffer weight_sums = Buffer(ranges * weights if task.want_weight else 0, sizeof(real))
    cdef Buffer cell_sums = Buffer(ranges * cell.shape[0] * taps * 4, sizeof(double))
    cdef Buffer finite_ranges = Buffer(ranges, sizeof(int64_t))
    cdef Buffer buffer = Buffer(threads * size, sizeof(real))
    cdef real* sums = <real*>weight_sums.data
    cdef real* total
    task.places, task.gather = <const int64_t*>places.data, <const int64_t*>gather.data
    task.gathered = <const int64_t*>gathered.data
    if task.want_weight:
        memset(weight_sums.data, 0, ranges * weights * sizeof(real))
    memset(cell_sums.data, 0, ranges * cell.shape[0] * taps * 4 * sizeof(double))
    pack(weight, groups, <real*>packed.data, tile, task.tiled)
    find_places(
        &planes, cell, fraction, <int64_t*>places.data, <real*>shares.data, <int64_t*>gather.data,
        <real*>gather_shares.data, <int64_t*>gathered.data,
    )
    for job in prange(ranges, nogil=True, num_threads=threads, schedule="static"):
        (<int64_t*>finite_ranges.data)[job] = backward_range(
            &planes, &task, gradient, image, <const real*>packed.data, <const real*>shares.data,
            <const real*>gather_shares.data, count * job // ranges, count * (job + 1) // ranges, grad_image,
            sums + job * weights, <double*>cell_sums.data + job * cell.shape[0] * taps * 4,
            <real*>buffer.data + threadid() * size,
        )
    for job in range(ranges):
        finite = finite and (<int64_t*>finite_ranges.data)[job]
    if not finite:
        return False
    if task.want_weight and weights:
        total = &grad_weight[0, 0, 0]
        with nogil:
            memset(total, 0, weights * sizeof(real))
            for job in range(ranges):
                for i in range(weights):
                    total[i] += sums[job * weights + i]
    if task.want_cell:
        positions_from_sums(<const double*>cell_sums.data, ranges, fraction, grad_cell)
    return True


cdef void pack(const real[:, :, ::1] weight, int64_t groups, real* packed, int tile, int64_t tiled):
    """For each input channel and output channel of its group, in tiles of taps: [tile][output channel][tap of the tile];
    the pieces of a group follow each other, each with all its tiles."""
    cdef int64_t inputs = weight.shape[1], outputs = weight.shape[0] // groups, taps = weight.shape[2], ci, k
    cdef int64_t first, count
    for ci in range(inputs * groups):
        for first in range(tiled // tile):
            k = first * tile
            count = min(tile, taps - k)
            copy_row(
                outputs, count, &weight[ci // inputs * outputs, ci % inputs, k], inputs * taps, 1,
                packed + ci * tiled * outputs + k * outputs, tile, 1,
            )


cdef void find_places(
    const Planes* planes, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t* places,
    real* shares, int64_t* gather, real* gather_shares, int64_t* gathered,
):
    """Where the neighbours of each tap are; and, for each position group and phase, the taps that have one in the phase,
    as places in the gradients of the samples (K, margin), seen from a pixel of the phase."""
    cdef int64_t p, k, n, phase, count, taps = cell.shape[1], phases = planes.stride_y * planes.stride_x
    cdef Neighbours found
    for p in range(cell.shape[0]):
        for phase in range(phases):
            count = 0
            for k in range(taps):
                found = neighbours_of(planes, cell[p, k, 0], cell[p, k, 1], fraction[p, k, 0], fraction[p, k, 1])
                for n in range(4):
                    places[(p * taps + k) * 4 + n] = found.place[n]
                    shares[(p * taps + k) * 4 + n] = <real>found.share[n]
                    if found.share[n] == 0 or found.phase[n] != phase:
                        continue
                    gather[((p * phases + phase) * taps) * 4 + count] = (
                        k * planes.out_margin - (found.place[n] - phase * planes.phase)
                    )
                    gather_shares[((p * phases + phase) * taps) * 4 + count] = <real>found.share[n]
                    count += 1
            gathered[p * phases + phase] = count


cdef void positions_from_sums(
    const double* sums, int64_t ranges, const double[:, :, ::1] fraction, double[:, :, ::1] grad_cell
):
    """grad_cell (P, K, 2) += from sums[range, P, K, neighbour]: the gradient of the share of each neighbour."""
    cdef int64_t i, p, k
    cdef double fy, fx
    for i in range(ranges):
        for p in range(fraction.shape[0]):
            for k in range(fraction.shape[1]):
                fy, fx = fraction[p, k, 0], fraction[p, k, 1]
                grad_cell[p, k, 0] += (1 - fx) * (sums[2] - sums[0]) + fx * (sums[3] - sums[1])
                grad_cell[p, k, 1] += (1 - fy) * (sums[1] - sums[0]) + fy * (sums[3] - sums[2])
                sums += 4


cdef bint backward_range(
    const Planes* planes, const Task* task, const real[:, :, :, :] gradient, const real[:, :, :, :] image,
    const real* packed, const real* shares, const real* gather_shares, int64_t first, int64_t last,
    real[:, :, :, :] grad_image, real* weight_sums, double* cell_sums, real* buffer,
) noexcept nogil:
    """Bands first to last. Returns whether image and gradient are finite there."""
    cdef int64_t number
    for number in range(first, last):
        if not backward_band(
            planes, task, gradient, image, packed, shares, gather_shares, number, grad_image, weight_sums, cell_sums,
            buffer,
        ):
            return False
    return True


cdef void load_gradient(
    const Planes* planes, const Band* band, const real[:, :, :, :] gradient, real* to, int64_t width
) noexcept nogil:
    """A band of gradient (N, C_out, H_out, W_out), with a margin: to[panel][channel][output of the panel]."""
    cdef int64_t i, y, x, place, columns, channels = gradient.shape[1]
    cdef int64_t step_x = gradient.strides[3] // <int64_t>sizeof(real)
    cdef int64_t step_c = gradient.strides[1] // <int64_t>sizeof(real)
    memset(to, 0, channels * planes.out_margin * sizeof(real))
    for i in range(band.images):
        for y in range(
            max(0, band.start - planes.below), min(planes.out_height, band.start + planes.band_rows + planes.above)
        ):
            place = planes.out_origin + (i * planes.rows + y - band.start) * planes.pitch
            x = 0
            while x < planes.out_width:
                columns = min(width - place % width, planes.out_width - x)
                copy_row(
                    channels, columns, &gradient[band.first + i, 0, y, x], step_c, step_x,
                    to + place // width * channels * width + place % width, width, 1,
                )
                place += columns
                x += columns


cdef bint backward_band(
    const Planes* planes, const Task* task, const real[:, :, :, :] gradient, const real[:, :, :, :] image,
    const real* packed, const real* shares, const real* gather_shares, int64_t number, real[:, :, :, :] grad_image,
    real* weight_sums, double* cell_sums, real* buffer,
) noexcept nogil:
    cdef Band band = band_at(planes, number)
    cdef int64_t c_in = image.shape[1], c_out = gradient.shape[1], taps = task.taps, inputs = task.inputs
    cdef int64_t outputs = task.outputs, phases = planes.stride_y * planes.stride_x, margin = planes.out_margin
    cdef int64_t ci, channel, phase, group, at
    cdef int width = task.width
    cdef real* grad_planes = buffer + c_in * planes.channel
    cdef real* grads = grad_planes + c_in * planes.channel
    cdef real* of_samples = grads + c_out * margin
    cdef real* samples = of_samples + taps * margin
    cdef const real* weights
    cdef Piece piece
    load_gradient(planes, &band, gradient, grads, width)
    if not all_finite(c_out * margin, grads):
        return False
    if task.want_weight or task.want_cell:
        load_planes(planes, &band, image, buffer)
        if not all_finite(c_in * planes.channel, buffer):
            return False
    if task.want_image:
        memset(grad_planes, 0, c_in * planes.channel * sizeof(real))
    for ci in range(c_in):
        group = ci // inputs
        channel = group * outputs
        weights = packed + ci * task.tiled * outputs
        while channel < (group + 1) * outputs:
            piece = piece_at(channel, (group + 1) * outputs, outputs, c_out // task.position_groups)
            at = piece.positions * taps * 4
            if task.want_image or task.want_cell:
                gradients_of_samples(
                    task, margin, weights + (channel - group * outputs) * task.tile, outputs, piece,
                    grads, c_out, of_samples,
                )
            if task.want_weight or task.want_cell:
                sums_of_run(
                    planes, task, &piece, buffer + ci * planes.channel + planes.origin,
                    of_samples + planes.out_origin, grads + planes.out_origin * c_out + channel * width, c_out,
                    shares + at, samples, weight_sums + (channel * inputs + ci - group * inputs) * taps, cell_sums + at,
                )
            if task.want_image:
                for phase in range(phases):
                    at = (piece.positions * phases + phase) * taps * 4
                    gather_row(
                        planes.outputs, task.gathered[piece.positions * phases + phase], task.gather + at,
                        gather_shares + at, of_samples + planes.out_origin,
                        grad_planes + ci * planes.channel + phase * planes.phase + planes.origin,
                    )
            channel = piece.last
    if task.want_image:
        store_planes(planes, &band, grad_planes, grad_image)
    return True


cdef void sums_of_run(
    const Planes* planes, const Task* task, const Piece* piece, const real* image, const real* of_samples,
    const real* grads, int64_t channels, const real* shares, real* samples, real* weight_sums, double* cell_sums,
) noexcept nogil:
    """Adds to the gradients of weights and positions that belong to a piece and one input channel."""
    cdef int64_t count = planes.stacked * planes.band_rows * planes.pitch  # outputs that belong to the band
    cdef int64_t start = 0, size, k
    while start < count:
        size = min(CHUNK, count - start)
        for k in range(task.taps):
            sample_row(
                size, task.places + (piece.positions * task.taps + k) * 4, shares + 4 * k, image + start,
                samples + k * CHUNK if task.want_weight else <real*>NULL,
                of_samples + k * planes.out_margin + start if task.want_cell else <const real*>NULL, cell_sums + 4 * k,
            )
        if task.want_weight:
            dot_panels(
                task.taps, piece.last - piece.first, ceil_div(size, task.width), samples, CHUNK,
                grads + start * channels, channels * task.width, weight_sums, 1, task.inputs * task.taps,
            )
        start += CHUNK


cdef void gradients_of_samples(
    const Task* task, int64_t margin, const real* weights, int64_t outputs, Piece piece, const real* grads,
    int64_t channels, real* to,
) noexcept nogil:
    """to (K, margin): the product of a piece's weights, those of one input channel, and the gradient of its outputs."""
    cdef int64_t panel, first, k
    for panel in range(margin // task.width):
        for first in range(ceil_div(task.taps, task.tile)):
            k = first * task.tile
            multiply_transposed(
                min(task.tile, task.taps - k), task.width, piece.last - piece.first, weights + k * outputs,
                grads + (panel * channels + piece.first) * task.width, to + k * margin + panel * task.width, margin, 0,
            )
