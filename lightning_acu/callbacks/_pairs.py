"""One operation on the (dy, dx) pairs of many layers, as one: a GPU would spend its time on launching small ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sharded import copy_whole_, is_sharded, whole

__all__ = ["apply_to_pairs_"]


@torch.no_grad()
def apply_to_pairs_(tensors: Sequence[Tensor], function: Callable[..., Tensor], *others: Sequence[Tensor]) -> None:
    """Write ``function(pairs)`` into ``tensors``, which are 1-D with an even length each: offsets, or their gradients.

    Args:
        tensors: to change, in place: DDP and CUDA graphs know them.
        function: from (N, 2), the pairs of many of ``tensors``, to the same.
        others: for each further argument of ``function``, tensors of the lengths of ``tensors``, not sharded.
    """
    kinds: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        kinds[tensor.device, tensor.dtype, is_sharded(tensor)].append(index)
    for (*_, sharded), indices in kinds.items():
        mine = [tensors[index] for index in indices]
        complete = [whole(tensor) for tensor in mine]  # a process may hold one number of a pair only
        arguments = [complete, *([other[index] for index in indices] for other in others)]
        pairs = function(*(torch.cat(argument).view(-1, 2) for argument in arguments))
        pieces = pairs.flatten().split([len(tensor) for tensor in complete])
        if sharded:
            for tensor, piece in zip(mine, pieces, strict=True):
                copy_whole_(tensor, piece)
        else:
            torch._foreach_copy_(mine, list(pieces))
