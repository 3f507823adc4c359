"""Where the taps of a layer are, apart from the model: what a picture needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..conv import ACUConv2d, acu_layers

__all__ = ["LayerShape", "common_reach", "groups_that_share", "mean_move", "shapes_of"]


@dataclass(frozen=True, eq=False)  # tensors have no single ==
class LayerShape:
    """The taps of one active convolution, in input pixels from the centre of its kernel, on the CPU.

    Only ``positions`` change in training, so that a later frame is ``dataclasses.replace(shape, positions=...)``.

    Attributes:
        name: qualified name in the model; the class name where the model is the layer.
        positions: (P, K, 2), (dy, dx) of each tap of each position group.
        start: (K, 2), where the taps started.
        movable: (K,) bool, True for the taps that can move.
        unit: pixels between two grid lines of a picture: the larger dilation, at least 1.
        regular: whether the taps started as a regular kernel. Its taps round by whole pixels from their start (which
            for even kernels is half a pixel off the centre), those of any other shape to whole pixels.
    """

    name: str
    positions: Tensor
    start: Tensor
    movable: Tensor
    unit: float = 1.0
    regular: bool = True


def shapes_of(model: nn.Module) -> list[LayerShape]:
    """The shapes of all active convolutions of ``model``, detached copies; a shared layer once.

    Raises:
        ValueError: ``model`` has no active convolution.
    """
    layers = list(acu_layers(model))
    if not layers:
        raise ValueError(f"`model` (={type(model).__name__}) has no active convolution; call convert_to_acu first")
    return [
        LayerShape(
            name=name or type(model).__name__,
            positions=(positions := layer.positions.cpu()),
            start=positions.new_tensor(_start(layer)),
            movable=layer.movable.cpu(),
            unit=float(max(1, *layer.geometry.dilation)),
            regular=layer.start is None,
        )
        for name, layer in layers
    ]


def _start(layer: ACUConv2d) -> Sequence[tuple[float, float]]:
    # Not positions - displacement: that is rounded in float32, and nan where a tap is.
    if layer.start is not None:
        return layer.start
    (kh, kw), (dh, dw) = layer.geometry.kernel_size, layer.geometry.dilation
    return [((i - (kh - 1) / 2) * dh, (j - (kw - 1) / 2) * dw) for i in range(kh) for j in range(kw)]


def mean_move(shape: LayerShape) -> float:
    """Mean distance, in pixels, of the movable taps from where they started; of those that are finite."""
    distance = (shape.positions - shape.start).double().norm(dim=-1)[:, shape.movable]
    distance = distance[distance.isfinite()]
    return distance.mean().item() if len(distance) else 0.0


def groups_that_share(shape: LayerShape) -> int:
    """How many position groups have several taps at exactly the same place."""
    finite = shape.positions.double().where(shape.positions.isfinite(), torch.nan)
    # As complex numbers, which sort: quicker than unique rows. nan differs from itself.
    places = np.sort(torch.view_as_complex(finite).numpy())
    return int((places[:, 1:] == places[:, :-1]).any(-1).sum())


def common_reach(shapes: Sequence[LayerShape]) -> float:
    """Half the side of a panel that shows the taps of all ``shapes``, in grid lines; the same after rounding.

    It covers the pixels that the taps are nearest to and 3/4 of a grid line more. Taps that ran away do not count:
    those more than 3 grid lines beyond the largest start, unless half of all taps are at least a third as far out.
    """
    started = max((shape.start.abs().max().item() / shape.unit for shape in shapes), default=0.0)
    extents = torch.cat([_settled(shape).double().abs().amax(-1).flatten() / shape.unit for shape in shapes])
    extents = extents[extents.isfinite()]
    if not len(extents):
        return 1.75
    limit = max(started + 3, 3 * extents.median().item())
    largest = max(1.0, started, extents[extents <= limit].max().item())
    return math.floor(largest + 0.5) + 0.75


def _settled(shape: LayerShape) -> Tensor:
    """(P, K, 2): where the taps would be after rounding."""
    origin = shape.start if shape.regular else torch.zeros_like(shape.start)
    return (shape.positions - origin).round() + origin
