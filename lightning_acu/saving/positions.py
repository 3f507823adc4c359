"""The positions of a model alone: a small state_dict to keep, to compare, and to put into another copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..conv import ACUConv2d, acu_layers
from ..sharded import copy_whole_, whole

__all__ = ["acu_state_dict", "load_acu_state_dict"]

_PARAMETER = "offsets"


def acu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The positions of every active convolution: ``{"layer1.0.conv2.offsets": tensor, ...}``.

    The keys are those of ``model.state_dict()``; a shared layer appears once, under its first name. The tensors are
    copies, (P*K*2,) in pixels, on the devices of the layers, with zeros for a tap that is fixed. Under FSDP2 they are
    whole on every process, and this is a collective operation.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no active convolution.
    """
    _check_module(model)
    # active_offsets: what a fixed tap has stored is no position.
    state = {_key(name): layer.active_offsets().detach().flatten().clone() for name, layer in acu_layers(model)}
    if not state:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no active convolution; convert_to_acu(model) makes some"
        )
    return state


def load_acu_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> nn.Module:
    """Put positions into the active convolutions of ``model``, in place; parameters keep their identity.

    Args:
        model: converted as the model was that the positions are from.
        state: what :func:`acu_state_dict` gave, or a whole state_dict, of which only the positions are read. A shared
            layer may have any of its names. Tensors may be on any device.
        strict: every active convolution must have its positions in ``state``; otherwise those that have none stay
            where they are.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``state`` is not a mapping from str to tensors.
        ValueError: ``state`` does not fit, with everything that is wrong in one message: layers that are missing, plain
            or unknown, sizes that differ, a centre that moves where the model's is fixed, numbers that are not finite.
            Nothing has been loaded then.
    """
    _check_module(model)
    names = dict(model.named_modules(remove_duplicate=False))
    layers = {layer: name for name, layer in acu_layers(model)}
    given = _positions(state, names)
    if not layers:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no active convolution to take positions; "
            "call convert_to_acu(model) with the same arguments first"
        )
    if not given:
        raise ValueError(f"`state` ({len(state)} keys) has no positions: no key ends in {_PARAMETER!r}")
    values: dict[ACUConv2d, Tensor] = {}
    plain, unknown, sizes, centres, infinite, twice = [], [], [], [], [], []
    for name, value in given.items():
        layer = names.get(name)
        if layer is None:
            unknown.append(_key(name))
        elif not isinstance(layer, ACUConv2d):
            plain.append(_key(name))
        elif value.shape != layer.offsets.shape:
            sizes.append(_size(name, value, layer))
        elif not value.isfinite().all():
            infinite.append(_key(name))
        elif layer in values and not torch.equal(values[layer], value):
            twice.append(f"{_key(name)} and {_key(layers[layer])}")
        elif layer.fixed_tap is not None and value.view(layer.position_groups, -1, 2)[:, layer.fixed_tap].any():
            centres.append(_key(name))
        else:
            values[layer] = value
    named = {names.get(name) for name in given}
    missing = [_key(name) for layer, name in layers.items() if layer not in named] if strict else []
    own = _key(next(iter(layers.values())))
    problems = [
        _problem(missing, "missing in it; pass strict=False to leave such layers as they are"),
        _problem(plain, "of convolutions that are plain in the model; convert them too"),
        _problem(unknown, f"of layers that the model does not have (its own are named like {own})"),
        _problem(sizes, "of another size; `position_groups` or the kernel size differ"),
        _problem(centres, "with a centre that moves, where the model's is fixed; convert with fixed_centre=False"),
        _problem(infinite, "with numbers that are not finite"),
        _problem(twice, "two names of one layer with different numbers"),
    ]
    if any(problems):
        listed = "\n  ".join(filter(None, problems))
        raise ValueError(f"`state` does not fit `model` (={type(model).__name__}); nothing was loaded:\n  {listed}")
    for layer, value in values.items():
        copy_whole_(layer.offsets, value.to(layer.offsets.device))
    return model


def _positions(state: Mapping[str, Tensor], names: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The positions in ``state`` by the name of their layer, whole; not what other modules may call "offsets"."""
    if not isinstance(state, Mapping):
        raise TypeError(f"`state` must map names to tensors, got {type(state).__name__}; acu_state_dict gives one")
    found = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"`state` has the key {key!r}; its keys must be str, as those of acu_state_dict")
        name, _, parameter = key.rpartition(".")
        module = names.get(name)
        foreign = not isinstance(module, ACUConv2d) and isinstance(getattr(module, _PARAMETER, None), Tensor)
        if parameter != _PARAMETER or foreign:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"`state` has a {type(value).__name__} (={value!r}) as {key!r}; it must be a tensor")
        found[name] = whole(value.detach())
    return found


def _size(name: str, value: Tensor, layer: ACUConv2d) -> str:
    kernel = "x".join(map(str, layer.kernel_size))
    own = f"{layer.offsets.numel()} with position_groups={layer.position_groups} and a {kernel} kernel"
    return f"{_key(name)}: {'x'.join(map(str, value.shape)) or 'one'} numbers where the model has {own}"


def _problem(examples: Sequence[str], what: str) -> str:
    """One line that counts and shows a few; empty where there are none."""
    more = f" and {len(examples) - 3} more" if len(examples) > 3 else ""
    return f"{len(examples)} {what}: {', '.join(examples[:3])}{more}" if examples else ""


def _key(name: str) -> str:
    return f"{name}.{_PARAMETER}" if name else _PARAMETER


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__} (={model!r})")
