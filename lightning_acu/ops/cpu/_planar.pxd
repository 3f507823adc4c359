"""Planes: the layout of the planar route, in which vectors run along the pixels of rows.

Each channel of a band of the image is one long row: rows of pixels follow each other at a distance of `pitch` with zeros
between them, and so do the images of a band. The zeros are as wide as any tap reaches, so that "the image, moved by so
many pixels" is the same array from another element on, for all pixels and images at once. With a stride, pixels that agree
modulo the stride form a plane of their own (a phase), in which outputs are next to each other again.

Names: a *place* is an element of a channel's planes, seen from an output pixel; a *panel* is WIDTH = 2 * lanes outputs.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from ._packing cimport transpose_f32
from ._vectors cimport real

cdef enum:
    #: Outputs of a band, about: so many that what is done once for a band costs little, and its planes stay in the cache.
    BAND = 1536
    #: Bands to cut small batches into, as long as a band keeps a quarter of that: work for threads.
    BANDS = 8


cdef inline int64_t floor_div(int64_t a, int64_t b) noexcept nogil:
    return a // b if a >= 0 else -((b - 1 - a) // b)


cdef struct Planes:
    int64_t images
    int64_t height  # of the image
    int64_t width
    int64_t out_height
    int64_t out_width
    int64_t stride_y
    int64_t stride_x
    int64_t phase_rows  # of the highest phase
    int64_t above  # rows and columns that taps reach beyond an output pixel, in pixels of a phase
    int64_t below
    int64_t left
    int64_t right
    int64_t pitch  # from row to row, and from image to image of a band in rows
    int64_t rows
    int64_t stacked  # images of a band
    int64_t band_rows  # rows of a band: those of whole images, or some of one image
    int64_t bands_of_image
    int64_t origin  # of the first output pixel in a phase
    int64_t phase  # elements of a phase, of all phases of a channel
    int64_t channel
    int64_t out_origin  # of the first output pixel in arrays of outputs with a margin, a multiple of a panel
    int64_t out_margin  # length of such an array
    int64_t outputs  # length of an array of outputs without


cdef inline int64_t round_up(int64_t count, int64_t unit) noexcept nogil:
    return (count + unit - 1) // unit * unit


cdef inline Planes planes_of(image_shape, out_shape, stride, const int64_t[:, :, ::1] cell, int64_t width):
    """image_shape (N, C, H, W), out_shape (N, C, H_out, W_out); `width` of a panel."""
    cdef Planes planes
    cdef int64_t p, k, highest = cell[0, 0, 0], lowest = cell[0, 0, 0], first = cell[0, 0, 1], last = cell[0, 0, 1]
    cdef int64_t phase_columns, band
    for p in range(cell.shape[0]):
        for k in range(cell.shape[1]):
            lowest, highest = min(lowest, cell[p, k, 0]), max(highest, cell[p, k, 0])
            first, last = min(first, cell[p, k, 1]), max(last, cell[p, k, 1])
    planes.images, planes.height, planes.width = image_shape[0], image_shape[2], image_shape[3]
    planes.out_height, planes.out_width = out_shape[2], out_shape[3]
    planes.stride_y, planes.stride_x = stride[0], stride[1]
    planes.phase_rows = (planes.height + planes.stride_y - 1) // planes.stride_y
    phase_columns = (planes.width + planes.stride_x - 1) // planes.stride_x
    planes.above, planes.below = max(0, -floor_div(lowest, stride[0])), max(0, floor_div(highest + 1, stride[0]))
    planes.left, planes.right = max(0, -floor_div(first, stride[1])), max(0, floor_div(last + 1, stride[1]))
    # What a tap reads beyond an image lies between it and the next one; the same for rows.
    planes.pitch = max(planes.out_width + planes.right, phase_columns + planes.left)
    planes.rows = max(planes.out_height + planes.below, planes.phase_rows + planes.above)
    band = min(BAND, max(BAND // 4, planes.images * planes.rows * planes.pitch // BANDS))
    planes.stacked = max(1, min(planes.images, band // (planes.rows * planes.pitch)))
    planes.band_rows = planes.rows
    planes.bands_of_image = 1
    if planes.rows * planes.pitch > 2 * band:  # a band has to be higher than what its neighbours share with it
        planes.band_rows = max((band + planes.pitch - 1) // planes.pitch, 3 * (planes.above + planes.below))
        planes.bands_of_image = max(1, max(planes.out_height, planes.phase_rows) // planes.band_rows)
        planes.band_rows = (
            max(planes.out_height, planes.phase_rows) + planes.bands_of_image - 1
        ) // planes.bands_of_image
        if planes.bands_of_image == 1:
            planes.band_rows = planes.rows
    planes.outputs = round_up(planes.stacked * planes.band_rows * planes.pitch, width)
    planes.origin = planes.above * planes.pitch + planes.left
    planes.phase = round_up(
        planes.origin + planes.outputs + planes.below * planes.pitch + planes.right + width, width
    )
    planes.channel = planes.phase * planes.stride_y * planes.stride_x
    planes.out_origin = round_up(planes.below * planes.pitch + planes.right, width)
    planes.out_margin = planes.out_origin + planes.outputs + round_up(
        planes.above * planes.pitch + planes.left + 2 * width, width
    )
    return planes


cdef inline int64_t bands(const Planes* planes) noexcept nogil:
    """The number of bands of the batch."""
    return (planes.images + planes.stacked - 1) // planes.stacked * planes.bands_of_image


cdef struct Band:
    int64_t first  # image
    int64_t images
    int64_t start  # row, of outputs and of phases


cdef inline Band band_at(const Planes* planes, int64_t number) noexcept nogil:
    cdef Band band
    band.first = number // planes.bands_of_image * planes.stacked
    band.images = min(planes.stacked, planes.images - band.first)
    band.start = number % planes.bands_of_image * planes.band_rows
    return band


cdef inline void copy_row(
    int64_t channels, int64_t columns, const real* source, int64_t source_channel, int64_t source_column, real* to,
    int64_t to_channel, int64_t to_column,
) noexcept nogil:
    """to[c, x] = source[c, x], with those steps from channel to channel and from column to column."""
    cdef int64_t c, x
    if source_column == 1 and to_column == 1:
        for c in range(channels):
            memcpy(to + c * to_channel, source + c * source_channel, columns * sizeof(real))
    elif real is float and source_channel == 1 and to_column == 1:
        transpose_f32(columns, channels, source, source_column, to, to_channel)
    elif real is float and source_column == 1 and to_channel == 1:
        transpose_f32(channels, columns, source, source_channel, to, to_column)
    elif source_channel == 1 or to_channel == 1:
        for x in range(columns):
            for c in range(channels):
                to[c * to_channel + x * to_column] = source[c * source_channel + x * source_column]
    else:
        for c in range(channels):
            for x in range(columns):
                to[c * to_channel + x * to_column] = source[c * source_channel + x * source_column]


cdef inline void load_planes(
    const Planes* planes, const Band* band, const real[:, :, :, :] image, real* to
) noexcept nogil:
    """A band of image (N, C, H, W) to the planes of all channels, with what lies within reach of its taps."""
    cdef int64_t i, phase, y, row, column, channels = image.shape[1]
    cdef int64_t step_x = image.strides[3] // <int64_t>sizeof(real), step_c = image.strides[1] // <int64_t>sizeof(real)
    memset(to, 0, channels * planes.channel * sizeof(real))
    for i in range(band.images):
        for phase in range(planes.stride_y * planes.stride_x):
            column = phase % planes.stride_x
            for y in range(
                max(0, band.start - planes.above), min(planes.phase_rows, band.start + planes.band_rows + planes.below)
            ):
                row = y * planes.stride_y + phase // planes.stride_x
                if row >= planes.height or column >= planes.width:
                    continue
                copy_row(
                    channels, (planes.width - column + planes.stride_x - 1) // planes.stride_x,
                    &image[band.first + i, 0, row, column], step_c, step_x * planes.stride_x,
                    to + phase * planes.phase + planes.origin + (i * planes.rows + y - band.start) * planes.pitch,
                    planes.channel, 1,
                )


cdef inline void store_planes(
    const Planes* planes, const Band* band, const real* source, real[:, :, :, :] image
) noexcept nogil:
    """The pixels of the band from the planes of all channels to image (N, C, H, W)."""
    cdef int64_t i, phase, y, row, column, channels = image.shape[1]
    cdef int64_t step_x = image.strides[3] // <int64_t>sizeof(real), step_c = image.strides[1] // <int64_t>sizeof(real)
    for i in range(band.images):
        for phase in range(planes.stride_y * planes.stride_x):
            column = phase % planes.stride_x
            for y in range(band.start, min(planes.phase_rows, band.start + planes.band_rows)):
                row = y * planes.stride_y + phase // planes.stride_x
                if row >= planes.height or column >= planes.width:
                    continue
                copy_row(
                    channels, (planes.width - column + planes.stride_x - 1) // planes.stride_x,
                    source + phase * planes.phase + planes.origin + (i * planes.rows + y - band.start) * planes.pitch,
                    planes.channel, 1, &image[band.first + i, 0, row, column], step_c, step_x * planes.stride_x,
                )


cdef struct Neighbours:  # of a tap
    int64_t place[4]
    int64_t phase[4]
    double share[4]


cdef inline Neighbours neighbours_of(
    const Planes* planes, int64_t row, int64_t column, double fy, double fx
) noexcept nogil:
    """Those of the tap whose cell is (row, column) away from an output's (oy * stride_y, ox * stride_x)."""
    cdef Neighbours found
    cdef int64_t down, right, phase
    cdef int r, c
    for r in range(2):
        for c in range(2):
            down, right = floor_div(row + r, planes.stride_y), floor_div(column + c, planes.stride_x)
            phase = (row + r - down * planes.stride_y) * planes.stride_x + column + c - right * planes.stride_x
            found.phase[2 * r + c] = phase
            found.place[2 * r + c] = phase * planes.phase + down * planes.pitch + right
            found.share[2 * r + c] = (fy if r else 1 - fy) * (fx if c else 1 - fx)
    return found
