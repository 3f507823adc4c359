"""The record of an architecture: made from a model, built again, and compared with a model."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..conv import ACUConv2d, acu_layers
from ..surgery import Activation, activate
from ..surgery.rules import find_rule
from .limits import BuildLimit
from .record import Record

__all__ = ["SOURCES", "difference", "rebuild", "record_of", "tied_tensors"]

#: Arguments that say where weights come from; they are not needed, since the file has the weights.
SOURCES = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "weights", "weights_backbone")

#: Attributes that may differ from those of a new model: how it is run, and num_classes after a change of the head.
_FREE = ("training", "grad_checkpointing", "num_classes")

#: Prefixes of attributes that are private to a module, or set by surgery.
_NOTES = ("_", "acu_")


def record_of(model: nn.Module, name: str | None, kwargs: dict[str, Any]) -> Record:
    """What :func:`rebuild` needs; ``name`` and ``kwargs`` are those of :func:`create_model`, as far as they are given.

    Raises:
        TypeError: an argument cannot be stored as JSON.
        ValueError: no name is given, and the model does not state one.
    """
    guessed_name, guessed = _guess_architecture(model)
    name = guessed_name if name is None else name
    if name is None:
        raise ValueError(
            f"`model` (={type(model).__name__}) does not state its architecture; pass the name and arguments for "
            'create_model, such as save_acu(model, path, name="torchvision/resnet18", num_classes=10)'
        )
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    record = {
        "architecture": {"name": name, "kwargs": guessed | _as_json(kwargs)},
        "layers": [
            {
                "name": layer_name,
                "class": type(layer).__name__,
                "position_groups": layer.position_groups,
                "fixed_tap": layer.fixed_tap,
                "start": layer.start,
                "backend": layer.backend,
            }
            for layer_name, layer in acu_layers(model)
        ],
        "aliases": tied_tensors(state),
        "buffer_dtypes": {key: str(b.dtype) for key, b in _floating_buffers(model) if key not in state},
    }
    as_read: Record = json.loads(json.dumps(record))  # JSON has lists for tuples
    return as_read


def rebuild(record: Record, state: Mapping[str, Tensor]) -> nn.Module:
    """The architecture of ``record``, converted; a ValueError says what cannot be built.

    ``record`` has passed :func:`~lightning_acu.saving.record.check_record`. ``state`` holds the tensors of the file,
    which bound what is built.
    """
    from ..models import create_model  # loads torchvision, and timm where it is installed

    name, kwargs = record["architecture"]["name"], record["architecture"]["kwargs"]
    if ":" in name:
        raise ValueError(f"`name` (={name!r}) must be that of an architecture, not where weights come from")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), BuildLimit(state.values()):
            model = create_model(name, **{key: value for key, value in kwargs.items() if key not in SOURCES})
    except Exception as error:  # models raise many kinds for wrong arguments
        raise ValueError(f"{_call(record)} fails: {error}") from error
    modules = dict(model.named_modules())
    layers: dict[nn.Module, Activation] = {}
    for layer in record["layers"]:
        conv = modules.get(layer["name"])
        if conv is None or find_rule(conv) is None:
            found = "does not exist" if conv is None else f"is a {type(conv).__name__}, for which there is no rule"
            raise ValueError(f"{layer['name']} should be a convolution to convert, but {found}")
        layers[conv] = Activation(layer["position_groups"], layer["fixed_tap"] is not None, layer["backend"])
    activate(model, layers)
    for layer in record["layers"]:
        conv = modules[layer["name"]]
        assert isinstance(conv, ACUConv2d)
        if type(conv).__name__ != layer["class"]:
            raise ValueError(f"{layer['name']} becomes a {type(conv).__name__}, not a {layer['class']}")
        conv.fixed_tap = layer["fixed_tap"]
        conv.start = None if layer["start"] is None else tuple((float(y), float(x)) for y, x in layer["start"])
    for key, buffer in _floating_buffers(model):
        if key in record["buffer_dtypes"]:
            buffer.data = buffer.data.to(getattr(torch, record["buffer_dtypes"][key].removeprefix("torch.")))
    return model


def difference(model: nn.Module, record: Record) -> str | None:
    """The first difference between ``model`` and what ``record`` builds, except values in the state_dict; or None."""
    try:
        found = _difference(model, rebuild(record, model.state_dict()))
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
    """``kwargs`` without those that say where weights come from; a TypeError for what cannot be stored as JSON."""
    kwargs = {key: value for key, value in kwargs.items() if key not in SOURCES}
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
    return f"create_model({', '.join([repr(architecture['name']), *arguments])})"
