"""Bands of images, a block of channels wide, and the sizes of everything that works on them."""

from libc.string cimport memcpy, memset

from ._cells cimport TABLE, Box, Cells, Layer, box_of
from ._packing cimport ceil_div
from ._vectors cimport blend, copy, real

cdef enum:
    BAND = 32768  # elements of a band: with its output it stays in a level-2 cache


cdef struct Plan:  # what is the same for all blocks
    Layer layer
    Box box  # of the cells
    Box reach  # what a result row reads of the other image, seen from `row * step`
    long step
    long classes_y  # of input pixels, modulo the stride: those that the image has
    long classes_x
    long blocks
    long cells  # of a block, at most
    long row  # pixels of a row of a band, with its rim
    long rows  # result rows of a band
    long line  # pixels of a result row
    long longs  # numbers in a thread's buffers
    long reals


cdef inline long floor_div(long a, long b) noexcept nogil:
    return a // b - (a % b < 0)  # cdivision truncates


cdef inline Plan plan_of(
    image_shape, weight_shape, out_shape, const long[:, :, ::1] cell, const double[:, :, ::1] fraction, long groups,
    stride, long lanes, bint to_output, bint all_neighbours,
):
    """Sizes of bands and buffers; results are outputs, or (not to_output) input pixels."""
    cdef Plan plan
    cdef Layer* layer = &plan.layer
    cdef Box* box = &plan.box
    cdef long parts, positions, rows
    layer.lanes = lanes
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
        rows, plan.line, plan.step = out_shape[1], out_shape[2], layer.stride_y
        plan.blocks = ceil_div(out_shape[3], lanes)
        plan.row = (out_shape[2] - 1) * layer.stride_x + max(box.width, 1)
    else:  # input row stride * i + r sees output row i - floor(cell / stride) through cells of remainder r
        parts, positions = layer.outputs, (lanes // layer.inputs + 2) * layer.outputs // layer.per_position + 2
        rows, plan.line, plan.step = ceil_div(image_shape[1], layer.stride_y), plan.classes_y * image_shape[2], 1
        plan.blocks = ceil_div(image_shape[3], lanes)
        plan.reach.top = -floor_div(box.top + box.height - 1, layer.stride_y)
        plan.reach.left = -floor_div(box.left + box.width - 1, layer.stride_x)
        plan.reach.height = -floor_div(box.top, layer.stride_y) - plan.reach.top + 1
        plan.reach.width = -floor_div(box.left, layer.stride_x) - plan.reach.left + 1
        plan.row = ceil_div(image_shape[2], layer.stride_x) - 1 + max(plan.reach.width, 1)
    plan.cells = min(positions * layer.taps * 4, box.height * box.width)
    plan.rows = (BAND // (plan.row * lanes) - plan.reach.height) // plan.step + 1
    # A band's rim is copied again for the next one: bands of far taps (dilation) are at least as high as their rim.
    plan.rows = max(1, min(rows, max(plan.rows, plan.reach.height // plan.step)))
    plan.longs = sizeof(Space) // sizeof(long) + 4 * plan.cells + TABLE + plan.classes_y * plan.classes_x + 1
    plan.longs += positions * layer.taps * 4
    plan.reals = lanes * (1 + parts * plan.cells + band_pixels(&plan) + plan.rows * plan.line)
    return plan


cdef inline long band_pixels(const Plan* plan) noexcept nogil:
    return ((plan.rows - 1) * plan.step + plan.reach.height) * plan.row


cdef struct Space:  # a thread's buffers of whole numbers
    Cells cells
    long* place
    long* order
    long* starts


cdef inline Space* space_in(const Plan* plan, long* buffer) noexcept nogil:
    """The buffers, zeros at first; the cells of the last block stay."""
    cdef Space* space = <Space*>buffer
    buffer += sizeof(Space) // sizeof(long)
    space.cells.row, space.cells.column = buffer, buffer + plan.cells
    space.place, space.order = buffer + 2 * plan.cells, buffer + 3 * plan.cells
    space.cells.table = buffer + 4 * plan.cells
    space.starts = space.cells.table + TABLE
    space.cells.index = space.starts + plan.classes_y * plan.classes_x + 1
    return space


cdef inline void sort_by_class(const Plan* plan, Space* space) noexcept nogil:
    """Cells whose rows and columns agree modulo the stride, one class of input pixels after the other.

    order[i] is the new number of cell i; the cells of class c are starts[c] to starts[c + 1]; place[new number].
    """
    cdef long sy = plan.layer.stride_y, sx = plan.layer.stride_x, i, c, row, column, count = 0
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
    const real* image, long pixels, long channels, const Layer* layer, bint to_output, long first, long last, long part,
    real* to,
) noexcept nogil:
    """to[pixel, lane]: of the image's channels, the one that is `part` of the channel `first + lane`."""
    cdef long channel, pixel, own = layer.outputs if to_output else layer.inputs
    cdef long other = layer.inputs if to_output else layer.outputs
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


cdef inline void copy_band(
    const real* image, long height, long width, long channels, long top, long left, long rows, long row,
    const Layer* layer, bint to_output, long first, long last, long part, real* to,
) noexcept nogil:
    """Rows top to top + rows, pixels left to left + row of one image, with zeros where it has none."""
    cdef long y, start = max(-left, 0), end = min(width - left, row)
    for y in range(top, top + rows):
        if y < 0 or y >= height or start >= end:
            memset(to, 0, row * layer.lanes * sizeof(real))
        else:
            memset(to, 0, start * layer.lanes * sizeof(real))
            copy_pixels(
                image + (y * width + left + start) * channels, end - start, channels, layer, to_output, first, last,
                part, to + start * layer.lanes,
            )
            memset(to + end * layer.lanes, 0, (row - end) * layer.lanes * sizeof(real))
        to += row * layer.lanes


cdef inline void copy_lines(
    const real* lines, long pixels, long size, long channels, real* to, long step
) noexcept nogil:
    cdef long pixel
    for pixel in range(pixels):
        memcpy(to + pixel * step, lines + pixel * size, channels * sizeof(real))
