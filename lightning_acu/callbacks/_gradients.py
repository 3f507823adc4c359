"""The one place where callbacks change the gradients of positions: after clipping, before the optimizer's step.

By then the gradient is complete: summed over accumulated batches, averaged over processes, unscaled. And weights are
clipped as if the positions were not there, because their gradients are set aside meanwhile. (Normalising in
``on_before_optimizer_step``, before clipping, let unit gradients of positions squeeze those of the weights.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from ..conv import ACUConv2d, acu_layers

__all__ = ["GradientGate", "require_layers", "transform_before_manual_step", "unit_gradients"]

#: From a layer and the gradient of its offsets to another, or to None: the optimizer then leaves the offsets alone.
Transform = Callable[[ACUConv2d, Tensor], Tensor | None]

_HOOK = "configure_gradient_clipping"


class GradientGate:
    """Takes the place of a module's ``configure_gradient_clipping``: clips without the positions, then transforms them.

    One for each module, made by the first callback that adds a transform and gone with the last one's. Transforms run
    in the order they were added; once one returns None the gradient stays None.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.clip: Callable[..., None] = module.configure_gradient_clipping
        self.transforms: list[Transform] = []

    @classmethod
    def of(cls, module: pl.LightningModule) -> GradientGate | None:
        """The gate of ``module``, if it has one."""
        gate = getattr(vars(module).get(_HOOK), "__self__", None)
        return gate if isinstance(gate, cls) else None

    @classmethod
    def add(cls, module: pl.LightningModule, transform: Transform) -> None:
        """Apply ``transform`` from now on."""
        gate = cls.of(module)
        if gate is None:
            gate = cls(module)
            setattr(module, _HOOK, gate.around_clipping)
        gate.transforms.append(transform)

    @classmethod
    def remove(cls, module: pl.LightningModule, transform: Transform) -> None:
        """Stop applying ``transform``; harmless when it never was."""
        gate = cls.of(module)
        if gate is not None and transform in gate.transforms:
            gate.transforms.remove(transform)
            if not gate.transforms:
                delattr(module, _HOOK)

    def around_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """What Lightning calls between the complete gradient and the step of ``optimizer``."""
        aside = [(layer, layer.offsets.grad) for layer in stepped_layers(self.module, optimizer)]
        for layer, _ in aside:
            layer.offsets.grad = None
        self.clip(optimizer, *args, **kwargs)
        for layer, grad in aside:
            for transform in self.transforms:
                grad = None if grad is None else transform(layer, grad)
            layer.offsets.grad = grad


def transform_before_manual_step(module: pl.LightningModule, optimizer: Optimizer, transform: Transform) -> None:
    """Manual optimisation has no clipping hook: a callback calls this from its ``on_before_optimizer_step``."""
    if not module.automatic_optimization:
        for layer in stepped_layers(module, optimizer):
            grad = layer.offsets.grad
            layer.offsets.grad = None if grad is None else transform(layer, grad)


def stepped_layers(module: pl.LightningModule, optimizer: Optimizer) -> list[ACUConv2d]:
    """The active convolutions whose positions ``optimizer`` is about to step."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [layer for _, layer in acu_layers(module) if id(layer.offsets) in stepped]


def unit_gradients(layer: ACUConv2d, grad: Tensor) -> Tensor:
    """Each tap's gradient scaled to length 1: (g_y, g_x) / sqrt(g_y^2 + g_x^2); a zero gradient stays zero.

    The learning rate of positions is then in pixels a step (for SGD without momentum), whatever the scale of the loss
    and the depth of the layer. Source: Jeon & Kim, section 3.3, the normalised gradient. ``grad``: (P*K*2,).
    """
    pairs = grad.view(layer.position_groups, -1, 2)
    # Scaled by the largest entry first: the square of a float32 gradient below 1e-19 would underflow to zero.
    largest = pairs.abs().amax(-1, keepdim=True)
    scaled = torch.where(largest > 0, pairs / largest, pairs)
    length = scaled.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, scaled / length, scaled).view_as(grad)


def require_layers(callback: pl.Callback, module: pl.LightningModule) -> list[tuple[str, ACUConv2d]]:
    """The active convolutions of ``module``, or an error that says how to get some."""
    layers = list(acu_layers(module))
    if not layers:
        raise RuntimeError(
            f"{type(callback).__name__}: {type(module).__name__} has no active convolution; "
            "call convert_to_acu(model) in its __init__, or give ImageClassifier a `convert` that matches some"
        )
    return layers
