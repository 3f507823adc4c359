"""Which active convolutions a training trains, and whether it can."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn

from ..conv import ACUConv2d, acu_layers
from ..figures import LayerShape, shapes_of
from ._averages import is_average

__all__ = [
    "require_layers",
    "require_lightning",
    "require_whole_positions",
    "reshard",
    "trained_layers",
    "trained_shapes",
]


def trained_layers(module: nn.Module) -> list[tuple[str, ACUConv2d]]:
    """(qualified name, layer) of the active convolutions of ``module``, without those of averaged copies inside it."""
    copies = tuple(f"{name}." for name, child in module.named_modules() if is_average(child))
    return [(name, layer) for name, layer in acu_layers(module) if not name.startswith(copies)]


def trained_shapes(module: nn.Module) -> list[LayerShape]:
    """The shapes of :func:`trained_layers`, for pictures."""
    names = {name for name, _ in trained_layers(module)}
    return [shape for shape in shapes_of(module) if shape.name in names]


def require_layers(callback: pl.Callback, module: pl.LightningModule) -> list[tuple[str, ACUConv2d]]:
    """:func:`trained_layers`, or an error that says how to get some."""
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
            f"{type(callback).__name__}: {type(module).__name__} is no lightning.pytorch.LightningModule; write "
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
