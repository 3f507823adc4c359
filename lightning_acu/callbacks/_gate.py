"""The one place where callbacks change the gradients of positions: after clipping, before the optimizer's step.

Lightning has no hook at that point: a callback's ``on_before_optimizer_step`` runs before clipping, and under manual
optimisation users clip by themselves. So the gate replaces three methods of the module while it is trained, and
restores them when training ends. No other patch stays on a user's module: ConvertToACU's wrappers are gone once called.

After clipping the gradient is complete: summed over accumulated batches, averaged over processes, unscaled. Gradients
of positions are set aside while the weights are clipped, so that they do not count in the norm. (If positions were
normalised before clipping, their unit gradients would dominate the norm and shrink the gradients of the weights.)

Not every step comes by these methods: that of an optimizer which the user steps directly, or which is part of another
(as in SAM), does not. While a module is trained, torch's hooks on the steps of all optimizers see those too. The hooks
alone would not do: Lightning computes the gradients in a closure, inside the step, after the hook before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..conv import ACUConv2d
from ..training import Normalize, PositionGradients, parameter_ids, trained_layers
from ._clock import PositionClock

__all__ = ["GradientGate"]

#: Sets ``layer.offsets.grad`` to None for those layers that an optimizer is about to step and must not move: it skips
#: these; with a gradient of zero, momentum and weight decay would still move them. Returns how to normalise the others.
Transform = Callable[[pl.Trainer, Optimizer, Sequence[ACUConv2d]], Normalize | None]

#: The methods of a LightningModule that the gate replaces.
_HOOKS = ("clip_gradients", "configure_gradient_clipping", "on_before_optimizer_step")


class GradientGate:
    """Between a module's gradients and its optimizers: clips the weights only, then transforms gradients of positions.

    A module has one gate, made by the first callback that adds a transform and removed with the last transform.
    Transforms run in the order in which they were added; a gradient that one of them sets to None stays None.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self.transforms: list[Transform] = []
        #: Shared by the callbacks of this training.
        self.clock = PositionClock()
        self.gradients = PositionGradients()
        self.said = 0  # the number when it was last said
        self._layers: list[ACUConv2d] | None = None
        self._held: dict[int, tuple[Any, list[ACUConv2d]]] = {}  # by id of an optimizer: its groups, layers it steps
        self._ready = False  # the gradients of the coming step have been transformed
        self._transformed = 0  # how often that was done
        self._running: list[tuple[bool, int]] = []  # for each optimizer in a step: with a closure?, `_transformed`
        self._warned = False
        self._trainer: weakref.ref[Any] | None = _trainer_of(module)
        self._handles = [
            register_optimizer_step_pre_hook(_weak(self._before_step)),
            register_optimizer_step_post_hook(_weak(self._after_step)),
        ]
        self._replaced = {name: getattr(module, name) for name in _HOOKS}
        self._own = {name: vars(module)[name] for name in _HOOKS if name in vars(module)}
        for name in _HOOKS:
            setattr(module, name, getattr(self, name))

    @classmethod
    def of(cls, module: pl.LightningModule) -> GradientGate | None:
        """The gate of ``module``, or None."""
        gate = getattr(vars(module).get(_HOOKS[0]), "__self__", None)
        return gate if isinstance(gate, cls) and gate.module is module else None

    @classmethod
    def add(cls, module: pl.LightningModule, transform: Transform) -> GradientGate:
        """Apply ``transform`` from now on (adding it twice does no harm), and return the gate of ``module``."""
        gate = cls.of(module)
        if gate is not None and (not gate._handles or gate._trainer != _trainer_of(module)):
            # Of a copied module, or left by a training that ended where the callbacks were not told: LearningRateFinder
            # takes them off the trainer, so that an exception in its steps never reaches them.
            gate._restore()
            gate = None
        gate = gate or cls(module)
        if transform not in gate.transforms:
            gate.transforms.append(transform)
        return gate

    @classmethod
    def remove(cls, module: pl.LightningModule, transform: Transform) -> None:
        """Stop applying ``transform``; removing one that was never added does no harm."""
        gate = cls.of(module)
        if gate is not None and transform in gate.transforms:
            gate.transforms.remove(transform)
            if not gate.transforms:
                gate._restore()

    def _restore(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name in _HOOKS:
            delattr(self.module, name)
        vars(self.module).update(self._own)

    @property
    def layers(self) -> list[ACUConv2d]:
        """The module's active convolutions, cached: a search at each step would cost more than the rest of the gate."""
        if self._layers is None:
            self._layers = [layer for _, layer in trained_layers(self.module)]
        return self._layers

    def say_not_finite(self) -> str:
        """A sentence on the gradients that were not finite; empty if there were none since it was last called."""
        if (count := self.gradients.guard.count) == self.said:
            return ""
        self.said = count
        step = self.module.trainer.global_step
        return (
            f"gradients of taps were not finite (nan or inf); number by step {step}: {count}; "
            "each time that tap stayed where it was. If the loss is not finite, lower the learning rate, or look for a "
            "division by zero or the square root of zero"
        )

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Automatic optimisation: the last method that Lightning calls before the step of ``optimizer``."""
        with self._positions_set_aside(optimizer):
            self._replaced["configure_gradient_clipping"](optimizer, *args, **kwargs)
        self._transform(optimizer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Manual optimisation, where the clipping hook is never called: the last method before the step."""
        self._replaced["on_before_optimizer_step"](optimizer)
        if not self.module.automatic_optimization:
            self._transform(optimizer)

    def clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Under manual optimisation users call this method themselves."""
        with self._positions_set_aside(optimizer):
            self._replaced["clip_gradients"](optimizer, *args, **kwargs)

    @contextmanager
    def _positions_set_aside(self, optimizer: Optimizer) -> Iterator[None]:
        gradients = [(layer, layer.offsets.grad) for layer in self.layers_of(optimizer)]
        for layer, _ in gradients:
            layer.offsets.grad = None
        try:
            yield
        finally:
            for layer, grad in gradients:
                layer.offsets.grad = grad

    def _transform(self, optimizer: Optimizer) -> None:
        layers = self.layers_of(optimizer)
        if not layers:
            return
        rules = [transform(self.module.trainer, optimizer, layers) for transform in self.transforms]
        normalize = next((rule for rule in rules if rule is not None), None)
        self.gradients.before_step(optimizer, layers, normalize, self._scale(optimizer))
        self._ready = True
        self._transformed += 1

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.layers_of(optimizer):
            return
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None and not self._ready:  # in mixed precision Lightning steps without a closure, too
            self._transform(optimizer)
            self._say_uncounted(optimizer)
        self._running.append((closure is not None, self._transformed))

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.layers_of(optimizer):
            return
        has_closure, transformed = self._running.pop()
        if has_closure and transformed == self._transformed:
            name = type(optimizer).__name__
            raise RuntimeError(
                f"{name}.step(closure) computed the gradients of positions and took the step at once, so that "
                "positions could not be kept still, nor their gradients normalised; compute the gradients first, then "
                f"call {name}.step() without a closure, or step what self.optimizers() returns"
            )
        self.gradients.after_step(optimizer)
        self._ready = False

    def _say_uncounted(self, optimizer: Optimizer) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{type(optimizer).__name__} takes steps that Lightning does not see (it is not stepped by "
                "self.optimizers(), or is part of another optimizer, as in SAM). They are not counted in global_step, "
                "so `warmup_steps`, `at_step`, `at_fraction`, schedules and `max_displacement` do not work: step what "
                "self.optimizers() returns, or use `warmup_epochs` and `at_epoch` with a constant schedule"
            )

    def layers_of(self, optimizer: Optimizer) -> list[ACUConv2d]:
        """The active convolutions whose positions ``optimizer`` holds; found anew when its groups change."""
        groups = [(id(group["params"]), len(group["params"])) for group in optimizer.param_groups]
        known, layers = self._held.get(id(optimizer), (None, []))
        if known != groups:
            held = parameter_ids([optimizer])
            layers = [layer for layer in self.layers if id(layer.offsets) in held]
            self._held[id(optimizer)] = groups, layers
        return layers

    def _scale(self, optimizer: Optimizer) -> Tensor | None:
        """The scale of the loss, where ``optimizer`` unscales gradients itself, in its step."""
        scaler = getattr(self.module.trainer.precision_plugin, "scaler", None)
        if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return None
        one = torch.ones((), dtype=torch.float32, device=self.module.device)
        scale: Tensor = scaler.scale(one)  # an optimizer's `grad_scale` is set later
        return scale

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the module (weight averaging makes one) and pickles of it get a gate that does nothing."""
        empty = {"transforms": [], "clock": PositionClock(), "gradients": PositionGradients(), "_layers": None}
        return vars(self) | empty | {"_held": {}, "_handles": [], "_trainer": None}


def _trainer_of(module: pl.LightningModule) -> weakref.ref[Any] | None:
    trainer = getattr(module, "_trainer", None)  # (the property raises an error where there is none)
    return None if trainer is None else weakref.ref(trainer)


def _weak(method: Callable[..., None]) -> Callable[..., None]:
    """``method`` as a hook that does not keep its object alive: torch's hooks on all optimizers stay for good."""
    reference = weakref.WeakMethod(method)

    def hook(*arguments: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*arguments)

    return hook
