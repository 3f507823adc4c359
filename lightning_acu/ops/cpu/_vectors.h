/* Types and constants that the CPU kernels and their vector routines share. */
#ifndef LIGHTNING_ACU_VECTORS_H
#define LIGHTNING_ACU_VECTORS_H

#include <stddef.h>

/* Depth of a block of the matrix product, and the distance of its rows: not a power of two, which would map all rows
 * to the same few cache sets. */
#define DEPTH 256
#define DEPTH_STRIDE (DEPTH + 16)

#ifdef _OPENMP
#define HAS_OPENMP 1
#else
#define HAS_OPENMP 0
#endif

/* Bytes of memory kept for the next calls; none where a sanitizer has to see every block. */
#ifdef __SANITIZE_ADDRESS__
#define KEPT ((size_t)0)
#else
#define KEPT ((size_t)32 << 20)
#endif

#define DECLARE_ROUTINES(REAL, type)                                                                                  \
    typedef struct {                                                                                                  \
        int lanes, tile_rows;                                                                                         \
        void (*multiply_rows)(long, long, long, const REAL *, const REAL *, long, REAL *, long, const REAL *, int);   \
        void (*multiply_transposed)(long, int, long, const REAL *, const REAL *, REAL *, long, int);                  \
        void (*blend)(int, long, long, const REAL *const *, const REAL *, long, REAL *, long);                        \
        void (*adjoint)(long, long, REAL *, const REAL *, long, const REAL *, long, const REAL *, long, REAL, REAL,   \
                        double *);                                                                                    \
        void (*copy)(long, const REAL *, long, REAL *);                                                               \
        void (*spread_taps)(long, const long *, const double *, long, long, const REAL *const *, long, REAL *);       \
        void (*correlate)(long, long, const long *, const REAL *, const REAL *, long, const REAL *, REAL *, long);    \
        void (*correlate_kernel)(long, long, const long *, REAL *, const REAL *, long, const REAL *, long);           \
    } type;
DECLARE_ROUTINES(float, routines_f32)
DECLARE_ROUTINES(double, routines_f64)

#endif
