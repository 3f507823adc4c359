"""A whole model back to plain convolutions, or its positions to whole pixels."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..conv import CONFIGURATION, ACUConv2d, acu_layers
from .convert import check_model, check_not_traced
from .guards import guard_merging
from .loading import explain_loading
from .marks import FOLDED, RESHAPED, SKIP_REASON

__all__ = ["fold_acu", "round_acu"]

#: What code that reads the weight of a convolution takes for granted.
_SHAPE = ("kernel_size", "padding", "dilation", "stride", "groups")

#: What an active convolution has of its own, which its fold does without.
_OWN_PARAMETERS = frozenset(("weight", "bias", "gain", "offsets"))
_OWN_ATTRIBUTES = frozenset(("position_groups", "backend", "start", "fixed_tap"))

#: What nn.Module keeps of hooks; a folded layer goes on with those of the layer it was.
_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook"))
)


def fold_acu(model: nn.Module) -> nn.Module:
    """Replace every active convolution by plain ones that compute the same, exactly, at any positions.

    In place: each layer becomes its fold (see :meth:`ACUConv2d.fold`) without changing its identity, so that shared
    modules, a convolution as the root and hooks stay what they are. Parameters are new; an optimizer made before holds
    the old ones. A taps-between-pixels fold has a larger kernel than the layer it came from: round first
    (:func:`round_acu`) where that matters more than exactness.

    Returns:
        ``model``, now without active convolutions.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: positions that are not finite, with the layer's name; nothing has been folded then.
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
    explain_loading(model)
    return model


def _keep_the_rest(layer: ACUConv2d, state: dict[str, Any]) -> None:
    """Into ``state`` what somebody else has put on ``layer``: buffers, modules and attributes that hooks may use."""
    for kind in ("_parameters", "_buffers", "_modules"):
        others = {name: value for name, value in vars(layer)[kind].items() if name not in _OWN_PARAMETERS}
        state[kind] = others | state[kind]
    state["_non_persistent_buffers_set"] = state["_non_persistent_buffers_set"] | layer._non_persistent_buffers_set
    for name, value in vars(layer).items():
        if name not in CONFIGURATION and name not in _OWN_ATTRIBUTES:
            state.setdefault(name, value)


def round_acu(model: nn.Module, *, separate: bool = False) -> nn.Module:
    """Move every tap of every active convolution to the nearest whole pixel, in place; returns ``model``.

    Taps of one layer that end on the same pixel keep their weights and act as one; with ``separate`` each gets a pixel
    of its own instead (see :meth:`ACUConv2d.round_`).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: with ``separate``, positions that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__} (={model!r})")
    check_not_traced(model)
    for _, layer in acu_layers(model):
        layer.round_(separate)
    return model
