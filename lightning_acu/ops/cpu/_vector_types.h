/* _vector_routines.h for float and double. No include guard: _vector_isa.h includes this file once for each instruction
 * set, with ISA (its name), TILE_ROWS and BYTES as in _vector_routines.h. */
#define REAL float
#define REAL_BYTES 4
#define NAMED(x) JOIN(x, f32)
#define NAME(x) JOIN(x, JOIN(f32, ISA))
#include "_vector_routines.h"
#undef REAL
#undef REAL_BYTES
#undef NAMED
#undef NAME

#define REAL double
#define REAL_BYTES 8
#define NAMED(x) JOIN(x, f64)
#define NAME(x) JOIN(x, JOIN(f64, ISA))
#include "_vector_routines.h"
#undef REAL
#undef REAL_BYTES
#undef NAMED
#undef NAME

#undef ISA
#undef BYTES
#undef TILE_ROWS
