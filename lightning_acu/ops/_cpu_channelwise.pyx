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
    Plan, Space, band_rows, copy_bands, copy_lines, find_block, find_block_of_inputs, plan_of, space_in
)
from ._cells cimport MOST_LANES, Cells, Layer, spread_weight
from ._packing cimport ceil_div
from ._vectors cimport Buffer, correlate, correlate_kernel, lanes, real

cdef enum:
    NEAR = 4096  # pixels of a range of strips, 64 bytes each, that stay in a level-2 cache until the next group comes
    PARTS = 32  # ranges of strips, at most, that the kernel's gradient is summed over separately: work for threads

cdef struct Job:  # some blocks of channels, and some strips of all images
    long first_block
    long last_block
    long first_strip
    long last_strip


cdef inline Job job_at(const Plan* plan, long groups, long ranges, long strips, long index) noexcept nogil:
    """Blocks in `groups`, strips in `ranges`; the next job has the same strips and the blocks beside these."""
    cdef long group = index % groups, place = index // groups
    cdef Job job = Job(
        group * plan.together, min((group + 1) * plan.together, plan.blocks), strips * place // ranges,
        strips * (place + 1) // ranges,
    )
    return job


cdef long ranges_of(const Plan* plan, long groups, long strips, long pixels, int threads):
    """So many ranges of strips that every thread finds work and that strips are still near when the next group comes."""
    cdef long most = max(1, NEAR // max(pixels // max(plan.strips, 1), 1))
    return max(1, min(strips, max(ceil_div(strips, most), ceil_div(4 * threads, groups))))


cdef Buffer zeros(size_t count, size_t size):
    cdef Buffer buffer = Buffer(count, size)
    memset(buffer.data, 0, count * size)
    return buffer


cdef Buffer longs_of(const Plan* plan, int threads):
    """For whole numbers: no thread has begun, and no cells are found."""
    cdef Buffer buffer = Buffer(threads * plan.longs, sizeof(long))
    cdef long* longs = <long*>buffer.data
    cdef long block
    cdef int thread
    for thread in range(threads):
        longs[0] = 0
        for block in range(plan.together):
            space_in(plan, longs, block).cells.last = 0
        longs += plan.longs
    return buffer


cdef inline void begin(const Plan* plan, long* longs, real* reals) noexcept nogil:
    """Before a thread's first job: zeros for the start values, and where rims of bands are never written."""
    if longs[0] == 0:
        longs[0] = 1
        memset(reals, 0, plan.kernels * sizeof(real))
        memset(reals + plan.bands, 0, (plan.lines - plan.bands) * sizeof(real))


def forward(
    const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias, const long[:, :, ::1] cell,
    const double[:, :, ::1] fraction, long groups, stride, real[:, :, :, ::1] output, int threads,
):
    """output OUT (N, H_out, W_out, C_out); image IN (N, H, W, C_in); weight IN (C_out, C_in/groups, K), any strides;
    bias IN (C_out,) or None; cell and fraction IN (P, K, 2)."""
    cdef Plan plan = plan_of(
        image.shape, weight.shape, output.shape, cell, fraction, groups, stride, lanes(<real*>NULL), True, False, threads
    )
    cdef long strips = output.shape[0] * plan.strips, jobs = ceil_div(plan.blocks, plan.together), i
    cdef long ranges = ranges_of(&plan, jobs, strips, output.shape[1] * output.shape[2], threads)
    cdef Buffer longs = longs_of(&plan, threads), reals = Buffer(threads * plan.reals, sizeof(real))
    for i in prange(jobs * ranges, nogil=True, num_threads=threads, schedule="static"):
        forward_job(
            &plan, job_at(&plan, jobs, ranges, strips, i), image, weight, bias, cell, fraction, output,
            <long*>longs.data + threadid() * plan.longs, <real*>reals.data + threadid() * plan.reals,
        )


cdef void forward_job(
    const Plan* plan, Job job, const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias,
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, real[:, :, :, ::1] output, long* longs, real* reals,
) noexcept nogil:
    cdef const Layer* layer = &plan.layer
    cdef long out_height = output.shape[1], width = output.shape[2], c_out = output.shape[3], size = layer.lanes
    cdef long strip, n, y, y_first, y_last, part, block, first, last
    cdef Space* space
    cdef real* kernel
    cdef real* band
    cdef bint whole
    begin(plan, longs, reals)
    for block in range(job.last_block - job.first_block):
        first = (job.first_block + block) * size
        last = min(first + size, c_out)
        space = space_in(plan, longs, block)
        find_block(plan, cell, fraction, first, last, False, space)
        spread_weight(layer, weight, &space.cells, True, first, last, reals + plan.kernels + block * plan.kernel)
        if bias is not None:
            memcpy(reals + block * size, &bias[first], (last - first) * sizeof(real))
    for strip in range(job.first_strip, job.last_strip):
        n, y_first = strip // plan.strips, strip % plan.strips * plan.rows
        y_last = min(out_height, y_first + plan.rows)
        for part in range(layer.inputs):
            copy_bands(
                plan, &image[n, 0, 0, 0], image.shape[1], image.shape[2], image.shape[3],
                y_first * layer.stride_y + plan.reach.top, band_rows(plan, y_last - y_first), job.first_block,
                job.last_block, part, reals + plan.bands,
            )
            for block in range(job.last_block - job.first_block):
                first = (job.first_block + block) * size
                whole = first + size <= c_out  # otherwise vectors would run into the next pixel
                space = space_in(plan, longs, block)
                kernel = reals + plan.kernels + block * plan.kernel + part * space.cells.count * size
                band = reals + plan.bands + block * plan.band
                for y in range(y_first, y_last):
                    correlate(
                        width, space.cells.count, space.place, kernel,
                        band + (y - y_first) * layer.stride_y * plan.row * size, layer.stride_x * size,
                        <const real*>NULL if part else reals + block * size,
                        &output[n, y, 0, first] if whole else reals + plan.lines + (y - y_first) * width * size,
                        c_out if whole else size,
                    )
        if job.last_block == plan.blocks and c_out % size:
            copy_lines(
                reals + plan.lines, (y_last - y_first) * width, size, c_out % size,
                &output[n, y_first, 0, c_out - c_out % size], c_out,
            )


def backward_image(
    const real[:, :, :, ::1] gradient, const real[:, :, :] weight, const long[:, :, ::1] cell,
    const double[:, :, ::1] fraction, long groups, stride, real[:, :, :, ::1] grad_image, int threads,
):
    """grad_image OUT (N, H, W, C_in); gradient IN (N, H_out, W_out, C_out)."""
    cdef Plan plan = plan_of(
        grad_image.shape, weight.shape, gradient.shape, cell, fraction, groups, stride, lanes(<real*>NULL), False,
        False, threads,
    )
    cdef long strips = gradient.shape[0] * plan.strips, jobs = ceil_div(plan.blocks, plan.together), i
    cdef long ranges = ranges_of(&plan, jobs, strips, grad_image.shape[1] * grad_image.shape[2], threads)
    cdef Buffer longs = longs_of(&plan, threads), reals = Buffer(threads * plan.reals, sizeof(real))
    for i in prange(jobs * ranges, nogil=True, num_threads=threads, schedule="static"):
        backward_image_job(
            &plan, job_at(&plan, jobs, ranges, strips, i), gradient, weight, cell, fraction, grad_image,
            <long*>longs.data + threadid() * plan.longs, <real*>reals.data + threadid() * plan.reals,
        )


cdef void backward_image_job(
    const Plan* plan, Job job, const real[:, :, :, ::1] gradient, const real[:, :, :] weight,
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, real[:, :, :, ::1] grad_image, long* longs,
    real* reals,
) noexcept nogil:
    cdef const Layer* layer = &plan.layer
    cdef long height = grad_image.shape[1], width = grad_image.shape[2], c_in = grad_image.shape[3], size = layer.lanes
    cdef long sy = layer.stride_y, sx = layer.stride_x, steps = ceil_div(height, sy)
    cdef long strip, n, y, y_first, y_last, part, block, first, last, c, row, column
    cdef Space* space
    cdef real* kernel
    cdef real* band
    cdef bint whole
    begin(plan, longs, reals)
    for block in range(job.last_block - job.first_block):
        first = (job.first_block + block) * size
        last = min(first + size, c_in)
        space = space_in(plan, longs, block)
        find_block_of_inputs(plan, cell, fraction, first, last, space)
        spread_weight(layer, weight, &space.cells, False, first, last, reals + plan.kernels + block * plan.kernel)
    for strip in range(job.first_strip, job.last_strip):
        n, y_first = strip // plan.strips, strip % plan.strips * plan.rows  # counted in steps of the stride
        y_last = min(steps, y_first + plan.rows)
        for part in range(layer.outputs):
            copy_bands(
                plan, &gradient[n, 0, 0, 0], gradient.shape[1], gradient.shape[2], gradient.shape[3],
                y_first + plan.reach.top, band_rows(plan, y_last - y_first), job.first_block, job.last_block, part,
                reals + plan.bands,
            )
            for block in range(job.last_block - job.first_block):
                first = (job.first_block + block) * size
                whole = first + size <= c_in
                space = space_in(plan, longs, block)
                kernel = reals + plan.kernels + block * plan.kernel + part * space.cells.count * size
                band = reals + plan.bands + block * plan.band
                for y in range(y_first, y_last):
                    for c in range(plan.classes_y * plan.classes_x):
                        row, column = y * sy + c // plan.classes_x, c % plan.classes_x
                        if row >= height:
                            continue
                        correlate(
                            ceil_div(width - column, sx), space.starts[c + 1] - space.starts[c],
                            space.place + space.starts[c], kernel + space.starts[c] * size,
                            band + (y - y_first) * plan.row * size, size, <const real*>NULL if part else reals,
                            &grad_image[n, row, column, first] if whole
                            else reals + plan.lines + ((row - y_first * sy) * width + column) * size,
                            sx * (c_in if whole else size),
                        )
        if job.last_block == plan.blocks and c_in % size:
            row = min(y_last * sy, height) - y_first * sy
            copy_lines(
                reals + plan.lines, row * width, size, c_in % size, &grad_image[n, y_first * sy, 0, c_in - c_in % size],
                c_in,
            )


def backward_kernel(
    const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const real[:, :, :] weight,
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, long groups, stride, real[:, :, ::1] grad_weight,
    double[:, :, ::1] grad_cell, int threads,
):
    """grad_weight OUT (C_out, C_in/groups, K); grad_cell INOUT (P, K, 2), added to; gradient IN (N, H_out, W_out,
    C_out)."""
    cdef Plan plan = plan_of(
        image.shape, weight.shape, gradient.shape, cell, fraction, groups, stride, lanes(<real*>NULL), True, True,
        threads,
    )
    cdef long strips = gradient.shape[0] * plan.strips, jobs = ceil_div(plan.blocks, plan.together), i
    cdef long ranges = max(1, min(strips, PARTS // plan.blocks))  # of sums, so it must not depend on threads
    cdef Buffer longs = longs_of(&plan, threads), reals = Buffer(threads * plan.reals, sizeof(real))
    cdef Buffer sums = zeros(ranges * plan.blocks * plan.kernel, sizeof(double))
    cdef Buffer shares = zeros(plan.layer.taps * 4 * plan.blocks * plan.layer.lanes, sizeof(double))
    for i in prange(jobs * ranges, nogil=True, num_threads=threads, schedule="static"):
        backward_kernel_job(
            &plan, job_at(&plan, jobs, ranges, strips, i), gradient, image, cell, fraction,
            <double*>sums.data + i // jobs * plan.blocks * plan.kernel,
            <long*>longs.data + threadid() * plan.longs, <real*>reals.data + threadid() * plan.reals,
        )
    for i in prange(plan.blocks, nogil=True, num_threads=threads, schedule="static"):
        gather_shares(
            &plan, weight, cell, fraction, i, <double*>sums.data, ranges, grad_weight, <double*>shares.data,
            <long*>longs.data + threadid() * plan.longs,
        )
    positions_from_shares(&plan, fraction, <double*>shares.data, grad_cell)


cdef void backward_kernel_job(
    const Plan* plan, Job job, const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image,
    const long[:, :, ::1] cell, const double[:, :, ::1] fraction, double* sums, long* longs, real* reals,
) noexcept nogil:
    """sums[block, part, cell, lane] += the gradient of the kernel."""
    cdef const Layer* layer = &plan.layer
    cdef long out_height = gradient.shape[1], width = gradient.shape[2], c_out = gradient.shape[3], size = layer.lanes
    cdef long strip, n, y, y_first, y_last, part, block, first, i, rest = c_out % size
    cdef Space* space
    cdef real* kernel = reals + plan.kernels
    cdef real* band
    cdef double* sum
    cdef bint whole
    begin(plan, longs, reals)
    for block in range(job.last_block - job.first_block):
        first = (job.first_block + block) * size
        find_block(plan, cell, fraction, first, min(first + size, c_out), True, space_in(plan, longs, block))
    for strip in range(job.first_strip, job.last_strip):
        n, y_first = strip // plan.strips, strip % plan.strips * plan.rows
        y_last = min(out_height, y_first + plan.rows)
        if job.last_block == plan.blocks and rest:
            for i in range((y_last - y_first) * width):
                memcpy(
                    reals + plan.lines + i * size, &gradient[n, y_first, 0, c_out - rest] + i * c_out,
                    rest * sizeof(real),
                )
        for part in range(layer.inputs):
            copy_bands(
                plan, &image[n, 0, 0, 0], image.shape[1], image.shape[2], image.shape[3],
                y_first * layer.stride_y + plan.reach.top, band_rows(plan, y_last - y_first), job.first_block,
                job.last_block, part, reals + plan.bands,
            )
            for block in range(job.last_block - job.first_block):
                first = (job.first_block + block) * size
                whole = first + size <= c_out
                space = space_in(plan, longs, block)
                band = reals + plan.bands + block * plan.band
                memset(kernel, 0, space.cells.count * size * sizeof(real))
                for y in range(y_first, y_last):
                    correlate_kernel(
                        width, space.cells.count, space.place, kernel,
                        band + (y - y_first) * layer.stride_y * plan.row * size, layer.stride_x * size,
                        &gradient[n, y, 0, first] if whole else reals + plan.lines + (y - y_first) * width * size,
                        c_out if whole else size,
                    )
                sum = sums + (job.first_block + block) * plan.kernel + part * space.cells.count * size
                for i in range(space.cells.count * size):
                    sum[i] += kernel[i]


cdef void gather_shares(
    const Plan* plan, const real[:, :, :] weight, const long[:, :, ::1] cell, const double[:, :, ::1] fraction,
    long block, double* sums, long ranges, real[:, :, ::1] grad_weight, double* grad_shares, long* longs,
) noexcept nogil:
    """From the gradient of the kernel's cells, sums[range, block, part, cell, lane], to those of the taps' weights and of
    their bilinear weights, which go to grad_shares[k, neighbour, output channel] (zeros before)."""
    cdef const Layer* layer = &plan.layer
    cdef long first = block * layer.lanes, last = min(first + layer.lanes, weight.shape[0]), part, i, lane, k, p
    cdef long position = first // layer.per_position, channels = plan.blocks * layer.lanes
    cdef int neighbour
    cdef double total[MOST_LANES]
    cdef const double* value
    cdef const double* share
    cdef Space* space = space_in(plan, longs, 0)
    cdef Cells* cells = &space.cells
    cdef const long* index
    find_block(plan, cell, fraction, first, last, True, space)
    sums += block * plan.kernel
    for part in range(1, ranges):
        for i in range(plan.kernel):
            sums[i] += sums[part * plan.blocks * plan.kernel + i]
    for k in range(layer.taps):
        for part in range(layer.inputs):
            memset(&total[0], 0, sizeof(total))
            for lane in range(last - first):
                p = (first + lane) // layer.per_position
                index = cells.index + ((p - position) * layer.taps + k) * 4
                share = cells.share + ((p - position) * layer.taps + k) * 4
                for neighbour in range(4):
                    if index[neighbour] >= 0:
                        value = sums + (part * cells.count + index[neighbour]) * layer.lanes
                        total[lane] += share[neighbour] * value[lane]
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
