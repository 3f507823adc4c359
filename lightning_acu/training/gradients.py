"""What is done to the (dy, dx) pairs of many layers at once: unit gradients, and taps kept near or drawn to pixels.

As one operation over all layers, because a GPU would spend its time on launching small ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conv import ACUConv2d
from ..sharded import copy_whole_, is_sharded, whole

__all__ = ["apply_to_pairs_", "confine_positions_", "normalize_gradients_", "unit_vectors"]


def unit_vectors(pairs: Tensor) -> Tensor:
    """(N, 2) to (N, 2): each row divided by its length; a zero row stays zero, one that is not finite stays so.

    The learning rate of positions is then in pixels a step (for SGD without momentum), whatever the scale of the loss
    and the depth of the layer. Source: Jeon & Kim, section 3.3, the normalised gradient (g_y, g_x) / |g|.
    """
    # Scaled by the larger entry first: the square of a float32 gradient below 1e-19 would underflow to zero.
    largest = pairs.abs().amax(-1, keepdim=True)
    scaled = torch.where(largest > 0, pairs / largest, pairs)
    length = scaled.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, scaled / length, scaled)


def normalize_gradients_(layers: Sequence[ACUConv2d]) -> None:
    """Scale the gradient of each tap's position to length 1, in place (see :func:`unit_vectors`).

    To be called between ``backward`` (and the clipping of the weights' gradients) and ``optimizer.step``. Layers whose
    positions have no gradient are left out.
    """
    apply_to_pairs_([layer.offsets.grad for layer in layers if layer.offsets.grad is not None], unit_vectors)


def confine_positions_(layers: Sequence[ACUConv2d], pull: float = 0.0, max_displacement: float | None = None) -> None:
    """Move each tap back to within ``max_displacement``, then a share of its way to the nearest pixel, in place.

    To be called after ``optimizer.step``.

    Args:
        layers: whose taps to move.
        pull: the share of the way, 0 to 1; see :meth:`~lightning_acu.training.schedules.Schedule.pull`.
        max_displacement: pixels that a tap may be away from where it started; None for no limit.
    """

    def confine(offsets: Tensor, start: Tensor) -> Tensor:
        if max_displacement is not None:
            moved = offsets - start
            length = moved.norm(dim=-1, keepdim=True)
            offsets = torch.where(length > max_displacement, start + moved * (max_displacement / length), offsets)
        return offsets.lerp(offsets.round(), pull)

    starts = [layer.starting_offsets().flatten() for layer in layers]
    apply_to_pairs_([layer.offsets for layer in layers], confine, starts)


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
