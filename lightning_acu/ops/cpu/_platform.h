/* What differs between operating systems and processors: aligned memory, and the instruction sets that can run. */
#ifndef LIGHTNING_ACU_PLATFORM_H
#define LIGHTNING_ACU_PLATFORM_H

#include <stddef.h>
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define ALIGNMENT 64 /* bytes: a line of the cache, the widest vector */

/* `size` bytes for `free_aligned`, or NULL. */
static void *allocate_aligned(size_t size) {
#if defined(_WIN32)
    return _aligned_malloc(size, ALIGNMENT);
#else
    void *data = NULL;
    return posix_memalign(&data, ALIGNMENT, size) ? NULL : data;
#endif
}

static void free_aligned(void *data) {
#if defined(_WIN32)
    _aligned_free(data);
#else
    free(data);
#endif
}

/* 0: baseline, 1: AVX2 and FMA, 2: AVX-512. What this processor and its operating system can run.
 * Not by __builtin_cpu_supports: under clang-cl that needs a library of Clang's, which the linker does not find. */
static int best_isa(void) {
#if defined(__x86_64__)
    unsigned a, b, c, d, saved, high;
    const unsigned avx512 = bit_AVX512F | bit_AVX512VL | bit_AVX512BW | bit_AVX512DQ;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0)); /* the registers that the operating system saves */
    if ((saved & 0x06) != 0x06 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    return (saved & 0xe6) == 0xe6 && (b & avx512) == avx512 ? 2 : 1;
#else
    return 0;
#endif
}

#endif
