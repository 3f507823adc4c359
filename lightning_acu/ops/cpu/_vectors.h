/* Types and constants that the CPU kernels and their vector routines share. */
#ifndef LIGHTNING_ACU_VECTORS_H
#define LIGHTNING_ACU_VECTORS_H

#include <stddef.h>
#include <stdint.h>

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

#define DECLARE_ROUTINES(REAL, type)                                                                                   \
    typedef struct {                                                                                                   \
        int lanes, tile_rows;                                                                                          \
        void (*multiply_rows)(int64_t, int64_t, int64_t, const REAL *, const REAL *, int64_t, REAL *, int64_t,         \
                              const REAL *, int);                                                                      \
        void (*multiply_transposed)(int64_t, int, int64_t, const REAL *, const REAL *, REAL *, int64_t, int);          \
        void (*blend)(int, int64_t, int64_t, const REAL *const *, const REAL *, int64_t, REAL *, int64_t);             \
        void (*adjoint)(int64_t, int64_t, REAL *, const REAL *, int64_t, const REAL *, int64_t, const REAL *, int64_t, \
                        REAL, REAL, double *);                                                                         \
        void (*copy)(int64_t, const REAL *, int64_t, REAL *);                                                          \
        void (*spread_taps)(int64_t, const int64_t *, const double *, int64_t, int64_t, const REAL *const *, int64_t,  \
                            REAL *);                                                                                   \
        void (*correlate)(int64_t, int64_t, const int64_t *, const REAL *, const REAL *, int64_t, const REAL *,        \
                          REAL *, int64_t);                                                                            \
        void (*correlate_kernel)(int64_t, int64_t, const int64_t *, REAL *, const REAL *, int64_t, const REAL *,       \
                                 int64_t);                                                                             \
        void (*sample_panel)(int64_t, const int64_t *, const REAL *, const int *, int64_t, int64_t, const REAL *,      \
                             REAL *);                                                                                  \
        void (*multiply_moved)(int64_t, int64_t, const int64_t *, int64_t, int64_t, const REAL *, const REAL *, REAL *, \
                               int64_t);                                                                               \
        void (*sample_row)(int64_t, const int64_t *, const REAL *, const REAL *, REAL *, const REAL *, double *);      \
        void (*gather_row)(int64_t, int64_t, const int64_t *, const REAL *, const REAL *, REAL *);                     \
        void (*dot_panels)(int64_t, int64_t, int64_t, const REAL *, int64_t, const REAL *, int64_t, REAL *, int64_t,   \
                           int64_t);                                                                                   \
        int (*all_finite)(int64_t, const REAL *);                                                                      \
    } type;
DECLARE_ROUTINES(float, routines_f32)
DECLARE_ROUTINES(double, routines_f64)

#endif
