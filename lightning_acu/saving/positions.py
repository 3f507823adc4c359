"""The positions of a model alone: a small state_dict to save, compare, and load into another copy of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checks import few, qualified_name, require_module
from ..conv import ACUConv2d, acu_layers
from ..sharded import copy_whole_, whole

__all__ = ["acu_state_dict", "load_acu_state_dict"]

_PARAMETER = "offsets"


def acu_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The positions of every active convolution: ``{"layer1.0.conv2.offsets": tensor, ...}``.

    The keys are those of ``model.state_dict()``; a shared layer appears once, under its first name. The tensors are
    copies, (P*K*2,) in pixels, on the devices of the layers, with zeros for a fixed tap. Under FSDP2 every process gets
    the whole tensors, and this is a collective operation.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has no active convolution.
    """
    require_module(model)
    # active_offsets: the stored numbers of a fixed tap are not used.
    state = {_key(name): layer.active_offsets().detach().flatten().clone() for name, layer in acu_layers(model)}
    if not state:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no active convolution; call convert_to_acu(model) first"
        )
    return state


def load_acu_state_dict(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> nn.Module:
    """Load positions into the active convolutions of ``model``, in place; parameters keep their identity.

    Args:
        model: converted in the same way as the model that the positions are from.
        state: what :func:`acu_state_dict` returned, or a whole state_dict, of which only the positions are read. A
            shared layer may have any of its names. Tensors may be on any device.
        strict: require positions for every active convolution; if False, layers without positions in ``state`` are
            not changed.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``state`` is not a mapping from str to tensors.
        ValueError: ``state`` does not fit. One message lists everything that is wrong: layers that are missing, plain
            or unknown, sizes that differ, a centre that has moved but is fixed in the model, numbers that are not
            finite. Nothing has been loaded then.
    """
    require_module(model)
    names = dict(model.named_modules(remove_duplicate=False))
    layers = {layer: name for name, layer in acu_layers(model)}
    given = _positions(state, names)
    if not layers:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no active convolution to load positions into; "
            "call convert_to_acu(model) with the same arguments first"
        )
    if not given:
        raise ValueError(f"`state` ({len(state)} keys) has no positions: no key ends in {_PARAMETER!r}")
    values: dict[ACUConv2d, Tensor] = {}
    plain, unknown, sizes, kinds, centres, infinite, twice = [], [], [], [], [], [], []
    for name, value in given.items():
        layer = names.get(name)
        if layer is None:
            unknown.append(_key(name))
        elif not isinstance(layer, ACUConv2d):
            plain.append(_key(name))
        elif value.shape != layer.offsets.shape:
            sizes.append(_size(name, value, layer))
        elif value.layout != torch.strided or value.is_meta or not value.is_floating_point():
            kinds.append(f"{_key(name)} ({value.dtype}, {value.layout}, on {value.device})")
        elif not value.to(layer.offsets.dtype).isfinite().all():  # float64 may be more than float32 can hold
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
        _problem(missing, "missing in `state`; pass strict=False to leave these layers unchanged"),
        _problem(plain, "of convolutions that are plain in the model; convert these too"),
        _problem(unknown, f"of layers that the model does not have (its own have names like {own})"),
        _problem(sizes, "of another size; `position_groups` or the kernel size differ"),
        _problem(centres, "with a centre that has moved but is fixed in the model; convert with fixed_centre=False"),
        _problem(kinds, "that are not real floating-point numbers with values"),
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
    """From the names of layers to their whole positions in ``state``, without "offsets" of other kinds of modules."""
    if not isinstance(state, Mapping):
        raise TypeError(f"`state` (={state!r}) must map names to tensors; acu_state_dict returns one")
    found = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(f"`state` has the key {key!r}; its keys must be str, as those of acu_state_dict are")
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
    """One line with the number of examples and the first few; empty if there are none."""
    return f"{len(examples)} {what}: {few(examples)}" if examples else ""


def _key(layer: str) -> str:
    return qualified_name(layer, _PARAMETER)
