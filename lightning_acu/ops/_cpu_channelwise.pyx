# distutils: language = c
"""Active convolution channel by channel, for depthwise layers and small groups, on channels_last images.

Every tap's weight is spread over the integer cells around it, and each distinct cell costs one load and one
multiply-add for a block of LANES channels: no matrix product. A band of rows of such a block is copied with a rim of
zeros first: it stays in the cache, and no cell needs a test for the border. Work is cut by geometry alone and no two
threads add to the same number: results do not depend on their number. Arguments as in `_cpu_kernels.pyx`.
"""

from cython.parallel cimport prange, threadid
from libc.string cimport memcpy, memset

from ._bands cimport (
    Plan, Space, band_pixels, copy_band, copy_lines, plan_of, sort_by_class, space_in
)
from ._cells cimport MOST_LANES, Cells, Layer, find_cells, share_of, spread_weight
from ._packing cimport ceil_div
from ._vectors cimport Buffer, correlate, correlate_kernel, lanes, real

cdef enum:
    NEAR = 4096  # pixels of a range of images: 64 bytes each, read and written
    PARTS = 32  # ranges of images, at most, that the kernel's gradient is summed over separately: work for threads


cdef long image_ranges(const Plan* plan, long images, long pixels, int threads):
    """So many that every thread finds work, and that a block of a range stays in a level-2 cache with the next one."""
    cdef long most = max(1, NEAR // max(pixels, 1))
    return max(1, min(images, max(ceil_div(images, most), ceil_div(4 * threads, plan.blocks))))


cdef Buffer zeros(size_t count, size_t size):
    cdef Buffer buffer = Buffer(count, size)
    memset(buffer.data, 0, count * size)
    return buffer


def forward(
    const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias, const long[:, :, ::1] cell,
    const double[:, :, ::1] fraction, long groups, stride, real[:, :, :, ::1] output, int threads,
):
    """output OUT (N, H_out, W_out, C_out); image IN (N, H, W, C_in); weight IN (C_out, C_in/groups, K), any strides;
    bias IN (C_out,) or None; cell and fraction IN (P, K, 2)."""
    cdef Plan plan = plan_of(
        image.shape, weight.shape, output.shape, cell, fraction, groups, stride, lanes(<real*>NULL), True, False
    )
    cdef long images = output.shape[0], job
    cdef long parts = image_ranges(&plan, images, output.shape[1] * output.shape[2], threads)
    cdef Buffer longs = zeros(threads * plan.longs, sizeof(long)), reals = zeros(threads * plan.reals, sizeof(real))
    for job in prange(plan.blocks * parts, nogil=True, num_threads=threads, schedule="static"):
        forward_block(
            &plan, image, weight, bias, cell, fraction, job % plan.blocks * plan.layer.lanes,
            images * (job // plan.blocks) // parts, images * (job // plan.blocks + 1) // parts, output,
            <long*>longs.data + threadid() * plan.longs, <real*>reals.data + threadid() * plan.reals,
        )


cdef void forward_block(
    const Plan* plan, const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias,
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, long first, long first_image, long last_image,
    real[:, :, :, ::1] output, long* longs, real* reals,
) noexcept nogil:
    """The output channels from `first` on, of some images."""
    cdef const Layer* layer = &plan.layer
    cdef long out_height = output.shape[1], width = output.shape[2], c_out = output.shape[3], size = layer.lanes
    cdef long last = min(first + size, c_out), n, y, y_first, y_last, part, i
    cdef long position = first // layer.per_position, end = (last - 1) // layer.per_position + 1
    cdef Space* space = space_in(plan, longs)
    cdef Cells* cells = &space.cells
    cdef real* start = reals
    cdef real* kernel = start + size
    cdef real* block = kernel + layer.inputs * plan.cells * size
    cdef real* lines = block + band_pixels(plan) * size
    cdef bint whole = last - first == size  # otherwise vectors would run into the next pixel
    if cells.first != position or cells.last != end:
        find_cells(&plan.box, cell, fraction, position, end, False, cells)
        for i in range(cells.count):
            space.place[i] = (cells.row[i] * plan.row + cells.column[i]) * size
    spread_weight(layer, weight, fraction, cells, True, first, last, kernel)
    if bias is not None:
        memcpy(start, &bias[first], (last - first) * sizeof(real))
    for n in range(first_image, last_image):
        for i in range(ceil_div(out_height, plan.rows)):
            y_first = i * plan.rows
            y_last = min(out_height, y_first + plan.rows)
            for part in range(layer.inputs):
                copy_band(
                    &image[n, 0, 0, 0], image.shape[1], image.shape[2], image.shape[3],
                    y_first * layer.stride_y + plan.box.top, plan.box.left,
                    (y_last - y_first - 1) * layer.stride_y + plan.box.height, plan.row, layer, True, first, last, part,
                    block,
                )
                for y in range(y_first, y_last):
                    correlate(
                        width, cells.count, space.place, kernel + part * cells.count * size,
                        block + (y - y_first) * layer.stride_y * plan.row * size, layer.stride_x * size,
                        <const real*>NULL if part else start,
                        &output[n, y, 0, first] if whole else lines + (y - y_first) * width * size,
                        c_out if whole else size,
                    )
            if not whole:
                copy_lines(lines, (y_last - y_first) * width, size, last - first, &output[n, y_first, 0, first], c_out)


def backward_image(
    const real[:, :, :, ::1] gradient, const real[:, :, :] weight, const long[:, :, ::1] cell,
    const double[:, :, ::1] fraction, long groups, stride, real[:, :, :, ::1] grad_image, int threads,
):
    """grad_image OUT (N, H, W, C_in); gradient IN (N, H_out, W_out, C_out)."""
    cdef Plan plan = plan_of(
        grad_image.shape, weight.shape, gradient.shape, cell, fraction, groups, stride, lanes(<real*>NULL), False, False
    )
    cdef long images = gradient.shape[0], job
    cdef long parts = image_ranges(&plan, images, grad_image.shape[1] * grad_image.shape[2], threads)
    cdef Buffer longs = zeros(threads * plan.longs, sizeof(long)), reals = zeros(threads * plan.reals, sizeof(real))
    for job in prange(plan.blocks * parts, nogil=True, num_threads=threads, schedule="static"):
        backward_image_block(
            &plan, gradient, weight, cell, fraction, job % plan.blocks * plan.layer.lanes,
            images * (job // plan.blocks) // parts, images * (job // plan.blocks + 1) // parts, grad_image,
            <long*>longs.data + threadid() * plan.longs, <real*>reals.data + threadid() * plan.reals,
        )


cdef void backward_image_block(
    const Plan* plan, const real[:, :, :, ::1] gradient, const real[:, :, :] weight, const long[:, :, ::1] cell,
    const double[:, :, ::1] fraction, long first, long first_image, long last_image, real[:, :, :, ::1] grad_image,
    long* longs, real* reals,
) noexcept nogil:
    """The input channels from `first` on, of some images."""
    cdef const Layer* layer = &plan.layer
    cdef long height = grad_image.shape[1], width = grad_image.shape[2], c_in = grad_image.shape[3], size = layer.lanes
    cdef long sy = layer.stride_y, sx = layer.stride_x, last = min(first + size, c_in), n, i, y, c, part, band
    cdef long position = first // layer.inputs * layer.outputs // layer.per_position
    cdef long end = (((last - 1) // layer.inputs + 1) * layer.outputs - 1) // layer.per_position + 1
    cdef long y_first, y_last, row, column
    cdef Space* space = space_in(plan, longs)
    cdef Cells* cells = &space.cells
    cdef real* start = reals
    cdef real* kernel = start + size
    cdef real* block = kernel + layer.outputs * plan.cells * size
    cdef real* lines = block + band_pixels(plan) * size
    cdef bint whole = last - first == size
    if cells.first != position or cells.last != end:
        find_cells(&plan.box, cell, fraction, position, end, False, cells)
        sort_by_class(plan, space)
        for i in range((end - position) * layer.taps * 4):
            if cells.index[i] >= 0:
                cells.index[i] = space.order[cells.index[i]]
    spread_weight(layer, weight, fraction, cells, False, first, last, kernel)
    for n in range(first_image, last_image):
        for band in range(ceil_div(ceil_div(height, sy), plan.rows)):
            y_first = band * plan.rows  # counted in steps of the stride
            y_last = min(ceil_div(height, sy), y_first + plan.rows)
            for part in range(layer.outputs):
                copy_band(
                    &gradient[n, 0, 0, 0], gradient.shape[1], gradient.shape[2], gradient.shape[3],
                    y_first + plan.reach.top, plan.reach.left, y_last - y_first - 1 + plan.reach.height, plan.row,
                    layer, False, first, last, part, block,
                )
                for y in range(y_first, y_last):
                    for c in range(plan.classes_y * plan.classes_x):
                        row, column = y * sy + c // plan.classes_x, c % plan.classes_x
                        if row >= height:
                            continue
                        correlate(
                            ceil_div(width - column, sx), space.starts[c + 1] - space.starts[c],
                            space.place + space.starts[c], kernel + (part * cells.count + space.starts[c]) * size,
                            block + (y - y_first) * plan.row * size, size, <const real*>NULL if part else start,
                            &grad_image[n, row, column, first] if whole
                            else lines + ((row - y_first * sy) * width + column) * size,
                            sx * (c_in if whole else size),
                        )
            if not whole:
                row = min(y_last * sy, height) - y_first * sy
                copy_lines(lines, row * width, size, last - first, &grad_image[n, y_first * sy, 0, first], c_in)


def backward_kernel(
    const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const real[:, :, :] weight,
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, long groups, stride, real[:, :, ::1] grad_weight,
    double[:, :, ::1] grad_cell, int threads,
):
    """grad_weight OUT (C_out, C_in/groups, K); grad_cell INOUT (P, K, 2), added to; gradient IN (N, H_out, W_out,
    C_out)."""
    cdef Plan plan = plan_of(
        image.shape, weight.shape, gradient.shape, cell, fraction, groups, stride, lanes(<real*>NULL), True, True
    )
    cdef long images = gradient.shape[0], parts = max(1, min(images, PARTS // plan.blocks)), job
    cdef long size = plan.layer.inputs * plan.cells * plan.layer.lanes
    cdef Buffer longs = zeros(threads * plan.longs, sizeof(long)), reals = zeros(threads * plan.reals, sizeof(real))
    cdef Buffer sums = zeros(plan.blocks * parts * size, sizeof(double))
    cdef Buffer shares = zeros(plan.layer.taps * 4 * plan.blocks * plan.layer.lanes, sizeof(double))
    for job in prange(plan.blocks * parts, nogil=True, num_threads=threads, schedule="static"):
        backward_kernel_block(
            &plan, gradient, image, cell, fraction, job // parts * plan.layer.lanes,
            images * (job % parts) // parts, images * (job % parts + 1) // parts, <double*>sums.data + job * size,
            <long*>longs.data + threadid() * plan.longs, <real*>reals.data + threadid() * plan.reals,
        )
    for job in prange(plan.blocks, nogil=True, num_threads=threads, schedule="static"):
        gather_shares(
            &plan, weight, cell, fraction, job * plan.layer.lanes, <double*>sums.data + job * parts * size, parts,
            size, grad_weight, <double*>shares.data, <long*>longs.data + threadid() * plan.longs,
        )
    positions_from_shares(&plan, fraction, <double*>shares.data, grad_cell)


cdef void backward_kernel_block(
    const Plan* plan, const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const long[:, :, ::1] cell,
    const double[:, :, ::1] fraction, long first, long first_image, long last_image, double* sums, long* longs,
    real* reals,
) noexcept nogil:
    """sums[part, cell, lane] += the gradient of the kernel of output channels from `first` on, over some images."""
    cdef const Layer* layer = &plan.layer
    cdef long out_height = gradient.shape[1], width = gradient.shape[2], c_out = gradient.shape[3], size = layer.lanes
    cdef long last = min(first + size, c_out), n, y, y_first, y_last, part, i
    cdef long position = first // layer.per_position, end = (last - 1) // layer.per_position + 1
    cdef Space* space = space_in(plan, longs)
    cdef Cells* cells = &space.cells
    cdef real* kernel = reals + size
    cdef real* block = kernel + layer.inputs * plan.cells * size
    cdef real* lines = block + band_pixels(plan) * size
    cdef bint whole = last - first == size
    if cells.first != position or cells.last != end:
        find_cells(&plan.box, cell, fraction, position, end, True, cells)
        for i in range(cells.count):
            space.place[i] = (cells.row[i] * plan.row + cells.column[i]) * size
    for n in range(first_image, last_image):
        for i in range(ceil_div(out_height, plan.rows)):
            y_first = i * plan.rows
            y_last = min(out_height, y_first + plan.rows)
            if not whole:
                for y in range(y_first * width, y_last * width):
                    memcpy(
                        lines + (y - y_first * width) * size, &gradient[n, 0, 0, first] + y * c_out,
                        (last - first) * sizeof(real),
                    )
            for part in range(layer.inputs):
                copy_band(
                    &image[n, 0, 0, 0], image.shape[1], image.shape[2], image.shape[3],
                    y_first * layer.stride_y + plan.box.top, plan.box.left,
                    (y_last - y_first - 1) * layer.stride_y + plan.box.height, plan.row, layer, True, first, last, part,
                    block,
                )
                memset(kernel, 0, cells.count * size * sizeof(real))
                for y in range(y_first, y_last):
                    correlate_kernel(
                        width, cells.count, space.place, kernel,
                        block + (y - y_first) * layer.stride_y * plan.row * size, layer.stride_x * size,
                        &gradient[n, y, 0, first] if whole else lines + (y - y_first) * width * size,
                        c_out if whole else size,
                    )
                for y in range(cells.count * size):
                    sums[part * cells.count * size + y] += kernel[y]


cdef void gather_shares(
    const Plan* plan, const real[:, :, :] weight, const long[:, :, ::1] cell, const double[:, :, ::1] fraction,
    long first, double* sums, long parts, long size, real[:, :, ::1] grad_weight, double* grad_shares, long* longs,
) noexcept nogil:
    """From the gradient of the kernel's cells to those of the taps' weights and of their bilinear weights, which go to
    grad_shares[k, neighbour, output channel] (zeros before)."""
    cdef const Layer* layer = &plan.layer
    cdef long last = min(first + layer.lanes, weight.shape[0]), part, i, lane, k, p, channels = plan.blocks * layer.lanes
    cdef long position = first // layer.per_position, end = (last - 1) // layer.per_position + 1
    cdef int neighbour
    cdef double total[MOST_LANES]
    cdef double share
    cdef const double* value
    cdef Space* space = space_in(plan, longs)
    cdef Cells* cells = &space.cells
    cdef const long* index
    if cells.first != position or cells.last != end:
        find_cells(&plan.box, cell, fraction, position, end, True, cells)
    for part in range(1, parts):
        for i in range(size):
            sums[i] += sums[part * size + i]
    for k in range(layer.taps):
        for part in range(layer.inputs):
            memset(&total[0], 0, sizeof(total))
            for lane in range(last - first):
                p = position if end == position + 1 else (first + lane) // layer.per_position
                index = cells.index + ((p - position) * layer.taps + k) * 4
                for neighbour in range(4):
                    if index[neighbour] >= 0:
                        value = sums + (part * cells.count + index[neighbour]) * layer.lanes
                        total[lane] += share_of(fraction, p, k, neighbour) * value[lane]
                        grad_shares[(k * 4 + neighbour) * channels + first + lane] += (
                            value[lane] * weight[first + lane, part, k]
                        )
                grad_weight[first + lane, part, k] = <real>total[lane]


cdef void positions_from_shares(
    const Plan* plan, const double[:, :, ::1] fraction, const double* grad_shares, double[:, :, ::1] grad_cell
) noexcept nogil:
    """grad_cell[p, k] += from the gradients g of the 4 bilinear weights, summed over the output channels of p:

    d/d row = (1 - fx) (g_10 - g_00) + fx (g_11 - g_01), d/d column = (1 - fy) (g_01 - g_00) + fy (g_11 - g_10).
    """
    cdef long p, k, channel, size = plan.layer.per_position, channels = plan.blocks * plan.layer.lanes
    cdef double g[4]
    cdef double fy, fx
    cdef int neighbour
    for p in range(fraction.shape[0]):
        for k in range(fraction.shape[1]):
            for neighbour in range(4):
                g[neighbour] = 0
                for channel in range(p * size, (p + 1) * size):
                    g[neighbour] += grad_shares[(k * 4 + neighbour) * channels + channel]
            fy, fx = fraction[p, k, 0], fraction[p, k, 1]
            grad_cell[p, k, 0] += (1 - fx) * (g[2] - g[0]) + fx * (g[3] - g[1])
            grad_cell[p, k, 1] += (1 - fy) * (g[1] - g[0]) + fy * (g[3] - g[2])
