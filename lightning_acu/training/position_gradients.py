"""What is done to the gradients of positions around a step: the same for PositionTrainer and for the callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import few
from ..choices import did_you_mean
from ..conv import ACUConv2d
from ..sharded import whole
from .gradients import NonFiniteGuard, apply_to_pairs_, drop_gradients_, normalize_gradients_, unit_vectors
from .param_groups import is_position_group, source_group

__all__ = ["Normalize", "PositionGradients", "averaging_coefficient", "find_normalize", "unused_positions"]

#: How the gradient of a tap becomes its direction: of length 1; the average of its gradients, of length 1. None: raw.
Normalize = Literal["gradient", "momentum"]

#: The coefficient of the average of gradients where the optimizer keeps none itself.
_COEFFICIENT = 0.9

#: A key of an optimizer's state of positions: the exponential average of their gradients.
_AVERAGE = "acu_gradient_average"

#: A key of a group of positions: its optimizer's own momentum has been set to 0.
_OFF = "acu_momentum_off"


def find_normalize(normalize: Normalize | bool | None) -> Normalize | None:
    """The rule of that name; True is "gradient" and False is None, as in older configurations.

    Raises:
        ValueError: it is none of these.
    """
    if normalize is True:
        return "gradient"
    if normalize is False or normalize is None:
        return None
    if normalize not in get_args(Normalize):
        raise ValueError(
            f"`normalize` (={normalize!r}) must be 'gradient' (or True), 'momentum' or None (or False)"
            f"{did_you_mean(normalize, get_args(Normalize))}"
        )
    return normalize


def unused_positions(layers: Iterable[tuple[str, ACUConv2d]]) -> str:
    """A sentence on layers whose weights have a gradient and whose positions have none; empty if there are none.

    Call it before the first step. Layers that rest, or whose positions are frozen, are no fault.
    """
    names = [
        name
        for name, layer in layers
        if layer.offsets.requires_grad and layer.offsets.grad is None
        # weight norm and the like compute the weight from other parameters
        if (weight := layer._parameters.get("weight")) is not None and weight.grad is not None
    ]
    if not names:
        return ""
    return (
        f"the positions of {few(names)} got no gradient in the first step, although the weights did, so they will not "
        "learn: most likely the model does not call the layer but reads its `weight`, as in F.conv2d(x, "
        "self.conv.weight). fold_acu would then change its output; call the layer, or leave it out of the conversion "
        "with `exclude_modules`"
    )


class PositionGradients:
    """Turns the gradients of positions into their directions before each step of an optimizer.

    Example::

        gradients = PositionGradients()
        gradients.before_step(optimizer, layers, "gradient")  # accumulated, clipped; None where positions stay still
        optimizer.step()
        gradients.after_step(optimizer)
    """

    def __init__(self) -> None:
        #: Keeps taps whose gradient is not finite where they are, and counts them.
        self.guard = NonFiniteGuard()
        self._averages: list[tuple[Tensor, Tensor]] = []  # positions, and the average to keep if the step is taken
        self._fresh: list[Tensor] = []  # positions without a state in the optimizer before the step

    def before_step(
        self,
        optimizer: Optimizer,
        layers: Sequence[ACUConv2d],
        normalize: Normalize | None,
        scale: Tensor | None = None,
    ) -> None:
        """Normalise the gradients; under FSDP2 a collective operation, as is ``after_step``.

        With "momentum" an exponential average of the raw gradients is kept in the optimizer's state and normalised. Its
        coefficient is ``momentum`` or ``betas[0]`` of the group that the positions came from, 0.9 where that has none
        or 0; in the group of positions that setting is 0, so that they are not averaged, nor multiplied, twice.

        Args:
            optimizer: the optimizer that is about to step.
            layers: those of its layers whose gradients may be changed. A gradient of frozen positions becomes None: a
                step would still be taken along it.
            normalize: as :func:`find_normalize` returns it.
            scale: of the loss, where the optimizer unscales gradients of mixed precision itself (fused ones).
        """
        drop_gradients_(layer for layer in layers if not layer.offsets.requires_grad)
        held = [layer for layer in layers if layer.offsets.grad is not None]
        self._averages = []
        if held:
            _switch_momentum(optimizer, off=normalize == "momentum")
        if normalize == "momentum":
            self._average(optimizer, held, scale)
        elif normalize == "gradient":
            normalize_gradients_(held)
        if normalize is not None and scale is not None:
            for gradient in _gradients(held):
                gradient.mul_(scale.to(gradient.device))
        self.guard.before_step(layers)
        self._fresh = [layer.offsets for layer in held if not optimizer.state.get(layer.offsets)]

    def after_step(self, optimizer: Optimizer) -> None:
        """Put back what must not have moved; keep the averages, unless the step was skipped in mixed precision."""
        found_inf = getattr(optimizer, "found_inf", None)  # of fused optimizers, which skip steps themselves
        self.guard.after_step(found_inf)
        averages, self._averages = self._averages, []
        fresh, self._fresh = self._fresh, []
        if found_inf is not None and (averages or fresh) and found_inf.item():
            for offsets in fresh:  # torch's fused SGD leaves a momentum it has just made uninitialised
                optimizer.state.pop(offsets, None)
            return
        for offsets, average in averages:  # not before the first step: Adam sets up a state only where it is empty
            optimizer.state[offsets][_AVERAGE] = average

    @torch.no_grad()
    def _average(self, optimizer: Optimizer, layers: Sequence[ACUConv2d], scale: Tensor | None) -> None:
        """Replace gradients by the unit vectors of their averages."""
        ids = {id(layer.offsets) for layer in layers}
        for group in _position_groups(optimizer):
            held = [parameter for parameter in group["params"] if id(parameter) in ids]
            gradients = [parameter.grad for parameter in held]
            before = [whole(_average_of(optimizer, parameter)) for parameter in held]
            averages = [torch.empty_like(parameter) for parameter in held]
            coefficient = averaging_coefficient(source_group(optimizer, group))

            def average(_: Tensor, before: Tensor, gradients: Tensor, coefficient: float = coefficient) -> Tensor:
                if scale is not None:
                    gradients = gradients / scale.to(gradients.device)
                after = coefficient * before + (1 - coefficient) * gradients
                return torch.where(after.isfinite().all(-1, keepdim=True), after, before)

            apply_to_pairs_(averages, average, before, [whole(gradient) for gradient in gradients])
            apply_to_pairs_(gradients, _directions, [whole(average) for average in averages])
            self._averages += zip(held, averages, strict=True)


def _directions(gradients: Tensor, averages: Tensor) -> Tensor:
    """Unit vectors of ``averages``, and gradients that are not finite as they are, for the guard to see."""
    return torch.where(gradients.isfinite().all(-1, keepdim=True), unit_vectors(averages), gradients)


def _average_of(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    average = optimizer.state.get(parameter, {}).get(_AVERAGE)
    return torch.zeros_like(parameter) if average is None else average


def averaging_coefficient(group: dict[str, Any]) -> float:
    """The coefficient with which an optimizer averages gradients of ``group``; 0.9 where it does not."""
    own = group["betas"][0] if group.get("betas") else group.get("momentum", 0.0)
    return float(own) or _COEFFICIENT


def _switch_momentum(optimizer: Optimizer, off: bool) -> None:
    """Set the momentum of groups of positions to 0, or back to that of the groups they came from.

    Done before each step: OneCycleLR and others set the momentum of all groups.
    """
    for group in _position_groups(optimizer):
        if not off and not group.pop(_OFF, False):
            continue
        if off:
            group[_OFF] = True
        source = source_group(optimizer, group)
        if "momentum" in group:
            group["momentum"] = 0.0 if off else source["momentum"]
        if group.get("betas"):
            group["betas"] = (0.0, *group["betas"][1:]) if off else source["betas"]


def _position_groups(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    return filter(is_position_group, optimizer.param_groups)


def _gradients(layers: Sequence[ACUConv2d]) -> Iterator[Tensor]:
    return (layer.offsets.grad for layer in layers if layer.offsets.grad is not None)
