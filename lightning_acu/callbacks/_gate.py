"""The one place where callbacks change the gradients of positions: after clipping, before the optimizer's step.

Lightning has no hook there: a callback's ``on_before_optimizer_step`` comes before clipping, and under manual
optimisation users clip by themselves. So the gate takes the place of three methods of the module, the only attributes
of a user's object that this package replaces; they are back when training ends.

By then the gradient is complete: summed over accumulated batches, averaged over processes, unscaled. And weights are
clipped as if the positions were not there, because their gradients are set aside meanwhile. (Normalising in a
callback's ``on_before_optimizer_step``, before clipping, let unit gradients of positions squeeze those of the weights.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from ..conv import ACUConv2d
from ..training import parameter_ids, trained_layers
from ._clock import PositionClock

__all__ = ["GradientGate"]

#: Changes ``layer.offsets.grad`` of the layers that an optimizer is about to step. None there makes the optimizer
#: leave the positions alone altogether; a zero gradient would let momentum and decay move them.
Transform = Callable[[pl.Trainer, Optimizer, Sequence[ACUConv2d]], None]

#: The methods of a LightningModule that the gate takes the place of.
_HOOKS = ("clip_gradients", "configure_gradient_clipping", "on_before_optimizer_step")


class GradientGate:
    """Stands between a module's gradients and its optimizers: clips without the positions, then transforms them.

    One for each module, made by the first callback that adds a transform and gone with the last one's. Transforms run
    in the order they were added; once one sets a gradient to None it stays None.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.transforms: list[Transform] = []
        #: When positions may learn: what the callbacks of this training share.
        self.clock = PositionClock()
        self._layers: list[ACUConv2d] | None = None
        self._replaced = {name: getattr(module, name) for name in _HOOKS}
        self._own = {name: vars(module)[name] for name in _HOOKS if name in vars(module)}
        for name in _HOOKS:
            setattr(module, name, getattr(self, name))

    @classmethod
    def of(cls, module: pl.LightningModule) -> GradientGate | None:
        """The gate of ``module``, if it has one."""
        gate = getattr(vars(module).get(_HOOKS[0]), "__self__", None)
        return gate if isinstance(gate, cls) and gate.module is module else None

    @classmethod
    def add(cls, module: pl.LightningModule, transform: Transform) -> GradientGate:
        """Apply ``transform`` from now on; harmless when it is applied already. The gate of ``module``."""
        gate = cls.of(module) or cls(module)
        if transform not in gate.transforms:
            gate.transforms.append(transform)
        return gate

    @classmethod
    def remove(cls, module: pl.LightningModule, transform: Transform) -> None:
        """Stop applying ``transform``; harmless when it never was."""
        gate = cls.of(module)
        if gate is not None and transform in gate.transforms:
            gate.transforms.remove(transform)
            if not gate.transforms:
                for name in _HOOKS:
                    delattr(module, name)
                vars(module).update(gate._own)

    @property
    def layers(self) -> list[ACUConv2d]:
        """The module's active convolutions; walking through all modules at each step would cost more than the rest."""
        if self._layers is None:
            self._layers = [layer for _, layer in trained_layers(self.module)]
        return self._layers

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Automatic optimisation: the last that Lightning calls before the step of ``optimizer``."""
        with self._positions_aside(optimizer):
            self._replaced["configure_gradient_clipping"](optimizer, *args, **kwargs)
        self._transform(optimizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Manual optimisation, where the clipping hook is never called: the last before the step."""
        self._replaced["on_before_optimizer_step"](optimizer)
        if not self.module.automatic_optimization:
            self._transform(optimizer)

    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Also what users call themselves, under manual optimisation."""
        with self._positions_aside(optimizer):
            self._replaced["clip_gradients"](optimizer, *args, **kwargs)

    @contextmanager
    def _positions_aside(self, optimizer: Optimizer) -> Iterator[None]:
        aside = [(layer, layer.offsets.grad) for layer in self._stepped(optimizer)]
        for layer, _ in aside:
            layer.offsets.grad = None
        try:
            yield
        finally:
            for layer, grad in aside:
                layer.offsets.grad = grad

    def _transform(self, optimizer: Optimizer) -> None:
        layers = self._stepped(optimizer)
        for transform in self.transforms:
            layers = [layer for layer in layers if layer.offsets.grad is not None]
            if layers:
                transform(self.module.trainer, optimizer, layers)

    def _stepped(self, optimizer: Optimizer) -> list[ACUConv2d]:
        """The active convolutions whose positions ``optimizer`` is about to step."""
        held = parameter_ids([optimizer])
        return [layer for layer in self.layers if id(layer.offsets) in held]

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the module (weight averaging makes one) or a pickled one: a gate that does nothing."""
        return {**vars(self), "transforms": [], "clock": PositionClock(), "_layers": None}
