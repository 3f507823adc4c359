"""The vector routines of _vector_routines.h for the instruction set in use, one name for float and double."""

ctypedef fused real:
    float
    double

cdef extern from "_vectors.h" nogil:
    const long DEPTH  # of a block of the matrix product
    const long DEPTH_STRIDE  # from one row of such a block to the next

    ctypedef struct routines_f32:
        int lanes
        int tile_rows
        void (*multiply_rows)(long, long, long, const float*, const float*, long, float*, long, const float*, int) noexcept nogil
        void (*multiply_transposed)(long, int, long, const float*, const float*, float*, long, int) noexcept nogil
        void (*blend)(int, long, long, const float**, const float*, long, float*, long) noexcept nogil
        void (*adjoint)(
            long, long, float*, const float*, long, const float*, long, const float*, long, float, float, double*
        ) noexcept nogil
        void (*copy)(long, const float*, long, float*) noexcept nogil
        void (*spread_taps)(long, const long*, const double*, long, long, const float**, long, float*) noexcept nogil
        void (*correlate)(long, long, const long*, const float*, const float*, long, const float*, float*, long) noexcept nogil
        void (*correlate_kernel)(long, long, const long*, float*, const float*, long, const float*, long) noexcept nogil

    ctypedef struct routines_f64:
        int lanes
        int tile_rows
        void (*multiply_rows)(long, long, long, const double*, const double*, long, double*, long, const double*, int) noexcept nogil
        void (*multiply_transposed)(long, int, long, const double*, const double*, double*, long, int) noexcept nogil
        void (*blend)(int, long, long, const double**, const double*, long, double*, long) noexcept nogil
        void (*adjoint)(
            long, long, double*, const double*, long, const double*, long, const double*, long, double, double, double*
        ) noexcept nogil
        void (*copy)(long, const double*, long, double*) noexcept nogil
        void (*spread_taps)(long, const long*, const double*, long, long, const double**, long, double*) noexcept nogil
        void (*correlate)(long, long, const long*, const double*, const double*, long, const double*, double*, long) noexcept nogil
        void (*correlate_kernel)(long, long, const long*, double*, const double*, long, const double*, long) noexcept nogil

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
    long rows, long columns, long depth, const real* a, const real* b, long panel_step, real* c, long ldc,
    const real* start, int accumulate,
) noexcept nogil:
    if real is float:
        f32.multiply_rows(rows, columns, depth, a, b, panel_step, c, ldc, start, accumulate)
    else:
        f64.multiply_rows(rows, columns, depth, a, b, panel_step, c, ldc, start, accumulate)


cdef inline void multiply_transposed(
    long rows, int columns, long depth, const real* a, const real* b, real* c, long ldc, int accumulate
) noexcept nogil:
    if real is float:
        f32.multiply_transposed(rows, columns, depth, a, b, c, ldc, accumulate)
    else:
        f64.multiply_transposed(rows, columns, depth, a, b, c, ldc, accumulate)


cdef inline void blend(
    int terms, long pixels, long channels, const real** source, const real* share, long step, real* to, long ld
) noexcept nogil:
    if real is float:
        f32.blend(terms, pixels, channels, source, share, step, to, ld)
    else:
        f64.blend(terms, pixels, channels, source, share, step, to, ld)


cdef inline void adjoint(
    long pixels, long channels, real* gradient, const real* image, long step, const real* here, long here_step,
    const real* before, long before_step, real row_share, real fraction, double* sums,
) noexcept nogil:
    if real is float:
        f32.adjoint(
            pixels, channels, gradient, image, step, here, here_step, before, before_step, row_share, fraction, sums
        )
    else:
        f64.adjoint(
            pixels, channels, gradient, image, step, here, here_step, before, before_step, row_share, fraction, sums
        )


cdef inline void copy(long pixels, const real* source, long step, real* to) noexcept nogil:
    if real is float:
        f32.copy(pixels, source, step, to)
    else:
        f64.copy(pixels, source, step, to)


cdef inline void spread_taps(
    long taps, const long* index, const double* share, long first, long last, const real** source, long step, real* kernel
) noexcept nogil:
    if real is float:
        f32.spread_taps(taps, index, share, first, last, source, step, kernel)
    else:
        f64.spread_taps(taps, index, share, first, last, source, step, kernel)


cdef inline void correlate(
    long pixels, long cells, const long* place, const real* kernel, const real* source, long source_step,
    const real* start, real* to, long to_step,
) noexcept nogil:
    if real is float:
        f32.correlate(pixels, cells, place, kernel, source, source_step, start, to, to_step)
    else:
        f64.correlate(pixels, cells, place, kernel, source, source_step, start, to, to_step)


cdef inline void correlate_kernel(
    long pixels, long cells, const long* place, real* kernel, const real* source, long source_step, const real* to,
    long to_step,
) noexcept nogil:
    if real is float:
        f32.correlate_kernel(pixels, cells, place, kernel, source, source_step, to, to_step)
    else:
        f64.correlate_kernel(pixels, cells, place, kernel, source, source_step, to, to_step)
