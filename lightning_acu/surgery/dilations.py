"""The dilations that a model has learned, and plain models that are built with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..checks import few, require_module
from ..conv import ACUConv2d
from ..dilation import Dilations, as_dilations, padding_at
from ..folded import FoldedConv2d, ReshapedConv2d
from ..geometry import LIMIT, ConvGeometry, pair, resolve_padding
from ..grid_fold import SplitConv2d
from .marks import was_folded

__all__ = ["apply_dilations", "found_dilations"]


def found_dilations(model: nn.Module) -> dict[str, Dilations]:
    """By name, the dilations of active layers that are on plain dilated grids, and of those that were folded there."""
    found = {name: _groups(module) for name, module in model.named_modules()}
    return {name: as_dilations(groups) for name, groups in found.items() if groups}


def _groups(module: nn.Module) -> list[tuple[int, int]] | None:
    if isinstance(module, ACUConv2d):
        return module.grid_dilations
    if not was_folded(module):
        return None
    if isinstance(module, SplitConv2d):
        return module.dilations
    inner = module.convs[0] if isinstance(module, FoldedConv2d) and len(module.convs) == 1 else module
    if not isinstance(inner, nn.Conv2d):
        return None
    own = inner.own if isinstance(inner, ReshapedConv2d) else vars(inner)
    shown = getattr(module, "kernel_size", own["kernel_size"])
    return [pair(own["dilation"])] if pair(own["kernel_size"]) == pair(shown) else None


def apply_dilations(model: nn.Module, dilations: Mapping[str, int | Sequence[Any]]) -> nn.Module:
    """Give convolutions of a plain model these dilations, in place, so that a found architecture can be trained.

    Each keeps its weights, its output size and its centre: ``padding`` grows with the dilation. (With a
    ``padding_mode`` other than zeros the border that it makes grows; in the active layer, what was beyond it was zero.)

    Args:
        model: a model of plain convolutions, such as a new one of the architecture that was searched.
        dilations: by qualified name, (dy, dx) or one number for both: ``report_acu(found).dilations``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``dilations`` is not a mapping.
        ValueError: a name that is not that of a plain ``nn.Conv2d`` (active and folded ones are not), or a dilation
            that is not two whole numbers >= 1, or that differs between position groups, or that no padding of
            ``nn.Conv2d`` goes with. The message names the layer; nothing has been changed.

    Example::

        found = report_acu(rounded_model).dilations
        model = apply_dilations(timm.create_model("resnet18"), found)
    """
    require_module(model)
    if not isinstance(dilations, Mapping):
        raise TypeError(
            f"`dilations` (={dilations!r}) must map names of convolutions to (dy, dx), as report_acu(model).dilations"
        )
    modules = dict(model.named_modules())
    changes = []
    for name, value in dilations.items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d) or isinstance(conv, ACUConv2d | ReshapedConv2d):
            plain = [other for other, module in modules.items() if isinstance(module, nn.Conv2d)]
            what = "not in the model" if conv is None else f"a {type(conv).__name__}, not a plain convolution"
            raise ValueError(f"`dilations`: {name!r} is {what}; convolutions of the model: {few(plain) or 'none'}")
        changes.append((conv, _attributes(name, conv, _one_pair(name, value))))
    for conv, attributes in changes:
        vars(conv).update(attributes)
    return model


def _one_pair(name: str, value: Any) -> tuple[int, int]:
    """(dy, dx) of an entry; lists, as JSON and YAML have them, are as good as tuples."""
    pairs = value if isinstance(value, Sequence) and value and isinstance(value[0], Sequence) else [value]
    numbers = {tuple(each) if isinstance(each, Sequence) else (each, each) for each in pairs}
    if len(numbers) > 1:
        raise ValueError(
            f"`dilations`: {name!r} has different dilations for its position groups (={value!r}), and a plain "
            "convolution has one; search with position_groups=1, or leave it out"
        )
    (found,) = numbers
    if len(found) != 2 or not all(type(number) is int and 1 <= number < LIMIT for number in found):
        raise ValueError(f"`dilations`: that of {name!r} (={value!r}) must be (dy, dx), two whole numbers >= 1")
    return found[0], found[1]


def _attributes(name: str, conv: nn.Conv2d, dilation: tuple[int, int]) -> dict[str, Any]:
    """The attributes that ``conv`` gets."""
    changed: dict[str, Any] = {"dilation": dilation}
    kernel_size, stride, own = map(pair, (conv.kernel_size, conv.stride, conv.dilation))
    before = _output_sizes(name, conv, {}, dilation)
    # Padding "same", and classes that pad by the size of the image, follow the dilation by themselves.
    if _output_sizes(name, conv, changed, dilation) == before:
        return changed
    sides = resolve_padding(conv.padding, kernel_size, stride, own)
    top, left, bottom, right = padding_at(dilation, ConvGeometry(kernel_size, stride, sides, own))
    changed["_reversed_padding_repeated_twice"] = [left, right, top, bottom]
    if conv.padding != "same":
        changed["padding"] = top, left
    symmetric = top == bottom >= 0 and left == right >= 0
    if not (symmetric or conv.padding == "same") or _output_sizes(name, conv, changed, dilation) != before:
        raise ValueError(
            f"`dilations`: {name!r} cannot have {dilation} with an output of the same size: it would need a padding of "
            f"{(top, left, bottom, right)} (top, left, bottom, right), which this {type(conv).__name__} does not have; "
            "leave it out"
        )
    return changed


def _output_sizes(name: str, conv: nn.Conv2d, changed: dict[str, Any], dilation: tuple[int, int]) -> list[torch.Size]:
    """Those for images of as many sizes as there are pixels in a stride, with the attributes ``changed``; no data."""
    probe = copy.copy(conv)
    for attribute in [key for key, value in vars(probe).items() if key.endswith("_hooks") and isinstance(value, dict)]:
        vars(probe)[attribute] = {}
    probe = copy.deepcopy(probe).to("meta")
    vars(probe).update(changed)
    reach = 1 + max(
        (k - 1) * max(d, own) for k, d, own in zip(pair(conv.kernel_size), dilation, pair(conv.dilation), strict=True)
    )
    sizes = range(reach, reach + max(pair(conv.stride)))
    try:
        with torch.no_grad():
            return [
                probe.forward(torch.empty(1, conv.in_channels, n, n, dtype=conv.weight.dtype, device="meta")).shape
                for n in sizes
            ]
    except Exception as error:
        raise ValueError(
            f"`dilations`: {name!r} ({type(conv).__name__}) could not be run to see its output size: "
            f"{type(error).__name__}: {error}"
        ) from error
