"""Copies of a model's positions, wherever they are kept: teachers, averages of one's own, dicts of weights.

Unlike the averages of :mod:`.averages` they are of no known class: nobody can tell which of them should be rounded.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conv import ACUConv2d, acu_layers
from ..sharded import copy_whole_, whole

__all__ = ["PositionCopy", "copied_positions", "hold_copies_", "hold_copies_in_", "on_whole_pixels"]

#: How many containers and objects are opened, one inside the other; entries of a container; objects in all.
_DEPTH, _ENTRIES, _OBJECTS = 5, 1000, 20_000

#: What holds no copies.
_CLOSED = (
    Tensor,
    str,
    bytes,
    bool,
    int,
    float,
    type(None),
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
)

_CONTAINERS = (dict, list, tuple, set, frozenset)


@dataclass(frozen=True, eq=False)  # tensors have no single ==
class PositionCopy:
    """A tensor that is a copy of a layer's ``offsets``.

    Attributes:
        path: where it was found.
        name: what it is called there, the last part of ``path``.
        offsets: the tensor.
    """

    path: str
    name: str
    offsets: Tensor


def copied_positions(
    layers: Sequence[tuple[str, ACUConv2d]], where: str, value: Any, skip: tuple[type, ...] = ()
) -> Iterator[PositionCopy]:
    """Each copy of the positions of ``layers`` that can be reached from ``value``.

    Found are active convolutions in modules, and tensors in buffers and dicts, that have the name and the shape of the
    ``offsets`` of one of ``layers``; in containers and in attributes of objects. Dots in names need not be there.

    Args:
        layers: (name, layer), as :func:`~lightning_acu.training.trained_layers` finds them. They are no copies.
        where: what ``value`` is called; paths begin with it.
        value: a module, a dict of tensors, a container of those, or any object that has them as attributes.
        skip: classes of objects that are not searched.
    """
    own = {id(layer.offsets) for _, layer in layers}
    seen: set[int] = set()

    def walk(where: str, value: Any, depth: int) -> Iterator[PositionCopy]:
        if isinstance(value, (*_CLOSED, *skip)) or (isinstance(value, _CONTAINERS) and not value):
            return
        if id(value) in seen or depth > _DEPTH or len(seen) > _OBJECTS:
            return
        seen.add(id(value))
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, nn.Module):
            named = {f"{name}.offsets" if name else "offsets": layer.offsets for name, layer in acu_layers(value)}
            yield from positions(where, named | dict(value.named_buffers()))
            inner = (
                (f"{name}.{key}" if name else key, item)
                for name, module in value.named_modules()
                for key, item in vars(module).items()
                if key not in ("_modules", "_buffers", "_parameters")
            )
        elif isinstance(value, dict):
            yield from positions(where, value)
            inner = value.items() if len(value) <= _ENTRIES else ()
        elif isinstance(value, _CONTAINERS):
            inner = enumerate(value) if len(value) <= _ENTRIES else ()
        elif hasattr(value, "__dict__"):
            inner = vars(value).items()
        for name, child in list(inner):
            yield from walk(f"{where}.{name}", child, depth + 1)

    def positions(where: str, named: Mapping[Any, Any]) -> Iterator[PositionCopy]:
        for name, tensor in named.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                continue
            if id(tensor) not in own and id(tensor) not in seen and _originals(layers, name, tensor):
                seen.add(id(tensor))
                yield PositionCopy(f"{where}.{name}", name, tensor)

    yield from walk(where, value, 0)


@torch.no_grad()
def hold_copies_(layers: Sequence[tuple[str, ACUConv2d]], copies: Iterable[PositionCopy]) -> None:
    """Set the positions of ``copies`` to those of the ``layers`` that they are copies of.

    Where several layers have the name and shape of a copy, it is the one with the closest positions.

    Args:
        layers: (name, layer) of the model, on whole pixels.
        copies: as :func:`copied_positions` finds them.
    """
    copies = list(copies)
    held = {id(copy.offsets) for copy in copies}
    layers = [(name, layer) for name, layer in layers if id(layer.offsets) not in held]
    for copy in copies:
        now = whole(copy.offsets.detach())
        values = [whole(layer.offsets.detach()).to(now) for layer in _originals(layers, copy.name, now)]
        if values:
            copy_whole_(copy.offsets, min(values, key=lambda value: (value - now).norm().item()))


def hold_copies_in_(layers: Sequence[tuple[str, ACUConv2d]], where: str, value: Any) -> None:
    """:func:`hold_copies_` for all copies that :func:`copied_positions` finds in ``value``, called ``where``.

    ``value`` may hold the model beside its copy, as some averages do. It may be a part of the model, such as a teacher
    inside it: its own layers are copies then.
    """
    copies = list(copied_positions(layers, where, value))
    if not copies and isinstance(value, nn.Module):
        inside = {id(child) for child in value.modules()}
        layers = [(name, layer) for name, layer in layers if id(layer) not in inside]
        copies = list(copied_positions(layers, where, value))
    hold_copies_(layers, copies)


def on_whole_pixels(offsets: Tensor) -> bool:
    """Whether all numbers are finite and whole."""
    return bool((offsets - offsets.round() == 0).all())  # inf - inf and nan are not 0


def _originals(layers: Sequence[tuple[str, ACUConv2d]], name: str, tensor: Tensor) -> list[ACUConv2d]:
    """The layers whose ``offsets`` a tensor of this name may be a copy of."""
    if not name.endswith("offsets"):
        return []
    same = [(f"{own}.offsets", layer) for own, layer in layers if layer.offsets.shape == tensor.shape]
    found = [layer for own, layer in same if _one_ends_with_the_other(f".{own}", f".{name}")]
    bare = name.replace(".", "")  # names of buffers cannot have dots
    return found or [layer for own, layer in same if _one_ends_with_the_other(own.replace(".", ""), bare)]


def _one_ends_with_the_other(one: str, other: str) -> bool:
    return one.endswith(other) or other.endswith(one)
