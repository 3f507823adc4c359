"""Unit gradients of positions, a guard against gradients that are not finite, and corrections after a step.

Each is one operation on the (dy, dx) pairs of all layers: many small ones would leave a GPU waiting for launches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..conv import ACUConv2d
from ..dilation import RoundTo, dilated_offsets, nearest_dilations
from ..sharded import copy_whole_, is_sharded, whole

__all__ = [
    "NonFiniteGuard",
    "apply_to_pairs_",
    "confine_positions_",
    "drop_gradients_",
    "normalize_gradients_",
    "unit_vectors",
]


def unit_vectors(pairs: Tensor) -> Tensor:
    """Divide each row of ``pairs`` (N, 2) by its length; rows of zeros stay zero, rows with inf or nan stay non-finite.

    With such gradients the learning rate of positions is in pixels per step (for SGD without momentum), whatever the
    scale of the loss and the depth of the layer. Source: Jeon & Kim, section 3.3, the normalised gradient
    (g_y, g_x) / ``|g|``.
    """
    # Divide by the larger entry first: the square of a float32 gradient below 1e-19 would underflow to zero.
    largest = pairs.abs().amax(-1, keepdim=True)
    scaled = torch.where(largest > 0, pairs / largest, pairs)
    length = scaled.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, scaled / length, scaled)


def normalize_gradients_(layers: Sequence[ACUConv2d]) -> None:
    """Scale the gradient of each tap's position to length 1, in place (see :func:`unit_vectors`).

    Call it after ``backward`` and gradient clipping of the weights, before ``optimizer.step``. Layers whose positions
    have no gradient are skipped.
    """
    apply_to_pairs_([layer.offsets.grad for layer in layers if layer.offsets.grad is not None], unit_vectors)


def drop_gradients_(layers: Iterable[ACUConv2d]) -> None:
    """Make the gradients of positions None, so that the next step of an optimizer does not move them.

    With a gradient of zero, momentum and weight decay would; ``requires_grad_(False)`` keeps an earlier gradient, and
    DDP waits for the gradients of all parameters that it had at the start.
    """
    for layer in layers:
        layer.offsets.grad = None


class NonFiniteGuard:
    """Keeps a tap whose gradient is not finite (nan or inf) where it is for that step, and counts how often.

    Without it, one such gradient makes a position nan for good. The optimizer gets a gradient of zero for that tap, so
    that its momentum stays finite; because momentum and weight decay would still move the tap, it is put back after the
    step. Other taps are not changed by a bit. Nothing waits for a GPU until ``count`` is read.

    Example::

        guard = NonFiniteGuard()
        guard.before_step(layers)  # after clipping and normalize_gradients_
        optimizer.step()
        guard.after_step()
    """

    def __init__(self) -> None:
        self._layers: list[ACUConv2d] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._counts: dict[torch.device, Tensor] = {}

    @property
    def count(self) -> int:
        """How many gradients of taps were not finite, in all steps so far."""
        return sum(int(count) for count in self._counts.values())

    def before_step(self, layers: Sequence[ACUConv2d]) -> None:
        """Set gradients that are not finite to zero, and remember where the taps are.

        Under FSDP2 a collective operation, as is ``after_step``.
        """
        self._layers = [layer for layer in layers if layer.offsets.grad is not None]
        self._kept = []

        def clean(gradients: Tensor, positions: Tensor) -> Tensor:
            finite = gradients.isfinite().all(-1, keepdim=True)
            self._kept.append((positions, finite))
            return torch.where(finite, gradients, 0.0)

        gradients = [layer.offsets.grad for layer in self._layers if layer.offsets.grad is not None]
        apply_to_pairs_(gradients, clean, [whole(layer.offsets.detach()) for layer in self._layers])

    def after_step(self, skipped: Tensor | None = None) -> None:
        """Put the taps back whose gradients were not finite.

        Args:
            skipped: not 0 if the optimizer did not take the step: ``optimizer.found_inf`` in mixed precision, where
                such steps are usual and are not counted.
        """
        kept = iter(self._kept)

        def restore(positions: Tensor) -> Tensor:
            before, finite = next(kept)
            bad = (~finite).sum()
            if skipped is not None:
                bad = bad * (skipped.to(bad.device) == 0)
            self._counts[bad.device] = self._counts.get(bad.device, torch.zeros_like(bad)) + bad
            return torch.where(finite, positions, before)

        apply_to_pairs_([layer.offsets for layer in self._layers], restore)
        self._layers, self._kept = [], []


def confine_positions_(
    layers: Sequence[ACUConv2d],
    pull: float = 0.0,
    max_displacement: float | None = None,
    pull_to: RoundTo = "pixels",
) -> None:
    """Move taps back to within ``max_displacement``, then a part of the way to where they are pulled, in place.

    Call it after ``optimizer.step``.

    Args:
        layers: the layers whose taps to move.
        pull: the fraction of the way, 0 to 1; see :meth:`~lightning_acu.training.schedules.Schedule.pull`.
        max_displacement: maximum distance in pixels of a tap from where it started; None for no limit.
        pull_to: "pixels": each tap to its nearest whole pixel; "dilation": all taps of a position group to the plain
            dilated grid that is nearest to them before this call (layers of free shapes have none).
    """
    grids = [_nearest_grids(layers)] if pull_to == "dilation" and pull > 0 else []

    def confine(offsets: Tensor, start: Tensor, *grid: Tensor) -> Tensor:
        if max_displacement is not None:
            moved = offsets - start
            length = moved.norm(dim=-1, keepdim=True)
            offsets = torch.where(length > max_displacement, start + moved * (max_displacement / length), offsets)
        return offsets.lerp(grid[0] if grid else offsets.round(), pull)

    starts = [layer.starting_offsets().flatten() for layer in layers]
    apply_to_pairs_([layer.offsets for layer in layers], confine, starts, *grids)


@torch.no_grad()
def _nearest_grids(layers: Sequence[ACUConv2d]) -> list[Tensor]:
    """For each of ``layers`` its ``offsets`` on the nearest dilated grids; at once for those of one geometry."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, layer in enumerate(layers):
        geometry = replace(layer.geometry, stride=(1, 1), groups=1)
        alike[geometry, layer.offsets.device, layer.offsets.dtype].append(index)
    grids: dict[int, Tensor] = {}
    for (geometry, *_), indices in alike.items():
        offsets = [layers[index].active_offsets() for index in indices]
        together = torch.cat(offsets)
        nearest = dilated_offsets(nearest_dilations(together, geometry), geometry).to(together.dtype)
        for index, grid in zip(indices, nearest.split([len(own) for own in offsets]), strict=True):
            grids[index] = grid.flatten()
    return [grids[index] for index in range(len(layers))]


@torch.no_grad()
def apply_to_pairs_(tensors: Sequence[Tensor], function: Callable[..., Tensor], *others: Sequence[Tensor]) -> None:
    """Replace the (dy, dx) pairs in ``tensors`` by ``function(pairs)``, in place.

    Under FSDP2 a collective operation, to be called on every process.

    Args:
        tensors: offsets or their gradients, each 1-D of even length. They are changed in place because DDP and CUDA
            graphs hold references to them.
        function: maps (N, 2), the pairs of many tensors, to (N, 2).
        others: for each further argument of ``function``, tensors of the same lengths as ``tensors``, not sharded.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.device, tensor.dtype, is_sharded(tensor)].append(index)
    for (*_, sharded), indices in groups.items():
        group = [tensors[index] for index in indices]
        complete = [whole(tensor) for tensor in group]  # a shard may end in the middle of a pair
        arguments = [complete, *([other[index] for index in indices] for other in others)]
        pairs = function(*(torch.cat(argument).view(-1, 2) for argument in arguments))
        results = pairs.flatten().split([len(tensor) for tensor in complete])
        if sharded:
            for tensor, result in zip(group, results, strict=True):
                copy_whole_(tensor, result)
        else:
            torch._foreach_copy_(group, list(results))
