"""The record of an architecture: made from a model, built again, and compared with a model."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.recorded import layer_records
from .builders import Builder, builder_name, call_builder, find_builder, own_builder
from .limits import BuildLimit
from .record import Record
from .restore import restore_layers

__all__ = ["SOURCES", "difference", "rebuild", "record_of", "tied_tensors"]

#: Arguments that say where weights come from; they are not needed, since the file has the weights.
SOURCES = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights", "weights_backbone")

#: Attributes that may differ from those of a new model: how it is run, and num_classes after a change of the head.
_FREE = ("training", "grad_checkpointing", "gradient_checkpointing", "num_classes")

#: Prefixes of attributes that are private to a module, or set by surgery.
_NOTES = ("_", "acu_")


def record_of(
    model: nn.Module, name: str | None, builder: Builder | str | None, kwargs: dict[str, Any]
) -> tuple[Record, Builder | None]:
    """What :func:`rebuild` needs: a record, and the function that builds the architecture if a name does not.

    ``name`` and ``kwargs`` are those of :func:`create_model`, as far as they are given, or ``kwargs`` are those of
    ``builder``.

    Raises:
        TypeError: an argument cannot be stored as JSON, or ``builder`` is something other than a function.
        ValueError: neither a name nor a builder is given, and the model does not state one; or the builder cannot be
            imported.
    """
    architecture: dict[str, Any]
    if name is None and builder is None and (own := own_builder(model)) is not None:
        builder, kwargs = own[0], own[1] | kwargs
    if builder is not None:
        architecture = {"builder": builder_name(builder), "kwargs": _as_json(kwargs)}
        builder = find_builder(builder) if isinstance(builder, str) else builder
    else:
        guessed_name, guessed = _guess_architecture(model)
        name = guessed_name if name is None else name
        if name is None:
            raise ValueError(
                f"`model` (={type(model).__name__}) does not state its architecture; pass the name and arguments for "
                'create_model, such as save_acu(model, path, name="torchvision/resnet18", num_classes=10), or for '
                "any other model the function or class that builds it, save_acu(model, path, "
                'builder="package.module:function", kwargs={...})'
            )
        kwargs = {key: value for key, value in kwargs.items() if key not in SOURCES}
        architecture = {"name": name, "kwargs": guessed | _as_json(kwargs)}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    record = {
        "architecture": architecture,
        "layers": layer_records(model),
        "aliases": tied_tensors(state),
        "buffer_dtypes": {key: str(b.dtype) for key, b in _floating_buffers(model) if key not in state},
    }
    as_read: Record = json.loads(json.dumps(record))  # JSON has lists for tuples
    return as_read, builder


def rebuild(record: Record, state: Mapping[str, Tensor], builder: Builder | None = None) -> nn.Module:
    """The architecture of ``record``, converted; a ValueError says what cannot be built.

    ``record`` has passed :func:`~lightning_acu.saving.record.check_record`. ``state`` holds the tensors of the file,
    which bound what is built. ``builder`` takes the place of the one that ``record`` names, or of its name.
    """
    architecture = record["architecture"]
    if builder is None and "builder" in architecture:
        builder = find_builder(architecture["builder"])
    if builder is None:
        builder = functools.partial(_create_model, architecture["name"])
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), BuildLimit(state.values()):
            model = call_builder(builder, architecture["kwargs"])
    except Exception as error:  # models raise many kinds for wrong arguments
        raise ValueError(f"{_call(record)} fails: {error}") from error
    restore_layers(model, record["layers"])
    for key, buffer in _floating_buffers(model):
        if key in record["buffer_dtypes"]:
            buffer.data = buffer.data.to(getattr(torch, record["buffer_dtypes"][key].removeprefix("torch.")))
    return model


def _create_model(name: str, **kwargs: Any) -> nn.Module:
    """A model of timm or torchvision, without weights from elsewhere."""
    from ..models import create_model  # loads torchvision, and timm where it is installed

    if ":" in name:
        raise ValueError(f"`name` (={name!r}) must be that of an architecture, not where weights come from")
    return create_model(name, **{key: value for key, value in kwargs.items() if key not in SOURCES})


def difference(model: nn.Module, record: Record, builder: Builder | None) -> str | None:
    """The first difference between ``model`` and what ``record`` builds, except values in the state_dict; or None."""
    layers = [{key: value for key, value in layer.items() if key != "convolution"} for layer in record["layers"]]
    try:  # without what is compared below, together with all other modules
        found = _difference(model, rebuild(record | {"layers": layers}, model.state_dict(), builder))
    except ValueError as error:
        found = str(error)
    return found and f"`model` (={type(model).__name__}) is not what {_call(record)} builds: {found}"


def _difference(model: nn.Module, built: nn.Module) -> str | None:
    """The first difference between ``model`` and ``built``, except values in the state_dict; or None."""
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, built))
    for name in ours | theirs:
        where = name or "the model itself"
        if name not in ours or name not in theirs:
            return f"there is {'no' if name in ours else 'a'} module {where}"
        own, other = _description(ours[name]), _description(theirs[name])
        for key in own:
            if key in other and own[key] != other[key]:
                return f"the {key} of {where} is {other[key]} there and {own[key]} in `model`"
    state, other_state = (
        {**m.state_dict(keep_vars=True), **dict(m.named_buffers(remove_duplicate=False))} for m in (model, built)
    )
    for key in state | other_state:
        shapes = [tuple(s[key].shape) if key in s else "absent" for s in (state, other_state)]
        if shapes[0] != shapes[1]:
            return f"the shape of {key} is {shapes[1]} there and {shapes[0]} in `model`"
    if tied_tensors(state) != tied_tensors(other_state):
        return "other tensors are shared there"
    return None


def _description(module: nn.Module) -> dict[str, str]:
    """The class and extra_repr of a module, and those of its attributes that are numbers, strings or functions."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    attributes = {
        key: _plain(value) for key, value in vars(module).items() if key not in _FREE and not key.startswith(_NOTES)
    }
    found = {key: text for key, text in attributes.items() if text is not None}
    return {"class": kind} | found | {"extra_repr": f"({module.extra_repr()})"}


def _plain(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else None


def _guess_architecture(model: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """The name that a timm model states, and the arguments that can be read from any model."""
    known: dict[str, Any] = {}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        known["num_classes"] = classes
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    known["in_chans"] = getattr(model, "in_chans", getattr(first, "in_channels", None))
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name, tag = (config.get(key) if isinstance(config, dict) else None for key in ("architecture", "tag"))
    if name is None or not find_spec("timm"):
        return name, known
    import timm

    # With the tag, timm's configuration (mean and size of the images) stays with the model.
    return f"{name}.{tag}" if timm.is_model_pretrained(f"{name}.{tag}") else name, known


def _as_json(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs``; a TypeError for what cannot be stored as JSON."""
    for key, value in kwargs.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`{key}` (={value!r}) cannot be saved as JSON ({error}); timm takes the names of layers, such as "
                "act_layer='silu'"
            ) from error
    return kwargs


def tied_tensors(state: dict[str, Tensor]) -> dict[str, str]:
    """For tensors that have several names: from the others to the first one."""
    first: dict[int, str] = {}
    names = {key: first.setdefault(id(tensor), key) for key, tensor in state.items()}
    return {key: name for key, name in names.items() if key != name}


def _floating_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((key, buffer) for key, buffer in model.named_buffers() if buffer.is_floating_point())


def _call(record: dict[str, Any]) -> str:
    architecture = record["architecture"]
    arguments = [f"{key}={value!r}" for key, value in architecture["kwargs"].items()]
    if "builder" in architecture:
        return f"{architecture['builder']}({', '.join(arguments)})"
    return f"create_model({', '.join([repr(architecture['name']), *arguments])})"
