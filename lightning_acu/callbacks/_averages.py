"""Averaged copies of a model: which there are, and their positions after rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..conv import ACUConv2d, acu_layers
from ..sharded import copy_whole_, whole

__all__ = ["averaged_layers", "averaging_callbacks", "is_average", "keep_rounded", "swapped_in"]


def is_average(module: Any) -> bool:
    """Torch's AveragedModel (Lightning's WeightAveraging uses it), timm's ModelEma, ModelEmaV2 and ModelEmaV3."""
    names = {kind.__name__ for kind in type(module).__mro__}
    return isinstance(module, AveragedModel) or not names.isdisjoint(("ModelEma", "ModelEmaV2", "ModelEmaV3"))


def averaging_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks that hold an average; they may swap it in for a validation."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if any(True for _ in _averages(vars(callback)))]


@contextmanager
def swapped_in(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """The model as a validation sees it: with the average of WeightAveraging in place of its weights."""
    swapping = [callback for callback in averaging_callbacks(trainer) if hasattr(callback, "_swap_models")]
    for callback in swapping:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in swapping:
            callback.on_validation_epoch_end(trainer, module)


def averaged_layers(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[ACUConv2d, ACUConv2d]]:
    """(trained layer, its averaged copy): of averages inside the module, of WeightAveraging and of other callbacks.

    The original of an average is recognised by its class and the names and shapes of its active convolutions; where
    that fits several parts of the module (a student and a teacher), it is the one with the closest weights.
    """
    roots = [average for child in module.modules() for average in _averages({"": child})]
    for holder in (module, *trainer.callbacks):  # type: ignore[attr-defined]
        roots += _averages(vars(holder))
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
def keep_rounded(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give averaged copies exactly the whole positions of the model.

    At rounding; and again later, as averaging equal numbers is not exact in every formula: with a decay of 0.9998,
    ``decay * 3 + (1 - decay) * 3`` leads away from 3 by a thousandth over some hundred steps. The average may stand in
    the model's place when this is called.
    """
    for layer, average in averaged_layers(trainer, module):
        layer.round_()
        copy_whole_(average.offsets, whole(layer.offsets.detach()).to(average.offsets.device))


def _averages(values: dict[str, Any]) -> Iterator[nn.Module]:
    """The averaged models among some attributes."""
    for name, value in values.items():
        if is_average(value):
            average = getattr(value, "module", None) or getattr(value, "ema", None)  # ModelEma calls it so
            if isinstance(average, nn.Module):
                yield average
        elif name == "_average_model" and isinstance(value, pl.LightningModule):  # StochasticWeightAveraging
            yield value


def _shapes(layers: dict[str, ACUConv2d]) -> dict[str, Any]:
    return {name: (layer.weight.shape, layer.offsets.shape) for name, layer in layers.items()}


def _distance(originals: dict[str, ACUConv2d], copies: dict[str, ACUConv2d]) -> float:
    return sum(
        (originals[name].weight.detach().cpu() - copies[name].weight.detach().cpu()).norm().item() for name in copies
    )
