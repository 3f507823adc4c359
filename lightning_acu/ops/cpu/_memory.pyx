# distutils: language = c
"""Tensors as the kernels see them: buffers, without a copy."""

from cpython.buffer cimport PyBUF_FORMAT

cdef char* FLOAT = "f"
cdef char* DOUBLE = "d"
cdef char NOWHERE[16]  # for empty tensors, which may have no memory at all


cdef class Memory:
    """The memory of a float32 or float64 CPU tensor of at most 4 dimensions.

    `Tensor.numpy()` would do, but after it the storage cannot be resized, as FSDP2 does with parameters, and it takes 3
    times as long. With `pixels`, a channels_last (N, C, H, W) becomes a contiguous (N, H, W, C).
    """

    cdef readonly object tensor  # lives as long as any view of it
    cdef Py_ssize_t[4] shape
    cdef Py_ssize_t[4] strides  # in bytes
    cdef Py_ssize_t size

    def __cinit__(self, tensor, bint pixels=False):
        cdef Py_ssize_t step
        cdef int axis
        if tensor.is_neg():
            tensor = tensor.resolve_neg()
        if tensor.ndim > 4 or (pixels and tensor.ndim != 4):
            raise ValueError(f"`tensor` has {tensor.ndim} dimensions; expected {'4' if pixels else 'at most 4'}")
        self.tensor, self.size = tensor, tensor.element_size()
        for axis, step in enumerate(tensor.shape):
            self.shape[axis] = step
        for axis, step in enumerate(tensor.stride()):
            self.strides[axis] = step * self.size
        if pixels:  # in torch, dimensions of size 1 may have any stride
            self.shape[1], self.shape[2], self.shape[3] = self.shape[2], self.shape[3], self.shape[1]
        if pixels or 0 in tensor.shape:
            step = self.size
            for axis in reversed(range(tensor.ndim)):
                self.strides[axis] = step
                step *= max(self.shape[axis], 1)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        cdef size_t address = self.tensor.data_ptr()
        buffer.buf = <void*>address if address else <void*>NOWHERE
        buffer.format = NULL
        if flags & PyBUF_FORMAT:
            buffer.format = FLOAT if self.size == 4 else DOUBLE
        buffer.internal, buffer.suboffsets = NULL, NULL
        buffer.itemsize, buffer.ndim = self.size, self.tensor.ndim
        buffer.len = self.tensor.numel() * self.size
        buffer.obj, buffer.readonly = self, False
        buffer.shape, buffer.strides = self.shape, self.strides
