"""How the work on blocks of channels and strips of images is cut, by geometry alone, and its buffers."""

from libc.stdint cimport int64_t
from libc.string cimport memset

from ._bands cimport Plan, Space, space_in
from ._packing cimport ceil_div
from ._vectors cimport Buffer, real

cdef enum:
    NEAR = 4096  # pixels of 64 bytes: a range of strips that is still in a level-2 cache when the next group comes

cdef struct Job:  # some blocks of channels, and some strips of all images
    int64_t first_block
    int64_t last_block
    int64_t first_strip
    int64_t last_strip


cdef inline Job job_at(const Plan* plan, int64_t groups, int64_t ranges, int64_t strips, int64_t index) noexcept nogil:
    """Blocks in `groups`, strips in `ranges`; the next job has the same strips and the blocks beside these."""
    cdef int64_t group = index % groups, place = index // groups
    cdef Job job = Job(
        group * plan.together, min((group + 1) * plan.together, plan.blocks), strips * place // ranges,
        strips * (place + 1) // ranges,
    )
    return job


cdef inline int64_t ranges_of(const Plan* plan, int64_t groups, int64_t strips, int64_t pixels, int threads):
    """Enough ranges of strips for every thread, small enough to be still in the cache when the next group comes."""
    cdef int64_t most = max(1, NEAR // max(pixels // max(plan.strips, 1), 1))
    return max(1, min(strips, max(ceil_div(strips, most), ceil_div(4 * threads, groups))))


cdef inline Buffer zeros(size_t count, size_t size):
    cdef Buffer buffer = Buffer(count, size)
    memset(buffer.data, 0, count * size)
    return buffer


cdef inline Buffer integers_of(const Plan* plan, int threads):
    """The integers of all threads: none has begun, and no cells have been found."""
    cdef Buffer buffer = Buffer(threads * plan.integers, sizeof(int64_t))
    cdef int64_t* integers = <int64_t*>buffer.data
    cdef Space* space
    cdef int64_t block
    cdef int thread
    for thread in range(threads):
        integers[0] = 0
        for block in range(plan.together):
            space = space_in(plan, integers, block)
            space.cells.first = space.cells.last = 0
        integers += plan.integers
    return buffer


cdef inline void begin(const Plan* plan, int64_t* integers, real* reals) noexcept nogil:
    """Before a thread's first job: zeros for the start values, and for the rims of bands, which are never written."""
    if integers[0] == 0:
        integers[0] = 1
        memset(reals, 0, plan.kernels * sizeof(real))
        memset(reals + plan.bands, 0, (plan.lines - plan.bands) * sizeof(real))
