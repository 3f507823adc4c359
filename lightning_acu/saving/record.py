"""The form of the record in a file of :func:`lightning_acu.save_acu`, checked before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .builders import is_builder_name

__all__ = ["Record", "check_record", "check_state"]

#: The name or builder and the arguments that build the architecture, and how each active layer was converted; as JSON.
Record = dict[str, Any]


def check_record(record: Any) -> None:
    """Check the kind of every field that is read.

    Raises:
        ValueError: one is missing or of another kind; the message has its name and value.
    """
    architecture = _field(record, "", "architecture", dict)
    if "builder" in architecture:
        if not is_builder_name(_field(architecture, "architecture.", "builder", str)):
            raise ValueError(
                f"`architecture.builder` (={_short(architecture['builder'])}) must have the form "
                '"package.module:function"'
            )
    else:
        _field(architecture, "architecture.", "name", str)
    _field(architecture, "architecture.", "kwargs", dict)
    for number, layer in enumerate(_field(record, "", "layers", list)):
        where = f"layers[{number}]."
        if not isinstance(layer, dict):
            raise ValueError(f"`{where[:-1]}` (={_short(layer)}) must be a dict")
        for name in ("name", "class", "backend"):
            _field(layer, where, name, str)
        if _field(layer, where, "position_groups", int) < 1:
            raise ValueError(f"`{where}position_groups` (={layer['position_groups']}) must be at least 1")
        tap = _field(layer, where, "fixed_tap", int | None)
        if tap is not None and tap < 0:
            raise ValueError(f"`{where}fixed_tap` (={tap}) must not be negative")
        start = _field(layer, where, "start", list | None)
        if start is not None and not all(map(_is_position, start)):
            raise ValueError(f"`{where}start` (={_short(start)}) must be pairs of finite numbers")
        if "convolution" in layer:  # files of version 0.1 do not have it
            _field(layer, where, "convolution", dict)
    for key, first in _field(record, "", "aliases", dict).items():
        _field({key: first}, "aliases.", key, str)
    for key, dtype in _field(record, "", "buffer_dtypes", dict).items():
        found = getattr(torch, str(dtype).removeprefix("torch."), None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"`buffer_dtypes.{key}` (={_short(dtype)}) must be a floating-point dtype of torch")


def check_state(state: Any, record: Record) -> None:
    """Check that ``state`` maps names to tensors with values, and has those that ``record`` names.

    Raises:
        ValueError: it does not, or positions are in half precision or not finite; the message has the name.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"`state_dict` (a {type(state).__name__}) must map names to tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"`state_dict[{_short(key)}]` (a {type(value).__name__}) must be a tensor with a name")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise ValueError(f"`state_dict[{_short(key)}]` ({kind}) must hold real numbers")
    for key, first in record["aliases"].items():
        if first not in state:
            raise ValueError(f"`aliases.{key}` (={_short(first)}) is not in the file's state_dict")
    for number, layer in enumerate(record["layers"]):
        key = f"{layer['name']}.offsets".removeprefix(".")
        positions = state.get(record["aliases"].get(key, key))
        if positions is None:
            continue  # noticed when there is a layer for them
        if positions.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the positions {key!r} of `layers[{number}]` are in {positions.dtype}, not float32")
        if not positions.isfinite().all():
            raise ValueError(f"the positions {key!r} of `layers[{number}]` are not finite")


def _field(values: Any, where: str, name: str, kind: Any) -> Any:
    """The value called ``name``, if it is of ``kind``; bool is no int here."""
    if name not in values:
        raise ValueError(f"`{where}{name}` is missing")
    value = values[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"`{where}{name}` (={_short(value)}) must be of type {expected}, not {type(value).__name__}")
    return value


def _is_position(pair: Any) -> bool:
    numbers = isinstance(pair, list) and len(pair) == 2 and all(type(value) in (int, float) for value in pair)
    return numbers and all(map(math.isfinite, pair))


def _short(value: Any) -> str:
    """For a message: what is in a file may be long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
