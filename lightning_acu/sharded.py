"""Reading and writing whole parameters that FSDP2 has spread over processes.

``fully_shard`` cuts a parameter into one piece a process, and may cut the two numbers of one tap apart. What is done
to whole taps (normalising, rounding, counting) therefore reads the whole parameter and writes it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["copy_whole_", "is_sharded", "like_sharded", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor; asked without importing torch.distributed, which not every build has."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of ``tensor``, the same on every process; itself where it is not sharded.

    A collective operation for sharded ones: call it on every process.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def like_sharded(value: Tensor, like: Tensor) -> Tensor:
    """``value``, which every process has in full, spread over processes as ``like`` is; itself where that is whole."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    # src_data_rank=None: everyone has the value already, nothing needs to be sent.
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole_(tensor: Tensor, value: Tensor) -> None:
    """Write ``value``, which every process has in full, into ``tensor``; a sharded one takes its own piece."""
    tensor.copy_(like_sharded(value, tensor))
