"""The vector routines of _vector_routines.h for the instruction set in use, one name for float and double."""

from libc.stdint cimport int64_t

ctypedef fused real:
    float
    double

cdef extern from "_vectors.h" nogil:
    const int64_t DEPTH  # of a block of the matrix product
    const int64_t DEPTH_STRIDE  # from one row of such a block to the next

    ctypedef struct routines_f32:
        int lanes
        int tile_rows
        void (*multiply_rows)(
            int64_t, int64_t, int64_t, const float*, const float*, int64_t, float*, int64_t, const float*, int
        ) noexcept nogil
        void (*multiply_transposed)(
            int64_t, int, int64_t, const float*, const float*, float*, int64_t, int
        ) noexcept nogil
        void (*blend)(int, int64_t, int64_t, const float**, const float*, int64_t, float*, int64_t) noexcept nogil
        void (*adjoint)(
            int64_t, int64_t, float*, const float*, int64_t, const float*, int64_t, const float*, int64_t, float, float,
            double*
        ) noexcept nogil
        void (*copy)(int64_t, const float*, int64_t, float*) noexcept nogil
        void (*spread_taps)(
            int64_t, const int64_t*, const double*, int64_t, int64_t, const float**, int64_t, float*
        ) noexcept nogil
        void (*correlate)(
            int64_t, int64_t, const int64_t*, const float*, const float*, int64_t, const float*, float*, int64_t
        ) noexcept nogil
        void (*correlate_kernel)(
            int64_t, int64_t, const int64_t*, float*, const float*, int64_t, const float*, int64_t
        ) noexcept nogil
        void (*sample_panel)(
            int64_t, const int64_t*, const float*, const int*, int64_t, int64_t, const float*, float*
        ) noexcept nogil
        void (*multiply_moved)(
            int64_t, int64_t, const int64_t*, int64_t, int64_t, const float*, const float*, float*, int64_t
        ) noexcept nogil
        void (*sample_row)(
            int64_t, const int64_t*, const float*, const float*, float*, const float*, double*
        ) noexcept nogil
        void (*gather_row)(int64_t, int64_t, const int64_t*, const float*, const float*, float*) noexcept nogil
        void (*dot_panels)(
            int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t
        ) noexcept nogil
        int (*all_finite)(int64_t, const float*) noexcept nogil

    ctypedef struct routines_f64:
        int lanes
        int tile_rows
        void (*multiply_rows)(
            int64_t, int64_t, int64_t, const double*, const double*, int64_t, double*, int64_t, const double*, int
        ) noexcept nogil
        void (*multiply_transposed)(
            int64_t, int, int64_t, const double*, const double*, double*, int64_t, int
        ) noexcept nogil
        void (*blend)(int, int64_t, int64_t, const double**, const double*, int64_t, double*, int64_t) noexcept nogil
        void (*adjoint)(
            int64_t, int64_t, double*, const double*, int64_t, const double*, int64_t, const double*, int64_t,
            double, double, double*
        ) noexcept nogil
        void (*copy)(int64_t, const double*, int64_t, double*) noexcept nogil
        void (*spread_taps)(
            int64_t, const int64_t*, const double*, int64_t, int64_t, const double**, int64_t, double*
        ) noexcept nogil
        void (*correlate)(
            int64_t, int64_t, const int64_t*, const double*, const double*, int64_t, const double*, double*, int64_t
        ) noexcept nogil
        void (*correlate_kernel)(
            int64_t, int64_t, const int64_t*, double*, const double*, int64_t, const double*, int64_t
        ) noexcept nogil
        void (*sample_panel)(
            int64_t, const int64_t*, const double*, const int*, int64_t, int64_t, const double*, double*
        ) noexcept nogil
        void (*multiply_moved)(
            int64_t, int64_t, const int64_t*, int64_t, int64_t, const double*, const double*, double*, int64_t
        ) noexcept nogil
        void (*sample_row)(
            int64_t, const int64_t*, const double*, const double*, double*, const double*, double*
        ) noexcept nogil
        void (*gather_row)(int64_t, int64_t, const int64_t*, const double*, const double*, double*) noexcept nogil
        void (*dot_panels)(
            int64_t, int64_t, int64_t, const double*, int64_t, const double*, int64_t, double*, int64_t, int64_t
        ) noexcept nogil
        int (*all_finite)(int64_t, const double*) noexcept nogil

cdef class Buffer:
    """`count` numbers of `size` bytes, aligned for vectors; freed with the object. MemoryError where there is none left."""

    cdef void* data
    cdef size_t size

cdef const routines_f32* f32
cdef const routines_f64* f64


cdef inline int lanes(const real* type) noexcept nogil:
    return f32.lanes if real is float else f64.lanes


cdef inline int tile_rows(const real* type) noexcept nogil:
    return f32.tile_rows if real is float else f64.tile_rows


cdef inline void multiply_rows(
    int64_t rows, int64_t columns, int64_t depth, const real* a, const real* b, int64_t panel_step, real* c,
    int64_t ldc, const real* start, int accumulate,
) noexcept nogil:
    if real is float:
        f32.multiply_rows(rows, columns, depth, a, b, panel_step, c, ldc, start, accumulate)
    else:
        f64.multiply_rows(rows, columns, depth, a, b, panel_step, c, ldc, start, accumulate)


cdef inline void multiply_transposed(
    int64_t rows, int columns, int64_t depth, const real* a, const real* b, real* c, int64_t ldc, int accumulate
) noexcept nogil:
    if real is float:
        f32.multiply_transposed(rows, columns, depth, a, b, c, ldc, accumulate)
    else:
        f64.multiply_transposed(rows, columns, depth, a, b, c, ldc, accumulate)


cdef inline void blend(
    int terms, int64_t pixels, int64_t channels, const real** source, const real* share, int64_t step, real* to,
    int64_t ld
) noexcept nogil:
    if real is float:
        f32.blend(terms, pixels, channels, source, share, step, to, ld)
    else:
        f64.blend(terms, pixels, channels, source, share, step, to, ld)


cdef inline void adjoint(
    int64_t pixels, int64_t channels, real* gradient, const real* image, int64_t step, const real* here,
    int64_t here_step, const real* before, int64_t before_step, real row_share, real fraction, double* sums,
) noexcept nogil:
    if real is float:
        f32.adjoint(
            pixels, channels, gradient, image, step, here, here_step, before, before_step, row_share, fraction, sums
        )
    else:
        f64.adjoint(
            pixels, channels, gradient, image, step, here, here_step, before, before_step, row_share, fraction, sums
        )


cdef inline void copy(int64_t pixels, const real* source, int64_t step, real* to) noexcept nogil:
    if real is float:
        f32.copy(pixels, source, step, to)
    else:
        f64.copy(pixels, source, step, to)


cdef inline void spread_taps(
    int64_t taps, const int64_t* index, const double* share, int64_t first, int64_t last, const real** source,
    int64_t step, real* kernel
) noexcept nogil:
    if real is float:
        f32.spread_taps(taps, index, share, first, last, source, step, kernel)
    else:
        f64.spread_taps(taps, index, share, first, last, source, step, kernel)


cdef inline void correlate(
    int64_t pixels, int64_t cells, const int64_t* place, const real* kernel, const real* source, int64_t source_step,
    const real* start, real* to, int64_t to_step,
) noexcept nogil:
    if real is float:
        f32.correlate(pixels, cells, place, kernel, source, source_step, start, to, to_step)
    else:
        f64.correlate(pixels, cells, place, kernel, source, source_step, start, to, to_step)


cdef inline void correlate_kernel(
    int64_t pixels, int64_t cells, const int64_t* place, real* kernel, const real* source, int64_t source_step,
    const real* to, int64_t to_step,
) noexcept nogil:
    if real is float:
        f32.correlate_kernel(pixels, cells, place, kernel, source, source_step, to, to_step)
    else:
        f64.correlate_kernel(pixels, cells, place, kernel, source, source_step, to, to_step)


cdef inline void sample_panel(
    int64_t taps, const int64_t* place, const real* share, const int* terms, int64_t channels, int64_t step,
    const real* source, real* to,
) noexcept nogil:
    if real is float:
        f32.sample_panel(taps, place, share, terms, channels, step, source, to)
    else:
        f64.sample_panel(taps, place, share, terms, channels, step, source, to)


cdef inline void multiply_moved(
    int64_t rows, int64_t taps, const int64_t* place, int64_t channels, int64_t step, const real* source,
    const real* a, real* c, int64_t ldc,
) noexcept nogil:
    if real is float:
        f32.multiply_moved(rows, taps, place, channels, step, source, a, c, ldc)
    else:
        f64.multiply_moved(rows, taps, place, channels, step, source, a, c, ldc)


cdef inline void sample_row(
    int64_t count, const int64_t* place, const real* share, const real* source, real* to, const real* gradient,
    double* sums,
) noexcept nogil:
    if real is float:
        f32.sample_row(count, place, share, source, to, gradient, sums)
    else:
        f64.sample_row(count, place, share, source, to, gradient, sums)


cdef inline void gather_row(
    int64_t count, int64_t terms, const int64_t* place, const real* share, const real* source, real* to
) noexcept nogil:
    if real is float:
        f32.gather_row(count, terms, place, share, source, to)
    else:
        f64.gather_row(count, terms, place, share, source, to)


cdef inline void dot_panels(
    int64_t rows, int64_t columns, int64_t panels, const real* a, int64_t a_step, const real* b, int64_t b_step,
    real* c, int64_t c_row, int64_t c_column,
) noexcept nogil:
    if real is float:
        f32.dot_panels(rows, columns, panels, a, a_step, b, b_step, c, c_row, c_column)
    else:
        f64.dot_panels(rows, columns, panels, a, a_step, b, b_step, c, c_row, c_column)


cdef inline bint all_finite(int64_t count, const real* source) noexcept nogil:
    if real is float:
        return f32.all_finite(count, source)
    else:
        return f64.all_finite(count, source)
