"""Bands of images, some blocks of channels wide, and the sizes of everything that works on them."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from ._cells cimport TABLE, Box, Cells, Layer, box_of, find_cells
from ._packing cimport ceil_div
from ._vectors cimport blend, copy, real

cdef enum:
    BAND = 32768  # elements of a band of one block: with its output it stays in a level-2 cache
    BANDS = 65536  # elements of the bands of all blocks that are worked on together


cdef struct Plan:  # what is the same for all blocks
    Layer layer
    bint to_output  # whether results are outputs, or input pixels
    int64_t channels  # of the results
    Box box  # of the cells
    Box reach  # the part of the other image that a result row reads, seen from `row * step`
    int64_t step
    int64_t classes_y  # classes of input pixels modulo the stride, as far as the image has pixels of them
    int64_t classes_x
    int64_t blocks
    int64_t together  # blocks of a job: they share lines of the image, which come from main memory
    int64_t neighbours  # of a block's taps, at most
    int64_t cells  # of a block, at most
    int64_t row  # pixels of a row of a band, with its rim
    int64_t rows  # result rows of a band
    int64_t strips  # bands of an image
    int64_t space  # how many integers a block has
    int64_t integers  # of a thread: whether it has begun, a table, the spaces of its blocks
    int64_t kernel  # reals of a block: its cells, of all parts
    int64_t band
    int64_t kernels  # where they begin in a thread's buffer, after the blocks' start values
    int64_t bands
    int64_t lines  # of a block with fewer channels than lanes, which cannot be written in place
    int64_t reals  # of a thread


cdef inline int64_t floor_div(int64_t a, int64_t b) noexcept nogil:
    return a // b - (a % b < 0)  # cdivision truncates


cdef inline Plan plan_of(
    image_shape, weight_shape, out_shape, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction,
    int64_t groups, stride, int64_t lanes, bint to_output, bint all_neighbours, int threads,
):
    """Sizes of bands and buffers; results are outputs, or (not to_output) input pixels.

    The number of threads decides `together` alone, which changes the order of the work and not that of sums.
    """
    cdef Plan plan
    cdef Layer* layer = &plan.layer
    cdef Box* box = &plan.box
    cdef int64_t parts, positions, rows, line
    plan.to_output, layer.lanes = to_output, lanes
    layer.outputs, layer.inputs, layer.taps = weight_shape[0] // groups, weight_shape[1], weight_shape[2]
    layer.per_position = weight_shape[0] // cell.shape[0]
    layer.stride_y, layer.stride_x = stride
    plan.box = box_of(
        cell, fraction, image_shape[1], image_shape[2], out_shape[1], out_shape[2], layer, all_neighbours
    )
    plan.reach = plan.box
    plan.classes_y = max(1, min(layer.stride_y, image_shape[1]))
    plan.classes_x = max(1, min(layer.stride_x, image_shape[2]))
    if to_output:
        parts, positions = layer.inputs, lanes // layer.per_position + 2
        rows, line, plan.step = out_shape[1], out_shape[2], layer.stride_y
        plan.channels = out_shape[3]
        plan.row = (out_shape[2] - 1) * layer.stride_x + max(box.width, 1)
    else:  # input row stride * i + r sees output row i - floor(cell / stride) through cells of remainder r
        parts, positions = layer.outputs, (lanes // layer.inputs + 2) * layer.outputs // layer.per_position + 2
        rows, line, plan.step = ceil_div(image_shape[1], layer.stride_y), plan.classes_y * image_shape[2], 1
        plan.channels = image_shape[3]
        plan.reach.top = -floor_div(box.top + box.height - 1, layer.stride_y)
        plan.reach.left = -floor_div(box.left + box.width - 1, layer.stride_x)
        plan.reach.height = -floor_div(box.top, layer.stride_y) - plan.reach.top + 1
        plan.reach.width = -floor_div(box.left, layer.stride_x) - plan.reach.left + 1
        plan.row = ceil_div(image_shape[2], layer.stride_x) - 1 + max(plan.reach.width, 1)
    plan.blocks = ceil_div(plan.channels, lanes)
    plan.neighbours = positions * layer.taps * 4
    plan.cells = min(plan.neighbours, box.height * box.width)
    plan.rows = (BAND // (plan.row * lanes) - plan.reach.height) // plan.step + 1
    # A band's rim is copied again for the next one: bands of far taps (dilation) are at least as high as their rim.
    plan.rows = max(1, min(rows, max(plan.rows, plan.reach.height // plan.step)))
    plan.strips = ceil_div(rows, plan.rows)
    plan.kernel, plan.band = parts * plan.cells * lanes, band_rows(&plan, plan.rows) * plan.row * lanes
    plan.together = min(BANDS // (plan.band + plan.kernel + 1), plan.blocks * plan.strips * image_shape[0] // (4 * threads))
    plan.together = max(1, min(plan.together, plan.blocks))
    plan.space = sizeof(Space) // sizeof(int64_t) + 4 * plan.cells + plan.classes_y * plan.classes_x + 1
    plan.space += 2 * plan.neighbours  # a double needs no more than an int64_t
    plan.integers = 1 + TABLE + plan.together * plan.space
    plan.kernels = plan.together * lanes
    plan.bands = plan.kernels + plan.together * plan.kernel
    plan.lines = plan.bands + plan.together * plan.band
    plan.reals = plan.lines + plan.rows * line * lanes
    return plan


cdef inline int64_t band_rows(const Plan* plan, int64_t rows) noexcept nogil:
    """How many rows of the other image this number of result rows reads."""
    return (rows - 1) * plan.step + plan.reach.height


cdef struct Space:  # the integers of a block
    Cells cells
    int64_t* place  # of each cell: where it is in a band, from the first pixel that a result row reads
    int64_t* order  # see `sort_by_class`
    int64_t* starts


cdef inline Space* space_in(const Plan* plan, int64_t* buffer, int64_t block) noexcept nogil:
    """The space of a job's block; it still holds the cells of the thread's last job."""
    cdef Space* space = <Space*>(buffer + 1 + TABLE + block * plan.space)
    cdef int64_t* free = <int64_t*>(space + 1)
    space.cells.table = buffer + 1
    space.cells.row, space.cells.column = free, free + plan.cells
    space.place, space.order, space.starts = free + 2 * plan.cells, free + 3 * plan.cells, free + 4 * plan.cells
    space.cells.share = <double*>(space.starts + plan.classes_y * plan.classes_x + 1)
    space.cells.index = <int64_t*>(space.cells.share + plan.neighbours)
    return space


cdef inline void find_block(
    const Plan* plan, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t first, int64_t last,
    bint all_neighbours, Space* space,
) noexcept nogil:
    """The cells of output channels first to last, and their places in a band."""
    cdef Cells* cells = &space.cells
    cdef int64_t position = first // plan.layer.per_position, end = (last - 1) // plan.layer.per_position + 1, i
    if cells.first == position and cells.last == end:
        return
    find_cells(&plan.box, cell, fraction, position, end, all_neighbours, cells)
    for i in range(cells.count):
        space.place[i] = (cells.row[i] * plan.row + cells.column[i]) * plan.layer.lanes


cdef inline void find_block_of_inputs(
    const Plan* plan, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t first, int64_t last,
    Space* space
) noexcept nogil:
    """The same for input channels first to last, sorted by class."""
    cdef const Layer* layer = &plan.layer
    cdef Cells* cells = &space.cells
    cdef int64_t position = first // layer.inputs * layer.outputs // layer.per_position
    cdef int64_t end = (((last - 1) // layer.inputs + 1) * layer.outputs - 1) // layer.per_position + 1, i
    if cells.first == position and cells.last == end:
        return
    find_cells(&plan.box, cell, fraction, position, end, False, cells)
    sort_by_class(plan, space)
    for i in range((end - position) * layer.taps * 4):
        if cells.index[i] >= 0:
            cells.index[i] = space.order[cells.index[i]]


cdef inline void sort_by_class(const Plan* plan, Space* space) noexcept nogil:
    """Cells sorted by row and column modulo the stride: one class of input pixels after the other.

    order[i] is the new number of cell i; the cells of class c are starts[c] to starts[c + 1]; place[new number].
    """
    cdef int64_t sy = plan.layer.stride_y, sx = plan.layer.stride_x, i, c, row, column, count = 0
    for i in range(space.cells.count):
        space.order[i] = -1  # and so it stays where the image has no pixel of the class
    for c in range(plan.classes_y * plan.classes_x):
        space.starts[c] = count
        for i in range(space.cells.count - 1, -1, -1):  # backwards: neighbours in the gradient follow each other
            row, column = space.cells.row[i] + plan.box.top, space.cells.column[i] + plan.box.left
            if (
                row - floor_div(row, sy) * sy == c // plan.classes_x
                and column - floor_div(column, sx) * sx == c % plan.classes_x
            ):
                space.order[i] = count
                space.place[count] = plan.layer.lanes * (
                    (-floor_div(row, sy) - plan.reach.top) * plan.row - floor_div(column, sx) - plan.reach.left
                )
                count += 1
    space.starts[plan.classes_y * plan.classes_x] = count


cdef inline void copy_pixels(
    const Plan* plan, const real* image, int64_t pixels, int64_t channels, int64_t first, int64_t last, int64_t part,
    real* to
) noexcept nogil:
    """to[pixel, lane]: of the image's channels, the one that is `part` of the channel `first + lane`."""
    cdef const Layer* layer = &plan.layer
    cdef int64_t channel, pixel, own = layer.outputs if plan.to_output else layer.inputs
    cdef int64_t other = layer.inputs if plan.to_output else layer.outputs
    cdef const real* source = image + first
    cdef real one = 1
    if own == 1 and other == 1 and last - first == layer.lanes:
        copy(pixels, source, channels, to)
        return
    if own == 1 and other == 1:
        blend(1, pixels, last - first, &source, &one, channels, to, layer.lanes)
        return
    for channel in range(first, last):
        source = image + channel // own * other + part
        for pixel in range(pixels):
            to[pixel * layer.lanes + channel - first] = source[pixel * channels]


cdef inline void copy_bands(
    const Plan* plan, const real* image, int64_t height, int64_t width, int64_t channels, int64_t top, int64_t rows,
    int64_t first_block, int64_t last_block, int64_t part, real* to,
) noexcept nogil:
    """Rows top to top + rows of one image to a band for each block; what no image has reached is zero already."""
    cdef int64_t size = plan.layer.lanes, left = plan.reach.left, y, block, first
    cdef int64_t start = max(-left, 0), pixels = min(width - left, plan.row) - start
    if pixels <= 0:
        return
    to += start * size
    for y in range(top, top + rows):
        for block in range(last_block - first_block):
            first = (first_block + block) * size
            if 0 <= y < height:
                copy_pixels(
                    plan, image + (y * width + left + start) * channels, pixels, channels, first,
                    min(first + size, plan.channels), part, to + block * plan.band,
                )
            elif plan.strips > 1:  # otherwise nothing was ever written there
                memset(to + block * plan.band, 0, pixels * size * sizeof(real))
        to += plan.row * size


cdef inline void copy_lines(
    const real* lines, int64_t pixels, int64_t size, int64_t channels, real* to, int64_t step
) noexcept nogil:
    cdef int64_t pixel
    for pixel in range(pixels):
        memcpy(to + pixel * step, lines + pixel * size, channels * sizeof(real))
