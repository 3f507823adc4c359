/* Transposition in blocks of 4 x 4, in registers: packing a weight is as much memory traffic as a small layer itself. */
#ifndef LIGHTNING_ACU_TRANSPOSE_H
#define LIGHTNING_ACU_TRANSPOSE_H

#include <stdint.h>

typedef float four_floats __attribute__((vector_size(16), aligned(4), may_alias));

/* to[c * to_step + r] = from[r * from_step + c] */
static void transpose_f32(int64_t rows, int64_t columns, const float *from, int64_t from_step, float *to,
                          int64_t to_step) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *row = from + r * from_step;
        int64_t c = 0;
        for (; c + 4 <= columns; c += 4) {
            four_floats a = *(const four_floats *)(row + c), b = *(const four_floats *)(row + from_step + c);
            four_floats e = *(const four_floats *)(row + 2 * from_step + c);
            four_floats f = *(const four_floats *)(row + 3 * from_step + c);
            four_floats ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            four_floats ef_low = __builtin_shufflevector(e, f, 0, 4, 1, 5), ef_high = __builtin_shufflevector(e, f, 2, 6, 3, 7);
            float *out = to + c * to_step + r;
            *(four_floats *)out = __builtin_shufflevector(ab_low, ef_low, 0, 1, 4, 5);
            *(four_floats *)(out + to_step) = __builtin_shufflevector(ab_low, ef_low, 2, 3, 6, 7);
            *(four_floats *)(out + 2 * to_step) = __builtin_shufflevector(ab_high, ef_high, 0, 1, 4, 5);
            *(four_floats *)(out + 3 * to_step) = __builtin_shufflevector(ab_high, ef_high, 2, 3, 6, 7);
        }
        for (; c < columns; c++)
            for (int64_t i = 0; i < 4; i++) to[c * to_step + r + i] = row[i * from_step + c];
    }
    for (; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) to[c * to_step + r] = from[r * from_step + c];
}

#endif
