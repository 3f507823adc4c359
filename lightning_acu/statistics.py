"""Statistics of the positions of each layer: how far its taps have moved, and how many share a position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .conv import ACUConv2d, acu_layers

__all__ = ["LayerStatistics", "layer_statistics", "model_statistics"]


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer over the taps that can move; lengths are in input pixels.

    Attributes:
        mean_displacement: mean distance of a tap from where it started.
        max_displacement: largest such distance.
        receptive_radius: distance of the furthest tap, fixed ones included, from the centre of the kernel.
        off_lattice: fraction of taps that are not on whole pixels, 0 to 1.
        collisions: number of taps, fixed ones included, that share their position with an earlier tap of their
            position group.
        taps: number of taps that can move, in all position groups.
    """

    mean_displacement: float
    max_displacement: float
    receptive_radius: float
    off_lattice: float
    collisions: int
    taps: int


@torch.no_grad()
def layer_statistics(layer: ACUConv2d) -> LayerStatistics:
    """The statistics of one layer; under FSDP2 a collective operation, to be called on every process."""
    positions, offsets = layer.positions.cpu(), layer.active_offsets().detach().cpu()
    movable = layer.movable.cpu()
    distance = layer.displacement.cpu().norm(dim=-1)[:, movable]
    off_lattice = (offsets - offsets.round() != 0).any(-1)[:, movable]  # inf - inf is nan, and differs from 0
    # As complex numbers, which sort. (nan differs from itself, and so do two taps that are nan.)
    places = np.sort(torch.view_as_complex(positions.double().contiguous()).numpy())
    collisions = int((places[:, 1:] == places[:, :-1]).sum())
    taps = distance.numel()  # 0 for a 1x1 kernel, whose only tap is fixed
    return LayerStatistics(
        mean_displacement=distance.mean().item() if taps else 0.0,
        max_displacement=distance.max().item() if taps else 0.0,
        receptive_radius=positions.norm(dim=-1).max().item(),
        off_lattice=off_lattice.float().mean().item() if taps else 0.0,
        collisions=collisions,
        taps=taps,
    )


def model_statistics(model: nn.Module) -> dict[str, LayerStatistics]:
    """The statistics of every active convolution of ``model``, by qualified name; a shared layer appears once."""
    return {name: layer_statistics(layer) for name, layer in acu_layers(model)}
