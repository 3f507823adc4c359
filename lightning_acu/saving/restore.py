"""Convert a model as the record of a file says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..checks import few
from ..conv import ACUConv2d, acu_layers
from ..folded import ReshapedConv2d
from ..surgery import Activation, activate
from ..surgery.recorded import geometry_record, layer_record
from ..surgery.rules import find_rule

__all__ = ["restore_layers"]

#: What a conversion chose; not the backend, which is how a layer is computed and not what.
_CHOICES = ("class", "position_groups", "fixed_tap", "start")


def restore_layers(model: nn.Module, records: Sequence[dict[str, Any]]) -> nn.Module:
    """Convert exactly the layers that ``records`` name, in place, as they say; layers that are active already must fit.

    Args:
        model: plain, or converted as the recorded model was, or partly.
        records: of :func:`~lightning_acu.surgery.recorded.layer_records`. Those of files of version 0.1 have no
            "convolution", which is then not compared.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is a compiled, DDP- or FSDP-wrapped one. Nothing has been converted then.
        ValueError: a layer is missing, cannot be converted or is another one, or an active layer is not recorded.
            Nothing has been converted then, except where a layer becomes one of another class than the recorded one.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[nn.Module, Activation] = {}
    recorded = set()
    for record in records:
        name, conv = record["name"], modules.get(record["name"])
        recorded.add(conv)
        if isinstance(conv, ACUConv2d):
            _compare(name, {key: value for key, value in layer_record(name, conv).items() if key in _CHOICES}, record)
            _compare(name, geometry_record(conv), record.get("convolution", {}))
            continue
        if conv is None or isinstance(conv, ReshapedConv2d) or find_rule(conv) is None:
            found = "does not exist" if conv is None else f"is a {type(conv).__name__}, for which there is no rule"
            raise ValueError(f"{name} should be a convolution to convert, but {found}")
        _compare(name, geometry_record(conv), record.get("convolution", {}))
        layers[conv] = Activation(record["position_groups"], record["fixed_tap"] is not None, record["backend"])
    if extra := [name or "the model" for name, layer in acu_layers(model) if layer not in recorded]:
        raise ValueError(f"these layers are active in the model, but plain in the file: {few(extra)}")
    activate(model, layers)
    for record in records:
        conv = modules[record["name"]]
        if conv not in layers:
            continue
        assert isinstance(conv, ACUConv2d)
        if type(conv).__name__ != record["class"]:
            raise ValueError(f"{record['name']} becomes a {type(conv).__name__}, not a {record['class']}")
        conv.fixed_tap = record["fixed_tap"]
        conv.start = None if record["start"] is None else tuple((float(y), float(x)) for y, x in record["start"])
    return model


def _compare(name: str, own: dict[str, Any], record: dict[str, Any]) -> None:
    """Check ``own`` values of the layer ``name`` against those of ``record`` that it has."""
    for key, value in own.items():
        if key in record and record[key] != value:
            raise ValueError(
                f"the {key} of {name or 'the model'} is {value} in the model and {record[key]} in the file"
            )
