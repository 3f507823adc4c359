"""Averaged copies of a model (EMA and the like): the layers they are copies of, and their positions after rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..conv import ACUConv2d, acu_layers
from ..sharded import copy_whole_, whole

__all__ = ["averaged_layers", "averaged_models", "is_average", "keep_rounded_", "trained_layers"]


def is_average(module: Any) -> bool:
    """Whether ``module`` is torch's AveragedModel (as in Lightning's WeightAveraging) or timm's ModelEma, V2 or V3."""
    names = {kind.__name__ for kind in type(module).__mro__}
    return isinstance(module, AveragedModel) or not names.isdisjoint(("ModelEma", "ModelEmaV2", "ModelEmaV3"))


def averaged_models(objects: Iterable[Any]) -> Iterator[nn.Module]:
    """The averaged model inside each of ``objects`` that is an average (see :func:`is_average`)."""
    for value in objects:
        if is_average(value):
            average = getattr(value, "module", None) or getattr(value, "ema", None)  # the attribute of timm's ModelEma
            if isinstance(average, nn.Module):
                yield average


def trained_layers(module: nn.Module) -> list[tuple[str, ACUConv2d]]:
    """(qualified name, layer) of the active convolutions of ``module``, without those of averaged copies inside it."""
    copies = tuple(f"{name}." for name, child in module.named_modules() if is_average(child))
    return [(name, layer) for name, layer in acu_layers(module) if not name.startswith(copies)]


def averaged_layers(module: nn.Module, averages: Iterable[nn.Module] = ()) -> Iterator[tuple[ACUConv2d, ACUConv2d]]:
    """Pairs of a trained layer and its averaged copy.

    Averages are found among the submodules and attributes of ``module``. The part of the module that an average is a
    copy of has the same class, and active convolutions of the same names and shapes; if several parts match (a student
    and a teacher), it is the one with the closest weights.

    Args:
        module: the module that is trained.
        averages: further averaged copies of it, or of a part of it, that are kept elsewhere.
    """
    roots = [*averaged_models(module.modules()), *averaged_models(vars(module).values()), *averages]
    inside = {id(child) for root in roots for child in root.modules()}
    for root in roots:
        copies = dict(acu_layers(root))
        candidates = [
            originals
            for source in module.modules()
            if id(source) not in inside and type(source) is type(root)
            if _shapes(originals := dict(acu_layers(source))) == _shapes(copies)
        ]
        if candidates:
            original = min(candidates, key=lambda originals: _distance(originals, copies))
            yield from ((original[name], copies[name]) for name in copies)


@torch.no_grad()
def keep_rounded_(module: nn.Module, averages: Iterable[nn.Module] = ()) -> None:
    """Set the positions of averaged copies to the rounded positions of the model, exactly.

    Call it when positions are rounded, and again before an average is used: averaging equal numbers is not always
    exact. With a decay of 0.9998, ``decay * 3 + (1 - decay) * 3`` drifts from 3 by a thousandth over some hundred
    steps. It may be called while an average is swapped in for the model.

    Args:
        module: the module that is trained, with rounded positions.
        averages: see :func:`averaged_layers`, which finds the copies.
    """
    for layer, average in averaged_layers(module, averages):
        layer.round_()
        copy_whole_(average.offsets, whole(layer.offsets.detach()).to(average.offsets.device))


def _shapes(layers: dict[str, ACUConv2d]) -> dict[str, Any]:
    return {name: (layer.weight.shape, layer.offsets.shape) for name, layer in layers.items()}


def _distance(originals: dict[str, ACUConv2d], copies: dict[str, ACUConv2d]) -> float:
    return sum(
        (originals[name].weight.detach().cpu() - copies[name].weight.detach().cpu()).norm().item() for name in copies
    )
