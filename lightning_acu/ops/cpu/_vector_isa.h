/* The instruction sets: _vector_routines.h compiled for each, and the choice among them when the module is loaded.
 *
 * One binary serves every x86-64 and arm64 processor: baseline (SSE2 or NEON), AVX2 + FMA, AVX-512. */
#include <stddef.h>
#include <string.h>

#include "_vectors.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

/* --- baseline */
#if defined(__aarch64__)
#define TILE_ROWS 12 /* 32 registers */
#else
#define TILE_ROWS 4 /* 16 registers */
#endif
#define BYTES 16
#define ISA base
#include "_vector_types.h"

#if defined(__x86_64__)
/* --- AVX2 and FMA: 16 registers of 32 bytes */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define TILE_ROWS 6
#define BYTES 32
#define ISA avx2
#include "_vector_types.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* --- AVX-512: 32 registers of 64 bytes */
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define TILE_ROWS 12
#define BYTES 64
#define ISA avx512
#include "_vector_types.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif /* x86-64 */

static const routines_f32 *routines_f32_for(int isa) {
#if defined(__x86_64__)
    if (isa == 2) return &table_f32_avx512;
    if (isa == 1) return &table_f32_avx2;
#endif
    (void)isa;
    return &table_f32_base;
}

static const routines_f64 *routines_f64_for(int isa) {
#if defined(__x86_64__)
    if (isa == 2) return &table_f64_avx512;
    if (isa == 1) return &table_f64_avx2;
#endif
    (void)isa;
    return &table_f64_base;
}
