"""Fold a whole model back into plain convolutions, or round its positions to whole pixels."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..checks import require_module
from ..conv import ACUConv2d, acu_layers
from ..plain import CONFIGURATION
from .checks import check_model, check_not_traced
from .guards import guard_merging
from .marks import FOLDED, RESHAPED, SKIP_REASON

__all__ = ["fold_acu", "round_acu"]

#: What code that reads the weight of a convolution assumes to be unchanged.
_SHAPE = ("kernel_size", "padding", "dilation", "stride", "groups")

#: What an active convolution has and its fold does not.
_OWN_PARAMETERS = frozenset(("weight", "bias", "gain", "offsets"))
_OWN_ATTRIBUTES = frozenset(("position_groups", "backend", "start", "fixed_tap"))

#: Where nn.Module keeps hooks; a folded layer keeps those of the active one.
_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook"))
)


def fold_acu(model: nn.Module) -> nn.Module:
    """Replace every active convolution by plain ones that compute the same function, exactly, at any positions.

    In place: each layer becomes its fold (see :meth:`ACUConv2d.fold`) and keeps its identity, so that hooks, shared
    modules and a convolution that is itself ``model`` survive. The parameters are new; an existing optimizer has the
    old ones. With taps between pixels the fold has a larger kernel than the layer: round first (:func:`round_acu`)
    if that matters more than exactness.

    Returns:
        ``model``, now without active convolutions.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: positions are not finite; the message names the layer, and nothing has been folded.
    """
    check_model(model)
    folds = []
    for name, layer in acu_layers(model):
        try:
            folds.append((layer, layer.fold()))
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from error
    for layer, folded in folds:
        reshaped = getattr(layer, RESHAPED, False)  # by an earlier fold
        reshaped = reshaped or any(getattr(folded, name, None) != getattr(layer, name) for name in _SHAPE)
        state = vars(folded) | {name: vars(layer)[name] for name in _HOOKS if name in vars(layer)}
        _keep_the_rest(layer, state)
        layer.__class__ = type(folded)  # type: ignore[assignment]
        vars(layer).clear()
        vars(layer).update(state)
        setattr(layer, SKIP_REASON, "folded from an active convolution")
        setattr(layer, FOLDED, True)
        if reshaped:
            setattr(layer, RESHAPED, True)
    guard_merging(model)
    return model


def _keep_the_rest(layer: ACUConv2d, state: dict[str, Any]) -> None:
    """Add to ``state`` what others have put on ``layer``: buffers, modules and attributes that hooks may use."""
    for kind in ("_parameters", "_buffers", "_modules"):
        others = {name: value for name, value in vars(layer)[kind].items() if name not in _OWN_PARAMETERS}
        state[kind] = others | state[kind]
    state["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"] | layer._non_persistent_buffers_set
    for name, value in vars(layer).items():
        if name not in CONFIGURATION and name not in _OWN_ATTRIBUTES:
            state.setdefault(name, value)


def round_acu(model: nn.Module, *, separate: bool = False) -> nn.Module:
    """Move every tap of every active convolution to the nearest whole pixel, in place; returns ``model``.

    Taps of one layer that end on the same pixel keep their weights and act as one; with ``separate`` each gets its own
    pixel instead (see :meth:`ACUConv2d.round_`).

    Raises:
        TypeError: ``model`` is not a module, or torch.fx has traced it from active convolutions.
        ModuleNotFoundError: ``separate`` and taps that would meet, and SciPy is not installed.
        ValueError: with ``separate``, positions are not finite.
    """
    require_module(model)
    check_not_traced(model)
    for _, layer in acu_layers(model):
        layer.round_(separate)
    return model
