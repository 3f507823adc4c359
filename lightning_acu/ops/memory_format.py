"""Memory formats: which one an output has, and how many images to convert at a time to the one that a kernel needs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["images_per_block", "is_native", "memory_format", "preserved_format"]

#: Elements of the block of images that is converted at a time: it stays in a level-3 cache.
_BLOCK = 2**20


def memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Of the output, by the rule of F.conv2d: channels_last if input or weight is (unless it is contiguous, too)."""
    for tensor in (input, weight):
        if tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def preserved_format(tensor: Tensor) -> torch.memory_format:
    """Of a gradient of ``tensor``: that of the tensor itself."""
    return memory_format(tensor, tensor) if tensor.ndim == 4 else torch.contiguous_format


def is_native(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a channels_last kernel for ``dtype`` can work on ``tensor`` without a copy."""
    return tensor.dtype == dtype and tensor.is_contiguous(memory_format=torch.channels_last)


def images_per_block(*tensors: Tensor) -> int:
    """How many images of each of these batches to convert at a time."""
    elements = max(tensor[:1].numel() for tensor in tensors)
    return max(1, _BLOCK // max(elements, 1))
