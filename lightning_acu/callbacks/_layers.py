"""What a trainer trains: its active convolutions, their averaged copies, and whether it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from ..conv import ACUConv2d
from ..figures import LayerShape, shapes_of
from ..training import averaged_models, trained_layers

__all__ = [
    "averages_of",
    "averaging_callbacks",
    "callbacks_of",
    "require_layers",
    "require_lightning",
    "require_whole_positions",
    "reshard",
    "swapped_in",
    "trained_shapes",
]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The trainer's callbacks, in a list of its own."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]  # set by a connector


def trained_shapes(module: nn.Module) -> list[LayerShape]:
    """The shapes of :func:`~lightning_acu.training.trained_layers`, for pictures."""
    names = {name for name, _ in trained_layers(module)}
    return [shape for shape in shapes_of(module) if shape.name in names]


def require_layers(callback: pl.Callback, module: pl.LightningModule) -> list[tuple[str, ACUConv2d]]:
    """The layers that are trained, or an error that says how to get some."""
    layers = trained_layers(module)
    if not layers:
        raise RuntimeError(
            f"{type(callback).__name__}: {type(module).__name__} has no active convolution; call convert_to_acu(model) "
            "in its __init__, add the callback ConvertToACU, or give ImageClassifier a `convert` that matches some"
        )
    return layers


def require_lightning(callback: pl.Callback, module: object) -> None:
    """An error for modules of the package ``pytorch_lightning``, whose classes are others than ``lightning``'s."""
    if not isinstance(module, pl.LightningModule):
        raise TypeError(
            f"{type(callback).__name__}: {type(module).__name__} is not a lightning.pytorch.LightningModule; write "
            "`import lightning.pytorch as pl`, not `import pytorch_lightning as pl`"
        )


def require_whole_positions(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """An error under strategies that hide single parameters and their gradients."""
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise RuntimeError(
            f"{type(callback).__name__}: {type(trainer.strategy).__name__} flattens parameters, so that positions and "
            "their gradients cannot be reached; use ModelParallelStrategy with fully_shard (FSDP2), or DDP"
        )


def reshard(module: nn.Module) -> None:
    """Under FSDP2, let go of parameters gathered for a forward pass, so that changes reach the pieces that stay."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


def averaging_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks that hold an average; they may swap it in for a validation."""
    return [callback for callback in callbacks_of(trainer) if any(True for _ in _held_averages(callback))]


def averages_of(trainer: pl.Trainer) -> list[nn.Module]:
    """The averages that callbacks hold: WeightAveraging, StochasticWeightAveraging and the user's own."""
    return [average for callback in callbacks_of(trainer) for average in _held_averages(callback)]


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


def _held_averages(callback: pl.Callback) -> Iterator[nn.Module]:
    yield from averaged_models(vars(callback).values())
    average = getattr(callback, "_average_model", None)
    if isinstance(average, pl.LightningModule):  # StochasticWeightAveraging's is a plain copy
        yield average
