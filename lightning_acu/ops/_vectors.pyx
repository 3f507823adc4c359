# distutils: language = c
"""The instruction set of the CPU kernels, chosen when this module is loaded."""

from libc.stdlib cimport free
from posix.stdlib cimport posix_memalign

cdef extern from "_vector_isa.h" nogil:
    int best_isa()
    const routines_f32* routines_f32_for(int isa)
    const routines_f64* routines_f64_for(int isa)

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


def supported():
    """The instruction sets this processor can run, the fastest last."""
    return INSTRUCTION_SETS[: best_isa() + 1]


def use(name):
    """Run on the instruction set ``name`` from now on, in all threads; a ValueError where it is not supported."""
    global f32, f64, _current
    if name not in supported():
        raise ValueError(f"`name` (={name!r}) must be one of {', '.join(supported())}")
    _current = name
    f32 = routines_f32_for(INSTRUCTION_SETS.index(name))
    f64 = routines_f64_for(INSTRUCTION_SETS.index(name))


def current():
    """The instruction set in use."""
    return _current


cdef class Buffer:
    def __cinit__(self, size_t count, size_t size):
        if posix_memalign(&self.data, 64, count * size):
            raise MemoryError(f"no memory for a buffer of {count * size} bytes")

    def __dealloc__(self):
        free(self.data)


use(INSTRUCTION_SETS[best_isa()])
