/* The inner loops of the CPU kernels, written with GCC/Clang vector extensions.
 *
 * No include guard: _vector_isa.h includes this file once for each instruction set and element type, with
 *   REAL       float or double
 *   REAL_BYTES of one element
 *   BYTES      of one vector register
 *   TILE_ROWS  rows of a matrix tile: TILE_ROWS * 2 accumulators fill the registers
 *   NAME(x)    x with the instruction set and the type appended
 * Pointers never overlap unless a comment says so. Sizes count elements, not bytes.
 */

#define LANES (BYTES / REAL_BYTES)
#define WIDTH (2 * LANES) /* columns of a matrix tile and of a packed panel */

/* Loads and stores of any alignment, as float or double arrays have it. */
typedef REAL NAME(vec) __attribute__((vector_size(BYTES), aligned(sizeof(REAL)), may_alias));
#define VEC NAME(vec)
#define AT(pointer) (*(VEC *)(pointer))
#define READ(pointer) (*(const VEC *)(pointer))

/* ---- matrix product: c (rows x columns) = or += a (rows x depth) * b (depth x WIDTH) ----------------------------
 * a[row * row_step + d * depth_step]; row_step and depth_step are constants after inlining, so that all rows are
 * addressed from one register. Sums run over d in order and one accumulator holds each, so the result does not depend
 * on how rows are cut into tiles. */
ALWAYS_INLINE void NAME(tile)(const int rows, const int vectors, int64_t depth, const REAL *a, const int64_t row_step,
                              const int64_t depth_step, const REAL *b, REAL *to, int64_t ld) {
    VEC sum[TILE_ROWS][2];
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = (VEC){0};
    for (int64_t d = 0; d < depth; d++) {
        VEC panel[2];
        UNROLL for (int v = 0; v < vectors; v++) panel[v] = READ(b + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            REAL value = a[i * row_step];
            UNROLL for (int v = 0; v < vectors; v++) sum[i][v] += value * panel[v];
        }
        a += depth_step;
        b += WIDTH;
    }
    UNROLL for (int i = 0; i < rows; i++) UNROLL for (int v = 0; v < vectors; v++) AT(to + i * ld + v * LANES) = sum[i][v];
}

/* c = start + product, or c += product where accumulate. */
static void NAME(store)(int rows, int columns, const REAL *product, REAL *c, int64_t ldc, const REAL *start,
                        int accumulate) {
    for (int i = 0; i < rows; i++, c += ldc, product += WIDTH)
        if (accumulate)
            for (int j = 0; j < columns; j++) c[j] += product[j];
        else if (start)
            for (int j = 0; j < columns; j++) c[j] = start[j] + product[j];
        else
            memcpy(c, product, columns * sizeof(REAL));
}

#define TILE_CASE(n)                                                                                 \
    case n:                                                                                          \
        if (columns > LANES) NAME(tile)(n, 2, depth, a, row_step, depth_step, b, to, ld);            \
        else NAME(tile)(n, 1, depth, a, row_step, depth_step, b, to, ld);                            \
        break;
ALWAYS_INLINE void NAME(any_tile)(int rows, int64_t depth, const REAL *a, const int64_t row_step,
                                  const int64_t depth_step, const REAL *b, REAL *c, int64_t ldc, const REAL *start,
                                  int accumulate, int columns) {
    VEC product[TILE_ROWS * 2];
    int direct = columns == WIDTH && !start && !accumulate;
    REAL *to = direct ? c : (REAL *)product;
    int64_t ld = direct ? ldc : WIDTH;
    switch (rows) {
        TILE_CASE(1) TILE_CASE(2) TILE_CASE(3) TILE_CASE(4)
#if TILE_ROWS > 4
        TILE_CASE(5) TILE_CASE(6)
#endif
#if TILE_ROWS > 6
        TILE_CASE(7) TILE_CASE(8) TILE_CASE(9) TILE_CASE(10) TILE_CASE(11) TILE_CASE(12)
#endif
    }
    if (!direct) NAME(store)(rows, columns, (const REAL *)product, c, ldc, start, accumulate);
}

/* c (rows x columns, leading dimension ldc) = start + a b, or c += a b where accumulate.
 * a: (rows x depth), leading dimension DEPTH_STRIDE.  b: panels of WIDTH columns, panel_step apart, each (depth x WIDTH),
 * padded with zeros.  start: (columns) or NULL. */
static void NAME(multiply_rows)(int64_t rows, int64_t columns, int64_t depth, const REAL *a, const REAL *b,
                                int64_t panel_step, REAL *c, int64_t ldc, const REAL *start, int accumulate) {
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t j = 0; j < columns; j += WIDTH, b += panel_step) {
        int width = columns - j < WIDTH ? (int)(columns - j) : WIDTH;
        for (int64_t t = 0, i = 0; t < tiles; t++) { /* tiles of nearly equal height: a last one of 1 row is slow */
            int height = (int)((rows - i + tiles - t - 1) / (tiles - t));
            NAME(any_tile)(height, depth, a + i * DEPTH_STRIDE, DEPTH_STRIDE, 1, b, c + i * ldc + j, ldc,
                           start ? start + j : NULL, accumulate, width);
            i += height;
        }
    }
}

/* The same for one panel b and a transposed: blocks of TILE_ROWS rows, each (depth x TILE_ROWS). */
static void NAME(multiply_transposed)(int64_t rows, int columns, int64_t depth, const REAL *a, const REAL *b, REAL *c,
                                      int64_t ldc, int accumulate) {
    for (int64_t i = 0; i < rows; i += TILE_ROWS, a += depth * TILE_ROWS) {
        int height = rows - i < TILE_ROWS ? (int)(rows - i) : TILE_ROWS;
        NAME(any_tile)(height, depth, a, 1, TILE_ROWS, b, c + i * ldc, ldc, NULL, accumulate, columns);
    }
}

/* ---- interpolation: to[pixel][channel] = sum over terms of share * from[pixel][channel] --------------------------
 * `terms` (1 to 4) of the 4 neighbours; pixels are `step` apart in the image and `ld` in the block. */
ALWAYS_INLINE void NAME(blend_terms)(const int terms, int64_t pixels, int64_t channels, const REAL *const *from,
                                     const REAL *share, int64_t step, REAL *to, int64_t ld) {
    const REAL *row[4]; /* in registers: vectors may alias, so a store would have them read again */
    REAL part[4];
    UNROLL for (int t = 0; t < terms; t++) row[t] = from[t], part[t] = share[t];
    for (int64_t p = 0; p < pixels; p++, to += ld) {
        int64_t c = 0, at = p * step;
        for (; c + LANES <= channels; c += LANES) {
            VEC sum = part[0] * READ(row[0] + at + c);
            UNROLL for (int t = 1; t < terms; t++) sum += part[t] * READ(row[t] + at + c);
            AT(to + c) = sum;
        }
        for (; c < channels; c++) {
            REAL sum = part[0] * row[0][at + c];
            UNROLL for (int t = 1; t < terms; t++) sum += part[t] * row[t][at + c];
            to[c] = sum;
        }
    }
}

static void NAME(blend)(int terms, int64_t pixels, int64_t channels, const REAL *const *from, const REAL *share,
                        int64_t step, REAL *to, int64_t ld) {
    switch (terms) {
        case 0:
            for (int64_t p = 0; p < pixels; p++) memset(to + p * ld, 0, channels * sizeof(REAL));
            break;
        case 1: NAME(blend_terms)(1, pixels, channels, from, share, step, to, ld); break;
        case 2: NAME(blend_terms)(2, pixels, channels, from, share, step, to, ld); break;
        case 3: NAME(blend_terms)(3, pixels, channels, from, share, step, to, ld); break;
        case 4: NAME(blend_terms)(4, pixels, channels, from, share, step, to, ld); break;
    }
}

/* ---- adjoint of the interpolation along one row of the image -----------------------------------------------------
 * Image pixel x receives h = (1 - fraction) here + fraction before from the samples whose left and right neighbour it
 * is. With row_share the weight of this row:
 *     gradient[x] += row_share h        sums[0] += image[x] h        sums[1] += image[x] (before - here)
 * gradient or image may be NULL: what needs it is not computed then. */
ALWAYS_INLINE void NAME(adjoint_of)(const int want_gradient, const int want_sums, int64_t pixels, int64_t channels,
                                    REAL *gradient, const REAL *image, int64_t step, const REAL *here,
                                    int64_t here_step, const REAL *before, int64_t before_step, REAL row_share,
                                    REAL fraction, double *sums) {
    VEC value_sum = {0}, slope_sum = {0};
    REAL value_rest = 0, slope_rest = 0;
    for (int64_t p = 0; p < pixels; p++) {
        int64_t c = 0, at = p * step;
        const REAL *h = here + p * here_step, *b = before + p * before_step;
        for (; c + LANES <= channels; c += LANES) {
            VEC slope = READ(b + c) - READ(h + c), value = READ(h + c) + fraction * slope;
            if (want_gradient) AT(gradient + at + c) += row_share * value;
            if (want_sums) {
                VEC pixel = READ(image + at + c);
                value_sum += value * pixel;
                slope_sum += slope * pixel;
            }
        }
        for (; c < channels; c++) {
            REAL slope = b[c] - h[c], value = h[c] + fraction * slope;
            if (want_gradient) gradient[at + c] += row_share * value;
            if (want_sums) {
                value_rest += value * image[at + c];
                slope_rest += slope * image[at + c];
            }
        }
    }
    if (want_sums) {
        double value = value_rest, slope = slope_rest;
        for (int lane = 0; lane < LANES; lane++) value += value_sum[lane], slope += slope_sum[lane];
        sums[0] += value;
        sums[1] += slope;
    }
}

static void NAME(adjoint)(int64_t pixels, int64_t channels, REAL *gradient, const REAL *image, int64_t step,
                          const REAL *here, int64_t here_step, const REAL *before, int64_t before_step, REAL row_share,
                          REAL fraction, double *sums) {
    if (gradient && image)
        NAME(adjoint_of)(1, 1, pixels, channels, gradient, image, step, here, here_step, before, before_step, row_share,
                         fraction, sums);
    else if (gradient)
        NAME(adjoint_of)(1, 0, pixels, channels, gradient, NULL, step, here, here_step, before, before_step, row_share,
                         fraction, sums);
    else
        NAME(adjoint_of)(0, 1, pixels, channels, NULL, image, step, here, here_step, before, before_step, row_share,
                         fraction, sums);
}

/* to[pixel] = from[pixel], one vector each. The next block of channels, which comes next, is fetched meanwhile: pixels
 * are too far apart for the processor to guess. */
static void NAME(copy)(int64_t pixels, const REAL *from, int64_t step, REAL *to) {
    for (; pixels >= 4; pixels -= 4, from += 4 * step, to += 4 * LANES) {
        VEC value[4];
        UNROLL for (int p = 0; p < 4; p++) __builtin_prefetch(from + p * step + LANES);
        UNROLL for (int p = 0; p < 4; p++) value[p] = READ(from + p * step);
        UNROLL for (int p = 0; p < 4; p++) AT(to + p * LANES) = value[p];
    }
    for (; pixels > 0; pixels--, from += step, to += LANES) AT(to) = READ(from);
}

/* ---- channel by channel: one vector of channels, no sum over them ------------------------------------------------
 * to[pixel] = start + sum over cells of kernel[cell] * from[pixel + place[cell]], LANES channels at a time; without
 * start (NULL) the sum is added to what `to` holds. */
#define RUN 8
ALWAYS_INLINE void NAME(correlate_pixels)(const int pixels, int64_t cells, const int64_t *place, const REAL *kernel,
                                          const REAL *from, int64_t from_step, const REAL *start, REAL *to,
                                          int64_t to_step) {
    VEC sum[RUN];
    UNROLL for (int p = 0; p < pixels; p++) __builtin_prefetch(to + p * to_step + LANES, 1); /* as in copy */
    UNROLL for (int p = 0; p < pixels; p++) sum[p] = start ? READ(start) : READ(to + p * to_step);
    for (int64_t cell = 0; cell < cells; cell++) {
        VEC weight = READ(kernel + cell * LANES);
        const REAL *first = from + place[cell];
        if (pixels > 1 && cell + 1 < cells && place[cell + 1] - place[cell] == from_step) {
            /* The next cell reads the same pixels, one further on: half the loads, which are what limits this loop. */
            VEC second = READ(kernel + ++cell * LANES), value = READ(first);
            UNROLL for (int p = 0; p < pixels; p++) {
                VEC next = READ(first + (p + 1) * from_step);
                sum[p] += weight * value;
                sum[p] += second * next;
                value = next;
            }
        } else {
            UNROLL for (int p = 0; p < pixels; p++) sum[p] += weight * READ(first + p * from_step);
        }
    }
    UNROLL for (int p = 0; p < pixels; p++) AT(to + p * to_step) = sum[p];
}

/* kernel[index] += share * weight for each of 4 neighbours of each tap (index -1: none), lanes first to last; the weight
 * of a lane's tap is source[lane][tap * step]. */
static void NAME(spread_taps)(int64_t taps, const int64_t *index, const double *share, int64_t first, int64_t last,
                              const REAL *const *source, int64_t step, REAL *kernel) {
    REAL weight[LANES] __attribute__((aligned(BYTES)));
    for (int64_t tap = 0; tap < taps; tap++, index += 4, share += 4) {
        for (int64_t lane = first; lane < last; lane++) weight[lane] = source[lane][tap * step];
        for (int n = 0; n < 4; n++) {
            REAL *to = kernel + index[n] * LANES, part = (REAL)share[n];
            if (index[n] < 0) continue;
            if (last - first == LANES)
                AT(to) += part * READ(weight);
            else
                for (int64_t lane = first; lane < last; lane++) to[lane] += part * weight[lane];
        }
    }
}

static void NAME(correlate)(int64_t pixels, int64_t cells, const int64_t *place, const REAL *kernel, const REAL *from,
                            int64_t from_step, const REAL *start, REAL *to, int64_t to_step) {
    for (; pixels >= RUN; pixels -= RUN, from += RUN * from_step, to += RUN * to_step)
        NAME(correlate_pixels)(RUN, cells, place, kernel, from, from_step, start, to, to_step);
    switch (pixels) {
        case 1: NAME(correlate_pixels)(1, cells, place, kernel, from, from_step, start, to, to_step); break;
        case 2: NAME(correlate_pixels)(2, cells, place, kernel, from, from_step, start, to, to_step); break;
        case 3: NAME(correlate_pixels)(3, cells, place, kernel, from, from_step, start, to, to_step); break;
        case 4: NAME(correlate_pixels)(4, cells, place, kernel, from, from_step, start, to, to_step); break;
        case 5: NAME(correlate_pixels)(5, cells, place, kernel, from, from_step, start, to, to_step); break;
        case 6: NAME(correlate_pixels)(6, cells, place, kernel, from, from_step, start, to, to_step); break;
        case 7: NAME(correlate_pixels)(7, cells, place, kernel, from, from_step, start, to, to_step); break;
    }
}

/* Its adjoint with respect to the kernel: kernel[cell] += sum over pixels of to[pixel] * from[pixel + place[cell]]. */
ALWAYS_INLINE void NAME(correlate_cells)(const int cells, int64_t pixels, const int64_t *place, REAL *kernel,
                                         const REAL *from, int64_t from_step, const REAL *to, int64_t to_step) {
    VEC sum[RUN];
    UNROLL for (int cell = 0; cell < cells; cell++) sum[cell] = READ(kernel + cell * LANES);
    for (int64_t p = 0; p < pixels; p++, from += from_step, to += to_step) {
        VEC value = READ(to);
        UNROLL for (int cell = 0; cell < cells; cell++) sum[cell] += value * READ(from + place[cell]);
    }
    UNROLL for (int cell = 0; cell < cells; cell++) AT(kernel + cell * LANES) = sum[cell];
}

static void NAME(correlate_kernel)(int64_t pixels, int64_t cells, const int64_t *place, REAL *kernel, const REAL *from,
                                   int64_t from_step, const REAL *to, int64_t to_step) {
    for (; cells >= RUN; cells -= RUN, place += RUN, kernel += RUN * LANES)
        NAME(correlate_cells)(RUN, pixels, place, kernel, from, from_step, to, to_step);
    if (cells >= 4) {
        NAME(correlate_cells)(4, pixels, place, kernel, from, from_step, to, to_step);
        cells -= 4, place += 4, kernel += 4 * LANES;
    }
    for (; cells > 0; cells--, place++, kernel += LANES)
        NAME(correlate_cells)(1, pixels, place, kernel, from, from_step, to, to_step);
}

/* ---- planes: vectors run along the pixels of one channel ---------------------------------------------------------
 * A tap has 4 neighbours, `place` elements from the pixel of the output, each with its share. */

/* Lanes 1 ... LANES of two vectors that follow each other; and the sum of all lanes, which ends up in each of them. */
#if LANES == 16
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
#define ADD_LANES(v) \
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); \
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3); \
    v += __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1); \
    v += __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0);
#elif LANES == 8
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8)
#define ADD_LANES(v) \
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3); \
    v += __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 0, 1); \
    v += __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 0);
#elif LANES == 4
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2, 3, 4)
#define ADD_LANES(v) \
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1); \
    v += __builtin_shufflevector(v, v, 1, 2, 3, 0);
#else /* 2 */
#define NEXT(a, b) __builtin_shufflevector(a, b, 1, 2)
#define ADD_LANES(v) \
    v += __builtin_shufflevector(v, v, 1, 0);
#endif

/* to[(c * taps + k) * WIDTH + i] = sum over terms[k] neighbours n of share[4k+n] * from[c * step + place[4k+n] + i]: one
 * panel of outputs. */
ALWAYS_INLINE void NAME(sample_tap)(const int terms, const int64_t *place, const REAL *share, int64_t channels,
                                    int64_t step, const REAL *from, REAL *to, int64_t to_step) {
    for (int64_t c = 0; c < channels; c++, from += step, to += to_step)
        UNROLL for (int v = 0; v < 2; v++) {
            VEC sum = {0};
            UNROLL for (int n = 0; n < terms; n++) sum += share[n] * READ(from + place[n] + v * LANES);
            AT(to + v * LANES) = sum;
        }
}

/* The same for 4 neighbours of which two follow each other in each row: loads are what limits this loop. */
ALWAYS_INLINE void NAME(sample_cell)(const int64_t *place, const REAL *share, int64_t channels, int64_t step,
                                     const REAL *from, REAL *to, int64_t to_step) {
    for (int64_t c = 0; c < channels; c++, from += step, to += to_step) {
        VEC sum[2] = {{0}, {0}};
        UNROLL for (int r = 0; r < 2; r++) {
            const REAL *row = from + place[2 * r];
            VEC first = READ(row), second = READ(row + LANES), third = READ(row + WIDTH);
            sum[0] += share[2 * r] * first + share[2 * r + 1] * NEXT(first, second);
            sum[1] += share[2 * r] * second + share[2 * r + 1] * NEXT(second, third);
        }
        AT(to) = sum[0], AT(to + LANES) = sum[1];
    }
}

static void NAME(sample_panel)(int64_t taps, const int64_t *place, const REAL *share, const int *terms,
                               int64_t channels, int64_t step, const REAL *from, REAL *to) {
    for (int64_t k = 0; k < taps; k++, place += 4, share += 4, to += WIDTH) switch (terms[k]) {
            case 1: NAME(sample_tap)(1, place, share, channels, step, from, to, taps * WIDTH); break;
            case 2: NAME(sample_tap)(2, place, share, channels, step, from, to, taps * WIDTH); break;
            case 3: NAME(sample_tap)(3, place, share, channels, step, from, to, taps * WIDTH); break;
            default:
                if (place[1] == place[0] + 1 && place[3] == place[2] + 1)
                    NAME(sample_cell)(place, share, channels, step, from, to, taps * WIDTH);
                else
                    NAME(sample_tap)(4, place, share, channels, step, from, to, taps * WIDTH);
        }
}

/* c (rows x WIDTH) = a * panel, where row c * taps + k of the panel is the image itself at a tap on a whole pixel,
 * from + c * step + place[4k], and a last row is 1. a: blocks of TILE_ROWS rows, as in multiply_transposed. */
ALWAYS_INLINE void NAME(moved_tile)(const int rows, int64_t taps, const int64_t *place, int64_t channels, int64_t step,
                                    const REAL *from, const REAL *a, REAL *c, int64_t ldc) {
    VEC sum[TILE_ROWS][2];
    UNROLL for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (VEC){0};
    for (int64_t channel = 0; channel < channels; channel++, from += step)
        for (int64_t k = 0; k < taps; k++, a += TILE_ROWS) {
            VEC first = READ(from + place[4 * k]), second = READ(from + place[4 * k] + LANES);
            UNROLL for (int i = 0; i < rows; i++) sum[i][0] += a[i] * first, sum[i][1] += a[i] * second;
        }
    UNROLL for (int i = 0; i < rows; i++) {
        AT(c + i * ldc) = sum[i][0] + a[i];
        AT(c + i * ldc + LANES) = sum[i][1] + a[i];
    }
}

#define MOVED_CASE(n) \
    case n: NAME(moved_tile)(n, taps, place, channels, step, from, a, c + i * ldc, ldc); break;
static void NAME(multiply_moved)(int64_t rows, int64_t taps, const int64_t *place, int64_t channels, int64_t step,
                                 const REAL *from, const REAL *a, REAL *c, int64_t ldc) {
    for (int64_t i = 0; i < rows; i += TILE_ROWS, a += (channels * taps + 1) * TILE_ROWS)
        switch (rows - i < TILE_ROWS ? (int)(rows - i) : TILE_ROWS) {
            MOVED_CASE(1) MOVED_CASE(2) MOVED_CASE(3) MOVED_CASE(4)
#if TILE_ROWS > 4
            MOVED_CASE(5) MOVED_CASE(6)
#endif
#if TILE_ROWS > 6
            MOVED_CASE(7) MOVED_CASE(8) MOVED_CASE(9) MOVED_CASE(10) MOVED_CASE(11) MOVED_CASE(12)
#endif
        }
}

/* One tap of one channel, all 4 neighbours: to[i] = the sample, zero from `count` to the end of the panel; and
 * sums[n] += sum over i of gradient[i] * from[place[n] + i]. to or gradient may be NULL: not computed then. */
ALWAYS_INLINE void NAME(sample_row_of)(const int want_samples, const int want_sums, int64_t count,
                                       const int64_t *place, const REAL *share, const REAL *from, REAL *to,
                                       const REAL *gradient, double *sums) {
    VEC sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        VEC sample = {0}, grad;
        if (want_sums) grad = READ(gradient + i);
        UNROLL for (int n = 0; n < 4; n++) {
            VEC value = READ(from + place[n] + i);
            if (want_samples) sample += share[n] * value;
            if (want_sums) sum[n] += grad * value;
        }
        if (want_samples) AT(to + i) = sample;
    }
    if (want_sums)
        UNROLL for (int n = 0; n < 4; n++) {
            ADD_LANES(sum[n])
            sums[n] += sum[n][0];
        }
    for (; i < count; i++) {
        REAL sample = 0;
        UNROLL for (int n = 0; n < 4; n++) {
            REAL value = from[place[n] + i];
            sample += share[n] * value;
            if (want_sums) sums[n] += gradient[i] * value;
        }
        if (want_samples) to[i] = sample;
    }
    if (want_samples)
        for (; i % WIDTH; i++) to[i] = 0;
}

static void NAME(sample_row)(int64_t count, const int64_t *place, const REAL *share, const REAL *from, REAL *to,
                             const REAL *gradient, double *sums) {
    if (to && !gradient && share[0] == 1) { /* a whole pixel */
        memcpy(to, from + place[0], count * sizeof(REAL));
        for (; count % WIDTH; count++) to[count] = 0;
    } else if (to && gradient)
        NAME(sample_row_of)(1, 1, count, place, share, from, to, gradient, sums);
    else if (to)
        NAME(sample_row_of)(1, 0, count, place, share, from, to, NULL, NULL);
    else
        NAME(sample_row_of)(0, 1, count, place, share, from, NULL, gradient, sums);
}

/* to[i] += sum over n of share[n] * from[place[n] + i], in whole panels. */
static void NAME(gather_row)(int64_t count, int64_t terms, const int64_t *place, const REAL *share, const REAL *from,
                             REAL *to) {
    int64_t i = 0;
    for (; i + 2 * WIDTH <= count; i += 2 * WIDTH) {
        VEC sum[4];
        UNROLL for (int v = 0; v < 4; v++) sum[v] = READ(to + i + v * LANES);
        for (int64_t n = 0; n < terms; n++)
            UNROLL for (int v = 0; v < 4; v++) sum[v] += share[n] * READ(from + place[n] + i + v * LANES);
        UNROLL for (int v = 0; v < 4; v++) AT(to + i + v * LANES) = sum[v];
    }
    for (; i < count; i += LANES) {
        VEC sum = READ(to + i);
        for (int64_t n = 0; n < terms; n++) sum += share[n] * READ(from + place[n] + i);
        AT(to + i) = sum;
    }
}

#if TILE_ROWS > 6
#define DOT_COLUMNS 8 /* 3 x 8 accumulators fit into 32 registers */
#else
#define DOT_COLUMNS 4
#endif
/* c[r * c_row + q * c_column] += sum over panels j and their outputs i of a[r * a_step + j * WIDTH + i] *
 * b[j * b_step + q * WIDTH + i]. */
ALWAYS_INLINE void NAME(dot_block)(const int rows, const int columns, int64_t panels, const REAL *a, int64_t a_step,
                                   const REAL *b, int64_t b_step, REAL *c, int64_t c_row, int64_t c_column) {
    VEC sum[3][DOT_COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int q = 0; q < columns; q++) sum[r][q] = (VEC){0};
    for (int64_t j = 0; j < panels; j++, a += WIDTH, b += b_step)
        UNROLL for (int v = 0; v < WIDTH; v += LANES) {
            VEC left[3];
            UNROLL for (int r = 0; r < rows; r++) left[r] = READ(a + r * a_step + v);
            UNROLL for (int q = 0; q < columns; q++) {
                VEC right = READ(b + q * WIDTH + v);
                UNROLL for (int r = 0; r < rows; r++) sum[r][q] += left[r] * right;
            }
        }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int q = 0; q < columns; q++) {
        ADD_LANES(sum[r][q])
        c[r * c_row + q * c_column] += sum[r][q][0];
    }
}

#define DOT_CASE(n, m) \
    case 10 * n + m: NAME(dot_block)(n, m, panels, a, a_step, right, b_step, to, c_row, c_column); break;
#define DOT_CASES(m) DOT_CASE(1, m) DOT_CASE(2, m) DOT_CASE(3, m)
static void NAME(dot_panels)(int64_t rows, int64_t columns, int64_t panels, const REAL *a, int64_t a_step,
                             const REAL *b, int64_t b_step, REAL *c, int64_t c_row, int64_t c_column) {
    for (int64_t r = 0; r < rows; r += 3, a += 3 * a_step)
        for (int64_t q = 0; q < columns; q += DOT_COLUMNS) {
            int height = rows - r < 3 ? (int)(rows - r) : 3;
            int width = columns - q < DOT_COLUMNS ? (int)(columns - q) : DOT_COLUMNS;
            const REAL *right = b + q * WIDTH;
            REAL *to = c + r * c_row + q * c_column;
            switch (10 * height + width) {
                DOT_CASES(1) DOT_CASES(2) DOT_CASES(3) DOT_CASES(4)
#if DOT_COLUMNS > 4
                DOT_CASES(5) DOT_CASES(6) DOT_CASES(7) DOT_CASES(8)
#endif
            }
        }
}

/* Whether all numbers are finite: x * 0 is NaN for those that are not. */
static int NAME(all_finite)(int64_t count, const REAL *from) {
    VEC sum = {0};
    REAL rest = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += READ(from + i) * (REAL)0;
    for (; i < count; i++) rest += from[i] * (REAL)0;
    for (int lane = 0; lane < LANES; lane++) rest += sum[lane];
    return rest == 0;
}

static const NAMED(routines) NAME(table) = {
    LANES, TILE_ROWS, NAME(multiply_rows), NAME(multiply_transposed), NAME(blend), NAME(adjoint), NAME(copy),
    NAME(spread_taps), NAME(correlate), NAME(correlate_kernel), NAME(sample_panel), NAME(multiply_moved),
    NAME(sample_row), NAME(gather_row), NAME(dot_panels), NAME(all_finite),
};

#undef LANES
#undef WIDTH
#undef VEC
#undef AT
#undef READ
#undef TILE_CASE
#undef RUN
#undef MOVED_CASE
#undef DOT_CASE
#undef DOT_CASES
#undef DOT_COLUMNS
#undef NEXT
#undef ADD_LANES
