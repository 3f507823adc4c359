"""The integer cells around taps, and kernels spread over them."""

from libc.string cimport memset

from ._vectors cimport real, spread_taps

cdef enum:
    MOST_LANES = 64  # no instruction set has more
    TABLE = 4096  # cells of the largest bounding box that is looked up in a table; larger ones are searched


cdef struct Layer:
    long lanes
    long outputs  # channels per group
    long inputs
    long taps
    long per_position  # output channels that share their positions
    long stride_y
    long stride_x


cdef struct Box:  # of the cells that meet the image, seen from input pixel `output * stride`; height 0: there are none
    long top
    long left
    long height
    long width


cdef struct Cells:  # of one block of channels; the arrays belong to the caller
    long first  # position groups that they were found for, last exclusive; last 0: none yet
    long last
    long count
    long* row  # within the box
    long* column
    long* index  # [position group of the block, tap, neighbour]; -1: outside the box, or without weight
    double* share  # beside each index: the bilinear weight of the tap's neighbour
    long* table


cdef inline bint meets(long cell, long size, long out_size, long stride) noexcept nogil:
    """Whether any output pixel sees `cell` inside the image, along one axis."""
    return cell < size and cell + (out_size - 1) * stride >= 0


cdef inline double share_of(const double[:, :, ::1] fraction, long p, long k, int neighbour) noexcept nogil:
    """The bilinear weight of a tap's neighbour 2 * row + column."""
    cdef double y = fraction[p, k, 0], x = fraction[p, k, 1]
    return (y if neighbour & 2 else 1 - y) * (x if neighbour & 1 else 1 - x)


cdef inline Box box_of(
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, long height, long width, long out_height,
    long out_width, const Layer* layer, bint all_neighbours,
) noexcept nogil:
    cdef Box box
    cdef long p, k, y, x, bottom = -(1 << 60), right = -(1 << 60)
    cdef int neighbour
    box.top = box.left = 1 << 60
    for p in range(cell.shape[0]):
        for k in range(cell.shape[1]):
            for neighbour in range(4):
                y, x = cell[p, k, 0] + (neighbour >> 1), cell[p, k, 1] + (neighbour & 1)
                if (
                    meets(y, height, out_height, layer.stride_y)
                    and meets(x, width, out_width, layer.stride_x)
                    and (all_neighbours or share_of(fraction, p, k, neighbour) != 0)
                ):
                    box.top, box.left = min(box.top, y), min(box.left, x)
                    bottom, right = max(bottom, y), max(right, x)
    if bottom < box.top:
        box.top = box.left = box.height = box.width = 0
    else:
        box.height, box.width = bottom - box.top + 1, right - box.left + 1
    return box


cdef inline void find_cells(
    const Box* box, const long[:, :, ::1] cell, const double[:, :, ::1] fraction, long first, long last,
    bint all_neighbours, Cells* cells,
) noexcept nogil:
    """The distinct cells of position groups first to last (exclusive)."""
    cdef long p, k, y, x, found, area = box.height * box.width
    cdef long* index = cells.index
    cdef double* share = cells.share
    cdef int neighbour
    cells.first, cells.last, cells.count = first, last, 0
    if area <= TABLE:
        memset(cells.table, 0xFF, area * sizeof(long))  # -1
    for p in range(first, last):
        for k in range(cell.shape[1]):
            for neighbour in range(4):
                y, x = cell[p, k, 0] + (neighbour >> 1) - box.top, cell[p, k, 1] + (neighbour & 1) - box.left
                index[0], share[0] = -1, share_of(fraction, p, k, neighbour)
                if y >= 0 and y < box.height and x >= 0 and x < box.width and (all_neighbours or share[0] != 0):
                    if area <= TABLE:
                        index[0] = y * box.width + x
                        cells.table[index[0]] = 0
                    else:
                        found = cells.count - 1
                        while found >= 0 and (cells.row[found] != y or cells.column[found] != x):
                            found -= 1
                        if found < 0:
                            found = cells.count
                            cells.row[found], cells.column[found] = y, x
                            cells.count += 1
                        index[0] = found
                index += 1
                share += 1
    if area > TABLE:
        return
    for found in range(area):  # numbers in raster order, so that neighbours follow each other
        if cells.table[found] == 0:
            cells.table[found] = cells.count
            cells.row[cells.count], cells.column[cells.count] = found // box.width, found % box.width
            cells.count += 1
    for found in range((last - first) * cell.shape[1] * 4):
        if cells.index[found] >= 0:
            cells.index[found] = cells.table[cells.index[found]]


cdef inline void spread_weight(
    const Layer* layer, const real[:, :, :] weight, const Cells* cells, bint to_output, long first, long last, real* kernel,
) noexcept nogil:
    """kernel[part, cell, lane]: the weight of channels first to last (outputs, or inputs) spread over the cells.

    The lane of an output channel reads `inputs` parts; the lane of an input channel is read by `outputs` parts.
    """
    cdef long part, lane, end, tap, output, input, count = last - first, step = weight.strides[2] // sizeof(real)
    cdef const real* source[MOST_LANES]
    cdef long position[MOST_LANES]
    memset(kernel, 0, (layer.inputs if to_output else layer.outputs) * cells.count * layer.lanes * sizeof(real))
    for part in range(layer.inputs if to_output else layer.outputs):
        for lane in range(count):
            if to_output:
                output, input = first + lane, part
            else:
                output, input = (first + lane) // layer.inputs * layer.outputs + part, (first + lane) % layer.inputs
            position[lane] = output // layer.per_position
            source[lane] = &weight[output, input, 0]
        lane = 0
        while lane < count:  # a run of lanes that share their positions
            end = lane + 1
            while end < count and position[end] == position[lane]:
                end += 1
            tap = (position[lane] - cells.first) * layer.taps * 4
            spread_taps(layer.taps, cells.index + tap, cells.share + tap, lane, end, source, step, kernel)
            lane = end
        kernel += cells.count * layer.lanes
