"""Rounding of all positions of a model to whole pixels or to dilated grids, with a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..choices import one_of
from ..conv import ACUConv2d, check_finite, check_grids
from ..dilation import Dilations, RoundTo, as_dilations, check_round_to
from ..sharded import copy_whole_, whole
from ..statistics import layer_statistics
from .gradients import drop_gradients_

__all__ = [
    "Collision",
    "LayerRounding",
    "RoundingReport",
    "check_collision",
    "check_finite",
    "check_fold_after_rounding",
    "compute_as_plain",
    "round_and_freeze",
    "round_layers",
]

#: What to do when taps of a layer are rounded to the same pixel.
Collision = Literal["report", "error", "separate"]


@dataclass(frozen=True)
class LayerRounding:
    """What rounding did to the taps of one layer that can move.

    Attributes:
        mean_distance: by how many pixels rounding moved them, on average; 0 if there are none.
        max_distance: by how many pixels at most.
        dilations: (dy, dx) that the layer was given, or a list of them where position groups differ; None if taps
            were rounded to pixels.
    """

    mean_distance: float
    max_distance: float
    dilations: Dilations | None = None


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
        layers: for each layer how far its taps were moved, and the dilations that it was given.
    """

    taps: int
    mean_distance: float
    max_distance: float
    away: int
    collisions: Mapping[str, int]
    separated: bool
    layers: Mapping[str, LayerRounding] = field(default_factory=dict)

    @property
    def dilations(self) -> dict[str, Dilations]:
        """The dilations that layers were given, as :func:`lightning_acu.apply_dilations` takes them."""
        return {name: layer.dilations for name, layer in self.layers.items() if layer.dilations is not None}

    @property
    def nothing_learned(self) -> bool:
        """Whether all taps are back where they started, although some can move."""
        return self.taps > 0 and self.away == 0

    @property
    def why_nothing(self) -> str:
        """What ``nothing_learned`` means, in words."""
        if self.dilations:
            return "because each layer is nearest to the dilation that it had"
        return "so no position was learned"

    def __str__(self) -> str:
        """How far the taps were moved, how many are not where they started, and which collided."""
        moved = "no tap can move"  # only 1x1 kernels with a fixed centre
        if self.taps:
            moved = (
                f"{self.taps} taps were moved by {self.mean_distance:.2f} pixels on average, by at most "
                f"{self.max_distance:.2f}; {self.away} of them are not where they started"
            )
        if self.dilations:
            counts = Counter(map(str, self.dilations.values())).most_common()
            return f"{moved}; dilations: {', '.join(f'{found} in {_layers(count)}' for found, count in counts)}"
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
    one_of("collision", collision, get_args(Collision))


def check_fold_after_rounding(fold: bool, name: str, to: RoundTo) -> None:
    """Check that layers that are rounded ``to`` (the argument ``name``) can compute as their folds, if they should.

    Raises:
        ValueError: they should, and are rounded to pixels.
    """
    if fold and to != "dilation":
        raise ValueError(
            f"`fold_after_rounding` needs `{name}`='dilation': on whole pixels the fold has a larger kernel, most of "
            "whose weights are zeros that would be trained, or a sum of them"
        )


def compute_as_plain(layers: Iterable[tuple[str, ACUConv2d]]) -> list[str]:
    """Let each of ``layers`` compute as the plain convolution that its taps are on; see the layer's method.

    Returns:
        The names of those that stay active: their position groups have different dilations.
    """
    return [name for name, layer in layers if not layer.compute_as_plain()]


@torch.no_grad()
def round_layers(
    layers: Sequence[tuple[str, ACUConv2d]], collision: Collision = "report", to: RoundTo = "pixels"
) -> RoundingReport:
    """Round the positions of ``layers`` in place, each tap to its nearest pixel, or all to the nearest dilated grid.

    Under FSDP2 a collective operation, to be called on every process.

    Args:
        layers: (name, layer), as :func:`~lightning_acu.training.trained_layers` finds them.
        collision: what to do when taps of a layer are rounded to the same pixel: "report" them (their weights add up,
            nothing is lost); raise an "error"; or "separate" them, each to a pixel of its own, as near as possible.
            On dilated grids taps never meet.
        to: "pixels", or "dilation" (see :meth:`ACUConv2d.round_`).

    Returns:
        What rounding did.

    Raises:
        ValueError: ``collision`` or ``to`` is none of these, ``to`` is "dilation" and a layer has a free shape, or
            positions are not finite; no position is changed then.
        RuntimeError: taps collided and ``collision`` is "error"; no position is changed then.
    """
    check_collision(collision)
    check_round_to("to", to)
    if to == "dilation":
        check_grids(layers)
    check_finite(layers)
    before = [whole(layer.offsets.detach()).clone() for _, layer in layers]
    collisions = {}
    for name, layer in layers:
        layer.round_(to=to)
        if to == "pixels" and (shared := layer_statistics(layer).collisions):
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
    by_layer = {
        name: _movable([(layer, layer.active_offsets() - old.view(layer.position_groups, -1, 2))])
        for (name, layer), old in zip(layers, before, strict=True)
    }
    distances = torch.cat([_movable([]), *by_layer.values()])
    away = _movable((layer, layer.displacement) for _, layer in layers) > 0
    return RoundingReport(
        taps=len(distances),
        mean_distance=_mean(distances),
        max_distance=_highest(distances),
        away=int(away.sum()),
        collisions=collisions,
        separated=collision == "separate" and to == "pixels",
        layers={
            name: LayerRounding(_mean(by_layer[name]), _highest(by_layer[name]), _found(layer, to))
            for name, layer in layers
        },
    )


def round_and_freeze(
    layers: Sequence[tuple[str, ACUConv2d]],
    optimizers: Iterable[Optimizer],
    collision: Collision = "report",
    to: RoundTo = "pixels",
) -> RoundingReport:
    """:func:`round_layers`, and delete the gradients and the optimizers' momentum of these positions.

    They stay where they are as long as their gradients are dropped before each step
    (:func:`~lightning_acu.training.drop_gradients_`).

    Raises:
        ValueError, RuntimeError: see :func:`round_layers`; nothing is changed then.
    """
    report = round_layers(layers, collision, to)
    drop_gradients_(layer for _, layer in layers)
    for optimizer in optimizers:
        for _, layer in layers:
            optimizer.state.pop(layer.offsets, None)
    return report


def _mean(distances: Tensor) -> float:
    return distances.mean().item() if len(distances) else 0.0


def _highest(distances: Tensor) -> float:
    return distances.max().item() if len(distances) else 0.0


def _found(layer: ACUConv2d, to: RoundTo) -> Dilations | None:
    if to == "pixels":
        return None
    groups = layer.grid_dilations
    assert groups is not None  # it was just rounded there
    return as_dilations(groups)


def _movable(displacements: Iterable[tuple[ACUConv2d, Tensor]]) -> Tensor:
    """The lengths of displacements, pairs of a layer and (P, K, 2), of all taps that can move, 1-D."""
    lengths = [moved.norm(dim=-1)[:, layer.movable].flatten().cpu() for layer, moved in displacements]
    return torch.cat([torch.empty(0, dtype=torch.float32, device="cpu"), *lengths])


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _text(collisions: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {name}" for name, count in collisions.items())
