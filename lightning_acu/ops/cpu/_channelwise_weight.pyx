# distutils: language = c
"""Active convolution channel by channel: the gradients of weights and positions. See `_channelwise.pyx`."""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from ._bands cimport Plan, Space, band_rows, copy_bands, find_block, plan_of, space_in
from ._cells cimport MOST_LANES, Cells, Layer
from ._jobs cimport Job, begin, job_at, integers_of, zeros
from ._packing cimport ceil_div
from ._vectors cimport Buffer, correlate_kernel, lanes, real

cdef enum:
    PARTS = 32  # at most so many ranges of strips have sums of their own for the kernel's gradient: work for threads


def backward_kernel(
    const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image, const real[:, :, :] weight,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t groups, stride,
    real[:, :, ::1] grad_weight, double[:, :, ::1] grad_cell, int threads,
):
    """grad_weight OUT (C_out, C_in/groups, K); grad_cell INOUT (P, K, 2), added to; gradient IN (N, H_out, W_out,
    C_out)."""
    cdef Plan plan = plan_of(
        image.shape, weight.shape, gradient.shape, cell, fraction, groups, stride, lanes(<real*>NULL), True, True,
        threads,
    )
    cdef int64_t strips = gradient.shape[0] * plan.strips, jobs = ceil_div(plan.blocks, plan.together), i
    cdef int64_t ranges = max(1, min(strips, PARTS // plan.blocks))  # of sums, so it must not depend on threads
    cdef Buffer integers = integers_of(&plan, threads), reals = Buffer(threads * plan.reals, sizeof(real))
    cdef Buffer sums = zeros(ranges * plan.blocks * plan.kernel, sizeof(double))
    cdef Buffer shares = zeros(plan.layer.taps * 4 * plan.blocks * plan.layer.lanes, sizeof(double))
    for i in prange(jobs * ranges, nogil=True, num_threads=threads, schedule="static"):
        backward_kernel_job(
            &plan, job_at(&plan, jobs, ranges, strips, i), gradient, image, cell, fraction,
            <double*>sums.data + i // jobs * plan.blocks * plan.kernel,
            <int64_t*>integers.data + threadid() * plan.integers, <real*>reals.data + threadid() * plan.reals,
        )
    for i in prange(plan.blocks, nogil=True, num_threads=threads, schedule="static"):
        gather_shares(
            &plan, weight, cell, fraction, i, <double*>sums.data, ranges, grad_weight, <double*>shares.data,
            <int64_t*>integers.data + threadid() * plan.integers,
        )
    positions_from_shares(&plan, fraction, <double*>shares.data, grad_cell)


cdef void backward_kernel_job(
    const Plan* plan, Job job, const real[:, :, :, ::1] gradient, const real[:, :, :, ::1] image,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, double* sums, int64_t* integers, real* reals,
) noexcept nogil:
    """sums[block, part, cell, lane] += the gradient of the kernel."""
    cdef const Layer* layer = &plan.layer
    cdef int64_t out_height = gradient.shape[1], width = gradient.shape[2], c_out = gradient.shape[3]
    cdef int64_t size = layer.lanes
    cdef int64_t strip, n, y, y_first, y_last, part, block, first, i, rest = c_out % size
    cdef Space* space
    cdef real* kernel = reals + plan.kernels
    cdef real* band
    cdef double* sum
    cdef bint whole
    begin(plan, integers, reals)
    for block in range(job.last_block - job.first_block):
        first = (job.first_block + block) * size
        find_block(plan, cell, fraction, first, min(first + size, c_out), True, space_in(plan, integers, block))
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
                space = space_in(plan, integers, block)
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
    const Plan* plan, const real[:, :, :] weight, const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction,
    int64_t block, double* sums, int64_t ranges, real[:, :, ::1] grad_weight, double* grad_shares, int64_t* integers,
) noexcept nogil:
    """From the gradient of the kernel's cells, sums[range, block, part, cell, lane], to those of the taps' weights and of
    their bilinear weights, which go to grad_shares[k, neighbour, output channel] (zeros on entry)."""
    cdef const Layer* layer = &plan.layer
    cdef int64_t first = block * layer.lanes, last = min(first + layer.lanes, weight.shape[0]), part, i, lane, k, p
    cdef int64_t position = first // layer.per_position, channels = plan.blocks * layer.lanes
    cdef int neighbour
    cdef double total[MOST_LANES]
    cdef const double* value
    cdef const double* share
    cdef Space* space = space_in(plan, integers, 0)
    cdef Cells* cells = &space.cells
    cdef const int64_t* index
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
    cdef int64_t p, k, channel, size = plan.layer.per_position, channels = plan.blocks * plan.layer.lanes
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
