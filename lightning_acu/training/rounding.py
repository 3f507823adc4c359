"""Rounding of all positions of a model to whole pixels, with a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import few
from ..conv import ACUConv2d
from ..sharded import copy_whole_, whole
from ..statistics import layer_statistics
from .gradients import drop_gradients_

__all__ = ["Collision", "RoundingReport", "check_collision", "check_finite", "round_and_freeze", "round_layers"]

#: What to do when taps of a layer are rounded to the same pixel.
Collision = Literal["report", "error", "separate"]


@dataclass(frozen=True)
class RoundingReport:
    """What rounding did to the taps that can move; ``str(report)`` is a sentence.

    Attributes:
        taps: the number of taps that can move, in all layers.
        mean_distance: by how many pixels rounding moved them, on average; 0 if there are none.
        max_distance: by how many pixels at most.
        away: the number of taps that are not where they started, after rounding.
        collisions: for each layer in which taps were rounded to the pixel of another, their number.
        separated: whether those taps were then moved to pixels of their own.
    """

    taps: int
    mean_distance: float
    max_distance: float
    away: int
    collisions: Mapping[str, int]
    separated: bool

    @property
    def nothing_learned(self) -> bool:
        """Whether all taps are back where they started, although some can move."""
        return self.taps > 0 and self.away == 0

    def __str__(self) -> str:
        """How far the taps were moved, how many are not where they started, and which collided."""
        moved = "no tap can move"  # only 1x1 kernels with a fixed centre
        if self.taps:
            moved = (
                f"{self.taps} taps were moved by {self.mean_distance:.2f} pixels on average, by at most "
                f"{self.max_distance:.2f}; {self.away} of them are not where they started"
            )
        collided = "no two taps share a pixel"
        if self.collisions:
            collided = f"taps rounded to the pixel of another: {_text(self.collisions)}"
            collided += ", then separated" if self.separated else ""
        return f"{moved}; {collided}"


def check_collision(collision: str) -> None:
    """Check that ``collision`` is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if collision not in get_args(Collision):
        raise ValueError(f"`collision` (={collision!r}) must be 'report', 'error' or 'separate'")


@torch.no_grad()
def check_finite(layers: Iterable[tuple[str, ACUConv2d]]) -> None:
    """Check that all positions are finite; under FSDP2 a collective operation.

    Raises:
        RuntimeError: some are nan or inf; the message names the layers and taps.
    """
    bad = [
        f"tap {tap}" + (f" of position group {group}" if layer.position_groups > 1 else "") + f" of {name}"
        for name, layer in layers
        for group, tap in (~layer.active_offsets().isfinite().all(-1)).nonzero().tolist()
    ]
    if bad:
        raise RuntimeError(
            f"positions are not finite: {few(bad)}; the training has diverged: load an earlier checkpoint, and lower "
            "the learning rate of positions or of the weights"
        )


@torch.no_grad()
def round_layers(layers: Sequence[tuple[str, ACUConv2d]], collision: Collision = "report") -> RoundingReport:
    """Round the positions of ``layers`` in place, each tap to its nearest pixel.

    Under FSDP2 a collective operation, to be called on every process.

    Args:
        layers: (name, layer), as :func:`~lightning_acu.training.trained_layers` finds them.
        collision: what to do when taps of a layer are rounded to the same pixel: "report" them (their weights add up,
            nothing is lost); raise an "error"; or "separate" them, each to a pixel of its own, as near as possible.

    Returns:
        What rounding did.

    Raises:
        ValueError: ``collision`` is none of these.
        RuntimeError: positions are not finite, or taps collided and ``collision`` is "error"; no position is changed
            then.
    """
    check_collision(collision)
    check_finite(layers)
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
                f"taps would be rounded to the pixel of another: {_text(collisions)} (`collision`='error'); no "
                "position was changed. Choose 'separate', or 'report' to let their weights add up"
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


def round_and_freeze(
    layers: Sequence[tuple[str, ACUConv2d]], optimizers: Iterable[Optimizer], collision: Collision = "report"
) -> RoundingReport:
    """:func:`round_layers`, and delete the gradients and the optimizers' momentum of these positions.

    They stay on their pixels as long as their gradients are dropped before each step
    (:func:`~lightning_acu.training.drop_gradients_`).

    Raises:
        RuntimeError: see :func:`round_layers`; nothing is changed then.
    """
    report = round_layers(layers, collision)
    drop_gradients_(layer for _, layer in layers)
    for optimizer in optimizers:
        for _, layer in layers:
            optimizer.state.pop(layer.offsets, None)
    return report


def _movable(displacements: Iterable[tuple[ACUConv2d, Tensor]]) -> Tensor:
    """The lengths of displacements, pairs of a layer and (P, K, 2), of all taps that can move, 1-D."""
    lengths = [moved.norm(dim=-1)[:, layer.movable].flatten().cpu() for layer, moved in displacements]
    return torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *lengths])


def _text(collisions: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in collisions.items())
