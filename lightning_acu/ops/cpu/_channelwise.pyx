# distutils: language = c
"""Active convolution channel by channel, for depthwise layers and small groups, on channels_last images.

Every tap's weight is spread over the integer cells around it, and each distinct cell costs one load and one
multiply-add for a block of LANES channels: no matrix product. A band of rows of such a block is copied with a rim of
zeros first: it stays in the cache, and no cell needs a test for the border. Work is cut by geometry alone and no two
threads add to the same number: results do not depend on their number. Arguments as in `_product.pyx`.
"""

from cython.parallel cimport prange, threadid
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from ._bands cimport Plan, Space, band_rows, copy_bands, copy_lines, find_block, find_block_of_inputs, plan_of, space_in
from ._cells cimport Layer, spread_weight
from ._jobs cimport Job, begin, job_at, integers_of, ranges_of
from ._packing cimport ceil_div
from ._vectors cimport Buffer, correlate, lanes, real


def forward(
    const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias, const int64_t[:, :, ::1] cell,
    const double[:, :, ::1] fraction, int64_t groups, stride, real[:, :, :, ::1] output, int threads,
):
    """output OUT (N, H_out, W_out, C_out); image IN (N, H, W, C_in); weight IN (C_out, C_in/groups, K), any strides;
    bias IN (C_out,) or None; cell and fraction IN (P, K, 2)."""
    cdef Plan plan = plan_of(
        image.shape, weight.shape, output.shape, cell, fraction, groups, stride, lanes(<real*>NULL), True, False,
        threads
    )
    cdef int64_t strips = output.shape[0] * plan.strips, jobs = ceil_div(plan.blocks, plan.together), i
    cdef int64_t ranges = ranges_of(&plan, jobs, strips, output.shape[1] * output.shape[2], threads)
    cdef Buffer integers = integers_of(&plan, threads), reals = Buffer(threads * plan.reals, sizeof(real))
    for i in prange(jobs * ranges, nogil=True, num_threads=threads, schedule="static"):
        forward_job(
            &plan, job_at(&plan, jobs, ranges, strips, i), image, weight, bias, cell, fraction, output,
            <int64_t*>integers.data + threadid() * plan.integers, <real*>reals.data + threadid() * plan.reals,
        )


cdef void forward_job(
    const Plan* plan, Job job, const real[:, :, :, ::1] image, const real[:, :, :] weight, const real[::1] bias,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, real[:, :, :, ::1] output, int64_t* integers,
    real* reals,
) noexcept nogil:
    cdef const Layer* layer = &plan.layer
    cdef int64_t out_height = output.shape[1], width = output.shape[2], c_out = output.shape[3], size = layer.lanes
    cdef int64_t strip, n, y, y_first, y_last, part, block, first, last
    cdef Space* space
    cdef real* kernel
    cdef real* band
    cdef bint whole
    begin(plan, integers, reals)
    for block in range(job.last_block - job.first_block):
        first = (job.first_block + block) * size
        last = min(first + size, c_out)
        space = space_in(plan, integers, block)
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
                space = space_in(plan, integers, block)
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
    const real[:, :, :, ::1] gradient, const real[:, :, :] weight, const int64_t[:, :, ::1] cell,
    const double[:, :, ::1] fraction, int64_t groups, stride, real[:, :, :, ::1] grad_image, int threads,
):
    """grad_image OUT (N, H, W, C_in); gradient IN (N, H_out, W_out, C_out)."""
    cdef Plan plan = plan_of(
        grad_image.shape, weight.shape, gradient.shape, cell, fraction, groups, stride, lanes(<real*>NULL), False,
        False, threads,
    )
    cdef int64_t strips = gradient.shape[0] * plan.strips, jobs = ceil_div(plan.blocks, plan.together), i
    cdef int64_t ranges = ranges_of(&plan, jobs, strips, grad_image.shape[1] * grad_image.shape[2], threads)
    cdef Buffer integers = integers_of(&plan, threads), reals = Buffer(threads * plan.reals, sizeof(real))
    for i in prange(jobs * ranges, nogil=True, num_threads=threads, schedule="static"):
        backward_image_job(
            &plan, job_at(&plan, jobs, ranges, strips, i), gradient, weight, cell, fraction, grad_image,
            <int64_t*>integers.data + threadid() * plan.integers, <real*>reals.data + threadid() * plan.reals,
        )


cdef void backward_image_job(
    const Plan* plan, Job job, const real[:, :, :, ::1] gradient, const real[:, :, :] weight,
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, real[:, :, :, ::1] grad_image, int64_t* integers,
    real* reals,
) noexcept nogil:
    cdef const Layer* layer = &plan.layer
    cdef int64_t height = grad_image.shape[1], width = grad_image.shape[2], c_in = grad_image.shape[3]
    cdef int64_t size = layer.lanes
    cdef int64_t sy = layer.stride_y, sx = layer.stride_x, steps = ceil_div(height, sy)
    cdef int64_t strip, n, y, y_first, y_last, part, block, first, last, c, row, column
    cdef Space* space
    cdef real* kernel
    cdef real* band
    cdef bint whole
    begin(plan, integers, reals)
    for block in range(job.last_block - job.first_block):
        first = (job.first_block + block) * size
        last = min(first + size, c_in)
        space = space_in(plan, integers, block)
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
                space = space_in(plan, integers, block)
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
