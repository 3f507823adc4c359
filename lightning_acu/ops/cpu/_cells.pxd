"""The integer cells around taps, and kernels spread over them."""

from libc.stdint cimport int64_t
from libc.string cimport memset

from ._vectors cimport real, spread_taps

cdef enum:
    MOST_LANES = 64  # no instruction set has more
    TABLE = 4096  # cells of the largest bounding box that is looked up in a table; larger ones are searched


cdef struct Layer:
    int64_t lanes
    int64_t outputs  # channels per group
    int64_t inputs
    int64_t taps
    int64_t per_position  # output channels that share their positions
    int64_t stride_y
    int64_t stride_x


cdef struct Box:  # of the cells that meet the image, seen from input pixel `output * stride`; height 0: there are none
    int64_t top
    int64_t left
    int64_t height
    int64_t width


cdef struct Cells:  # of one block of channels; the arrays belong to the caller
    int64_t first  # position groups that they were found for, last exclusive; last 0: none yet
    int64_t last
    int64_t count
    int64_t* row  # within the box
    int64_t* column
    int64_t* index  # [position group of the block, tap, neighbour]; -1: outside the box, or without weight
    double* share  # beside each index: the bilinear weight of the tap's neighbour
    int64_t* table


cdef inline bint meets(int64_t cell, int64_t size, int64_t out_size, int64_t stride) noexcept nogil:
    """Whether any output pixel sees `cell` inside the image, along one axis."""
    return cell < size and cell + (out_size - 1) * stride >= 0


cdef inline double share_of(const double[:, :, ::1] fraction, int64_t p, int64_t k, int neighbour) noexcept nogil:
    """The bilinear weight of a tap's neighbour 2 * row + column."""
    cdef double y = fraction[p, k, 0], x = fraction[p, k, 1]
    return (y if neighbour & 2 else 1 - y) * (x if neighbour & 1 else 1 - x)


cdef inline Box box_of(
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t height, int64_t width, int64_t out_height,
    int64_t out_width, const Layer* layer, bint all_neighbours,
) noexcept nogil:
    cdef Box box
    cdef int64_t p, k, y, x, bottom = -(1 << 60), right = -(1 << 60)
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
    const Box* box, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t first, int64_t last,
    bint all_neighbours, Cells* cells,
) noexcept nogil:
    """The distinct cells of position groups first to last (exclusive)."""
    cdef int64_t p, k, y, x, found, area = box.height * box.width
    cdef int64_t* index = cells.index
    cdef double* share = cells.share
    cdef int neighbour
    cells.first, cells.last, cells.count = first, last, 0
    if area <= TABLE:
        memset(cells.table, 0xFF, area * sizeof(int64_t))  # -1
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
    const Layer* layer, const real[:, :, :] weight, const Cells* cells, bint to_output, int64_t first, int64_t last,
    real* kernel,
) noexcept nogil:
    """kernel[part, cell, lane]: the weight of channels first to last (outputs, or inputs) spread over the cells.

    The lane of an output channel reads `inputs` parts; the lane of an input channel is read by `outputs` parts.
    """
    cdef int64_t part, lane, end, tap, output, input, count = last - first, step = weight.strides[2] // sizeof(real)
    cdef const real* source[MOST_LANES]
    cdef int64_t position[MOST_LANES]
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
