"""All positions of a model to whole pixels, and what that did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..conv import ACUConv2d
from ..sharded import copy_whole_, whole
from ..statistics import layer_statistics

__all__ = ["Collision", "RoundingReport", "check_collision", "round_layers"]

#: What to do where taps of one layer end on one pixel.
Collision = Literal["report", "error", "separate"]


@dataclass(frozen=True)
class RoundingReport:
    """What rounding did to the taps that can move; ``str`` of it is a sentence for people.

    Attributes:
        taps: how many can move, in all layers.
        mean_distance: how far rounding moved them, in pixels; 0 without any.
        max_distance: the furthest.
        away: how many are away from where they started, now that they are rounded.
        collisions: for each layer where taps fell on the pixel of another, how many did.
        separated: whether those were then put on pixels of their own.
    """

    taps: int
    mean_distance: float
    max_distance: float
    away: int
    collisions: Mapping[str, int]
    separated: bool

    @property
    def nothing_learned(self) -> bool:
        """Whether all taps are where they started, though some can move."""
        return self.taps > 0 and self.away == 0

    def __str__(self) -> str:
        """How far the taps moved, how many are away from their start, and which collided."""
        moved = "no tap can move"  # only 1x1 kernels with a fixed centre
        if self.taps:
            moved = (
                f"{self.taps} taps moved {self.mean_distance:.2f} pixels on average, {self.max_distance:.2f} at most"
            )
        collided = "no two taps fell on one pixel"
        if self.collisions:
            collided = f"taps that fell on the pixel of another: {_text(self.collisions)}"
            collided += ", now apart" if self.separated else ""
        return f"{moved}; {self.away} of {self.taps} are away from where they started; {collided}"


def check_collision(collision: str) -> None:
    """Nothing for one of the choices.

    Raises:
        ValueError: anything else.
    """
    if collision not in get_args(Collision):
        raise ValueError(f"`collision` (={collision!r}) must be 'report', 'error' or 'separate'")


@torch.no_grad()
def round_layers(layers: Sequence[tuple[str, ACUConv2d]], collision: Collision = "report") -> RoundingReport:
    """Round the positions of ``layers`` in place, each tap to its nearest pixel.

    Under FSDP2 a collective operation, to be called on every process.

    Args:
        layers: (name, layer), as :func:`~lightning_acu.training.trained_layers` finds them.
        collision: what to do when taps of one layer end on one pixel: "report" them (their weights add up, nothing is
            lost); raise an "error"; or "separate" them, each to a pixel of its own, as near as possible.

    Raises:
        ValueError: another ``collision``.
        RuntimeError: taps ended on one pixel, under "error"; all positions are as before then.
    """
    check_collision(collision)
    before = [whole(layer.offsets.detach()).clone() for _, layer in layers]
    collisions = {}
    for name, layer in layers:
        layer.round_()
        if shared := layer_statistics(layer).collisions:
            collisions[name] = shared
    if collisions and collision != "report":
        for (_, layer), offsets in zip(layers, before, strict=True):
            copy_whole_(layer.offsets, offsets)
        if collision == "error":
            raise RuntimeError(
                f"taps fell on the pixel of another: {_text(collisions)} (`collision`='error'); positions are not "
                "rounded. Choose 'separate', or 'report' to let their weights add up"
            )
        for _, layer in layers:
            layer.round_(separate=True)
    distances = _movable(
        (layer, layer.active_offsets() - old.view(layer.position_groups, -1, 2))
        for (_, layer), old in zip(layers, before, strict=True)
    )
    away = _movable((layer, layer.displacement) for _, layer in layers) > 0
    return RoundingReport(
        taps=len(distances),
        mean_distance=distances.mean().item() if len(distances) else 0.0,
        max_distance=distances.max().item() if len(distances) else 0.0,
        away=int(away.sum()),
        collisions=collisions,
        separated=collision == "separate",
    )


def _movable(ways: Iterable[tuple[ACUConv2d, Tensor]]) -> Tensor:
    """The lengths of ``ways``, (layer, (P, K, 2)), of the taps that can move, in one row."""
    return torch.cat([torch.empty(0), *(way.norm(dim=-1)[:, layer.movable].flatten().cpu() for layer, way in ways)])


def _text(collisions: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in collisions.items())
