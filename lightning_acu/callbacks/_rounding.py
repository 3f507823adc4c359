"""All positions of a model to whole pixels, with a word on what that did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..conv import ACUConv2d
from ..metrics import layer_statistics
from ..sharded import copy_whole_, whole

__all__ = ["round_layers"]


def round_layers(layers: Sequence[tuple[str, ACUConv2d]], collision: str) -> str:
    """Round the positions of ``layers`` in place.

    Args:
        layers: (name, layer).
        collision: "report", "error" or "separate", as in RoundThenFinetune.

    Returns:
        How far the taps moved and which collided, for people.

    Raises:
        RuntimeError: taps ended on one pixel, under "error"; all positions are as before then.
    """
    before = [whole(layer.offsets.detach()).clone() for _, layer in layers]
    collided = []
    for name, layer in layers:
        layer.round_()
        if shared := layer_statistics(layer).collisions:
            collided.append(f"{shared} in {name}")
    text = ", ".join(collided)
    if collided and collision != "report":
        for (_, layer), offsets in zip(layers, before, strict=True):
            copy_whole_(layer.offsets, offsets)
        if collision == "error":
            raise RuntimeError(f"RoundThenFinetune: taps fell on the pixel of another: {text} (`collision`='error')")
        for _, layer in layers:
            layer.round_(separate=True)
        text += ", now apart"
    moving = [layer.displacement.norm(dim=-1)[:, layer.movable].flatten().cpu() for _, layer in layers]
    away = torch.cat(moving) > 0
    if len(away) and not away.any():
        rank_zero_warn(
            "RoundThenFinetune: after rounding all taps are where they started, so nothing was learned; raise the "
            "`multiplier` of PositionLRSchedule, or train longer before rounding"
        )
    told = f"taps that fell on the pixel of another: {text}" if collided else "no two taps fell on one pixel"
    places = f"{int(away.sum())} of {len(away)} are away from where they started"
    return f"{_distances([layer for _, layer in layers], before)}; {places}; {told}"


def _distances(layers: Sequence[ACUConv2d], before: Sequence[Tensor]) -> str:
    ways = [
        (layer.active_offsets().detach() - old.view(layer.position_groups, -1, 2)).norm(dim=-1)[:, layer.movable]
        for layer, old in zip(layers, before, strict=True)
    ]
    moved = torch.cat([way.flatten().cpu() for way in ways])
    if not len(moved):  # only 1x1 kernels with a fixed centre
        return "no tap can move"
    return f"{len(moved)} taps moved {moved.mean():.2f} pixels on average, {moved.max():.2f} at most"
