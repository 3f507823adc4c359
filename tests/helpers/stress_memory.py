"""Tensors in unusual memory: flush against a page that cannot be read, overlapping, with strides of 2**62, freed."""

import ctypes
import mmap

import torch

ARRANGEMENTS = (
    "plain", "behind a page", "before a page", "huge strides", "overlapping", "negated", "far inside", "parameter",
)  # fmt: skip

_PAGE, _NO_ACCESS = mmap.PAGESIZE, 0
_LIBC = ctypes.CDLL(None, use_errno=True)


def arrange(dice, tensor):
    """The tensor, or one of the same shape and dtype, in random memory; values change only where it overlaps itself."""
    how = dice.choice(ARRANGEMENTS)
    if how in ("behind a page", "before a page") and tensor.numel():
        return guarded(ordered(dice, tensor), at_end=how == "before a page")
    if how == "huge strides":
        strides = [s if n > 1 else dice.choice((0, 1, 2**40, 2**62, 2**63 - 1)) for n, s in sizes_and_strides(tensor)]
        return tensor.as_strided(tensor.shape, strides)
    if how == "overlapping" and tensor.numel():
        strides = [dice.randint(0, 3) for _ in tensor.shape]
        return tensor.contiguous().flatten().repeat(3 * tensor.ndim + 1).as_strided(tensor.shape, strides)
    if how == "negated":
        return torch._neg_view(-tensor)
    if how == "far inside":
        around = torch.full((tensor.numel() + 1000,), torch.nan, dtype=tensor.dtype)
        around[777 : 777 + tensor.numel()] = tensor.flatten()
        return around[777 : 777 + tensor.numel()].view(tensor.shape)
    if how == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=False)
    return tensor


def sizes_and_strides(tensor):
    return zip(tensor.shape, tensor.stride(), strict=True)


def ordered(dice, tensor):
    """A dense copy whose axes lie in memory in the usual order, or with channels last, or any."""
    axes = list(range(tensor.ndim))
    if tensor.ndim == 4 and dice.random() < 0.5:
        axes = [0, 2, 3, 1]
    elif dice.random() < 0.3:
        dice.shuffle(axes)
    back = [axes.index(axis) for axis in range(tensor.ndim)]
    return tensor.permute(axes).contiguous().permute(back)


def guarded(tensor, at_end):
    """A copy of a dense tensor right before (or behind) a page of memory that no process may read or write."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if _LIBC.mprotect(ctypes.c_void_p(start + page * _PAGE), ctypes.c_size_t(_PAGE), _NO_ACCESS):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = (pages + 1) * _PAGE - size if at_end else _PAGE
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.as_strided(tensor.shape, tensor.stride(), copy.storage_offset()).copy_(tensor)


def free(dice, tensor):
    """Free the tensor's memory, all of it or its end."""
    needed = tensor.storage_offset() + sum((n - 1) * s for n, s in sizes_and_strides(tensor)) + 1
    keep = dice.choice((0, 0, needed // 2, needed - 1))
    tensor.untyped_storage().resize_(keep * tensor.element_size())
