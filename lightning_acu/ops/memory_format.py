"""Memory formats: which one an output has, and blocks of images in the one that a kernel wants."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["images_per_block", "is_native", "memory_format", "preserved_format"]

#: Numbers of a block of images that is converted at a time: it stays in a level-3 cache.
_BLOCK = 2**20


def memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """F.conv2d's rule for its output: channels_last where input or weight is (and is not NCHW as well)."""
    for tensor in (input, weight):
        if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def preserved_format(tensor: Tensor) -> torch.memory_format:
    """The format of a gradient of ``tensor``."""
    return memory_format(tensor, tensor) if tensor.ndim == 4 else torch.contiguous_format


def is_native(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a channels_last kernel for ``dtype`` can work on the tensor itself."""
    return tensor.dtype == dtype and tensor.is_contiguous(memory_format=torch.channels_last)


def images_per_block(*tensors: Tensor) -> int:
    """How many images of each of these batches to convert at a time."""
    numbers = max(tensor[:1].numel() for tensor in tensors)
    return max(1, _BLOCK // max(numbers, 1))
