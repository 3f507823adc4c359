# distutils: language = c
"""The instruction set of the CPU kernels, chosen when this module is loaded, and memory that they use again."""

from libc.stdint cimport SIZE_MAX

cdef extern from "_platform.h" nogil:
    void* allocate_aligned(size_t size)
    void free_aligned(void* data)
    int best_isa()

cdef extern from "_vector_isa.h" nogil:
    const bint HAS_OPENMP
    const size_t KEPT
    const routines_f32* routines_f32_for(int isa)
    const routines_f64* routines_f64_for(int isa)

#: Whether the kernels were built with threads.
OPENMP = bool(HAS_OPENMP)

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

#: Bytes of a vector.
BYTES = dict(zip(INSTRUCTION_SETS, (16, 32, 64)))


def supported():
    """The instruction sets this processor can run, the fastest last."""
    return INSTRUCTION_SETS[: best_isa() + 1]


def use(name):
    """Run on the instruction set ``name`` from now on; a ValueError where it is not supported.

    For tests and measurements, while no kernel runs in another thread: it would change in the middle.
    """
    global f32, f64, _current
    if name not in supported():
        raise ValueError(f"`name` (={name!r}) must be one of {', '.join(supported())}")
    _current = name
    f32 = routines_f32_for(INSTRUCTION_SETS.index(name))
    f64 = routines_f64_for(INSTRUCTION_SETS.index(name))


def current():
    """The instruction set in use."""
    return _current


cdef enum:
    SLOTS = 16

cdef struct Block:
    void* data
    size_t size

#: Blocks of memory to use again; the oldest goes first. The system would map and clear new memory at every call, also
#: for the outputs beside it. The GIL guards them.
cdef Block[SLOTS] kept
cdef size_t kept_size = 0
cdef int oldest = 0


cdef void discard(int slot) noexcept:
    global kept_size
    kept_size -= kept[slot].size
    free_aligned(kept[slot].data)
    kept[slot].data, kept[slot].size = NULL, 0


cdef void keep(Block block) noexcept:
    """Keep `block`; the oldest goes, and as many others as it takes to stay within KEPT bytes in all."""
    global kept_size, oldest
    if block.size > KEPT:
        free_aligned(block.data)
        return
    cdef int slot = oldest
    discard(slot)
    while kept_size + block.size > KEPT:
        oldest = (oldest + 1) % SLOTS
        discard(oldest)
    kept[slot] = block
    kept_size += block.size
    oldest = (slot + 1) % SLOTS


cdef Block take(size_t size) noexcept:
    """The smallest kept block of at least this size and at most twice as much, or none."""
    global kept_size
    cdef int i, best = -1
    cdef Block none = Block(NULL, 0), block
    for i in range(SLOTS):
        if kept[i].data != NULL and kept[i].size >= size and kept[i].size // 2 <= size:
            if best < 0 or kept[i].size < kept[best].size:
                best = i
    if best < 0:
        return none
    block = kept[best]
    kept[best] = none
    kept_size -= block.size
    return block


cdef class Buffer:
    def __cinit__(self, size_t count, size_t size):
        cdef Block block
        self.data, self.size = NULL, 0
        if count <= SIZE_MAX // size:
            block = take(max(count * size, 64))
            if block.data == NULL:
                block = Block(allocate_aligned(max(count * size, 64)), max(count * size, 64))
            self.data, self.size = block.data, block.size
        if self.data == NULL:
            raise MemoryError(f"no memory for a buffer of {count} elements of {size} bytes")

    def __dealloc__(self):
        if self.data != NULL:
            keep(Block(self.data, self.size))


use(INSTRUCTION_SETS[best_isa()])
