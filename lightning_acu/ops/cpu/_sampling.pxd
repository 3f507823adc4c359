"""The image as one tap sees it, and the adjoint: loops over pixels, between the geometry and the vector routines."""

from libc.stdint cimport int64_t

from ._vectors cimport adjoint, blend, real

cdef struct Grid:  # of a convolution, in pixels; images are (height, width, channels), outputs count through all images
    int64_t height
    int64_t width
    int64_t channels
    int64_t out_height
    int64_t out_width
    int64_t stride_y
    int64_t stride_x


cdef struct Tap:  # seen from input pixel (oy * stride_y, ox * stride_x): its cell and the fractions above it
    int64_t row
    int64_t column
    double fraction_y
    double fraction_x


cdef inline Grid grid_of(shape, out_shape, stride):
    return Grid(shape[1], shape[2], shape[3], out_shape[1], out_shape[2], stride[0], stride[1])


cdef inline Tap tap_at(
    const int64_t[:, :, ::1] cell, const double[:, :, ::1] fraction, int64_t p, int64_t k
) noexcept nogil:
    cdef Tap tap
    tap.row, tap.column = cell[p, k, 0], cell[p, k, 1]
    tap.fraction_y, tap.fraction_x = fraction[p, k, 0], fraction[p, k, 1]
    return tap


cdef inline int64_t first_output(int64_t position, int64_t start, int64_t stride) noexcept nogil:
    """The first output pixel whose `start + output * stride` is at least `position`."""
    cdef int64_t distance = position - start
    return (distance + stride - 1) // stride if distance > 0 else 0


cdef inline void sample(
    const Grid* grid, const Tap* tap, const real* images, int64_t channel, int64_t channels, int64_t first,
    int64_t last, real* to, int64_t ld,
) noexcept nogil:
    """to[pixel - first, c] (leading dimension ld) = channel + c of the images at `tap`, output pixels first to last.

    Neighbours outside the image, and those of weight 0, are not read.
    """
    cdef int64_t pixel = first, row, image, x, x_end, y, x_first, count, end
    cdef int64_t line = grid.width * grid.channels
    cdef double share_y[2]
    cdef double share_x[2]
    cdef const real* source[4]
    cdef real share[4]
    cdef int terms, r, c
    share_y[0], share_y[1] = 1 - tap.fraction_y, tap.fraction_y
    share_x[0], share_x[1] = 1 - tap.fraction_x, tap.fraction_x
    while pixel < last:
        row = pixel // grid.out_width
        image = row // grid.out_height
        x = pixel - row * grid.out_width
        x_end = min(grid.out_width, x + last - pixel)
        y = (row - image * grid.out_height) * grid.stride_y + tap.row
        while x < x_end:  # a run of pixels that have the same neighbours inside the image
            x_first = x * grid.stride_x + tap.column
            if x_first < -1:
                end = first_output(-1, tap.column, grid.stride_x)
            elif x_first == -1:
                end = x + 1
            elif x_first < grid.width - 1:
                end = first_output(grid.width - 1, tap.column, grid.stride_x)
            elif x_first == grid.width - 1:
                end = x + 1
            else:
                end = x_end
            count = min(end, x_end) - x
            terms = 0
            for r in range(2):
                if y + r < 0 or y + r >= grid.height or share_y[r] == 0:
                    continue
                for c in range(2):
                    if x_first + c < 0 or x_first + c >= grid.width or share_x[c] == 0:
                        continue
                    source[terms] = (
                        images + (image * grid.height + y + r) * line + (x_first + c) * grid.channels + channel
                    )
                    share[terms] = <real>(share_y[r] * share_x[c])
                    terms += 1
            blend(terms, count, channels, source, share, grid.stride_x * grid.channels, to, ld)
            to += count * ld
            x += count
            pixel += count


cdef inline void spread(
    const Grid* grid, const Tap* tap, real* gradients, const real* images, int64_t channel, int64_t channels,
    int64_t first, int64_t last, const real* samples, int64_t ld, const real* zeros, double* sums,
) noexcept nogil:
    """The adjoint of `sample`: from the gradient of the samples (last - first, ld) to those of images and position.

    gradients += that of the images; NULL: not computed. sums[r, 0] += the gradient with respect to the share of row r of
    the cell, sums[r, 1] += the gradient along the columns of the part from row r; not computed where images is NULL.
    """
    cdef int64_t pixel = first, row, image, x, count, y, x_first, stride = grid.stride_x
    cdef int64_t line = grid.width * grid.channels
    cdef double share
    cdef int64_t start
    cdef real* gradient
    cdef const real* source
    cdef int r
    while pixel < last:
        row = pixel // grid.out_width
        image = row // grid.out_height
        x = pixel - row * grid.out_width
        count = min(grid.out_width - x, last - pixel)
        y = (row - image * grid.out_height) * grid.stride_y + tap.row
        x_first = x * stride + tap.column
        for r in range(2):
            share = tap.fraction_y if r else 1 - tap.fraction_y
            if y + r < 0 or y + r >= grid.height:
                continue
            start = (image * grid.height + y + r) * line + channel
            gradient = NULL if gradients == NULL or share == 0 else gradients + start
            source = <const real*>NULL if images == NULL else images + start
            if gradient == NULL and source == NULL:
                continue
            if stride == 1:  # pixel x is the left neighbour of one sample and the right neighbour of the one before
                columns(grid, tap, gradient, source, x_first, 1, 1, channels, samples, 0, zeros, 0, share, sums + 2 * r)
                columns(
                    grid, tap, gradient, source, x_first + 1, 1, count - 1, channels, samples + ld, ld, samples, ld,
                    share, sums + 2 * r,
                )
                columns(
                    grid, tap, gradient, source, x_first + count, 1, 1, channels, zeros, 0,
                    samples + (count - 1) * ld, 0, share, sums + 2 * r,
                )
            else:
                columns(
                    grid, tap, gradient, source, x_first, stride, count, channels, samples, ld, zeros, 0, share,
                    sums + 2 * r,
                )
                columns(
                    grid, tap, gradient, source, x_first + 1, stride, count, channels, zeros, 0, samples, ld, share,
                    sums + 2 * r,
                )
        samples += count * ld
        pixel += count


cdef inline void columns(
    const Grid* grid, const Tap* tap, real* gradient, const real* image, int64_t x, int64_t stride, int64_t count,
    int64_t channels, const real* here, int64_t here_step, const real* before, int64_t before_step, double share,
    double* sums,
) noexcept nogil:
    """`adjoint` for those of the `count` columns x, x + stride, ... that lie in the image."""
    cdef int64_t skip = first_output(0, x, stride)
    cdef int64_t end = min(count, first_output(grid.width, x, stride))
    if skip >= end:
        return
    x += skip * stride
    adjoint(
        end - skip, channels, NULL if gradient == NULL else gradient + x * grid.channels, <const real*>NULL if image ==
        NULL else image + x * grid.channels, stride * grid.channels, here + skip * here_step, here_step, before + skip *
        before_step, before_step, <real>share, <real>tap.fraction_x, sums,
    )
