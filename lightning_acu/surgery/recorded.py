"""How each active layer of a model was converted, as plain values."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..conv import ACUConv2d, acu_layers

__all__ = ["geometry_record", "layer_record", "layer_records"]

#: What a convolution computes, besides the shape of its weight, which a state_dict has.
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def layer_records(model: nn.Module) -> list[dict[str, Any]]:
    """A dict for each active layer of ``model``, which can be stored as JSON; a shared layer once."""
    return [layer_record(name, layer) for name, layer in acu_layers(model)]


def layer_record(name: str, layer: ACUConv2d) -> dict[str, Any]:
    """The dict for ``layer``, called ``name`` in its model."""
    return {
        "name": name,
        "class": type(layer).__name__,
        "position_groups": layer.position_groups,
        "fixed_tap": layer.fixed_tap,
        "start": _lists(layer.start),
        "backend": layer.backend,
        "convolution": geometry_record(layer),
    }


def geometry_record(conv: nn.Module) -> dict[str, Any]:
    """What a plain or an active convolution computes, besides the shape of its weight."""
    return {key: _lists(getattr(conv, key)) for key in _GEOMETRY}


def _lists(value: Any) -> Any:
    """``value`` with lists in place of tuples, as JSON has it."""
    return [_lists(part) for part in value] if isinstance(value, tuple | list) else value
