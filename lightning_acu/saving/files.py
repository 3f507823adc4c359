"""Save a converted model in one file: architecture, conversion, weights and positions; and load it again.

A file has a record (JSON) and a state_dict. The record has the name and arguments of the architecture, for
:func:`create_model` or a function of the user's (its builder), and how each active layer was converted, so that loading
needs no arguments of the training. Files from others are safe to read in both formats: nothing in them is executed, and
a builder is imported only where the caller allows it.
"""

from __future__ import annotations

import importlib.metadata
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_acu import __version__

from ..checks import few, require_module
from ..conv import acu_layers
from ..files import write_whole
from ..surgery import was_folded
from .architecture import difference, rebuild, record_of
from .builders import Builder
from .formats import KEY, find_format
from .given_model import check_layers, load_into, require_unwrapped
from .record import Record, check_record, check_state

__all__ = ["load_acu", "one_way", "save_acu", "write_file"]

#: The newest format that is read. What version 0.1 can read is still written as format 1; a builder needs 2.
_FORMAT_VERSION = 2


def save_acu(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    builder: Builder | str | None = None,
    kwargs: dict[str, Any] | None = None,
    **more_kwargs: Any,
) -> None:
    """Save a converted model so that :func:`load_acu` brings it back.

    The architecture is built again and compared with ``model`` first, so that every file that is written can be loaded.
    Not saved: ``requires_grad``, train or eval mode, memory formats, hooks. The file is written whole or not at all,
    and missing directories are created. With several processes, call it on one.

    Args:
        model: a model with active convolutions.
        path: ends in ".safetensors", ".pt" or ".pth", which chooses the format.
        name: the architecture, as :func:`lightning_acu.create_model` takes it: "resnet18", "torchvision/resnet18".
            None: as the model states it, which those of timm do.
        builder: for any other model, the function or class that builds it, or its name "package.module:function". It
            must be found by that name, and is called with ``kwargs``. None: for a model of Hugging Face's
            transformers, its class and its configuration.
        kwargs, more_kwargs: the arguments that the model was built with. With a name, those that say where weights
            come from (``pretrained``) are ignored, and ``num_classes`` and ``in_chans`` are read from the model if they
            are not given. A builder gets exactly these, each time that the file is loaded: leave out what fetches
            weights (``encoder_weights=None``).

    Raises:
        ModuleNotFoundError: a .safetensors file, and safetensors is not installed.
        TypeError: ``model`` is a LightningModule, compiled, wrapped (DDP) or sharded (FSDP); ``kwargs`` cannot be
            stored as JSON; both ``name`` and ``builder`` are given, or ``builder`` is not a function.
        ValueError: an unknown suffix; a model without active convolutions; an architecture that is unknown, or differs
            from ``model`` (the message names the first difference); a builder that cannot be imported by a name, such
            as a lambda; positions that are not finite.
        OSError: the file cannot be written; an earlier file of that name is as it was.
    """
    write_file(model, path, name, builder, merged(kwargs, more_kwargs))


def merged(kwargs: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the builder, given in both ways; a TypeError if ``kwargs`` is not a dict."""
    if kwargs is not None and not isinstance(kwargs, dict):
        raise TypeError(f"`kwargs` (={kwargs!r}) must be a dict of arguments by name, not a {type(kwargs).__name__}")
    return (kwargs or {}) | more


def write_file(
    model: nn.Module, path: str | os.PathLike[str], name: str | None, builder: Builder | str | None,
    kwargs: dict[str, Any],
) -> Record:  # fmt: skip
    """:func:`save_acu`; returns the record that it wrote."""
    path = Path(path)
    write = find_format(path)[0]
    record, tensors = _content(model, name, builder, kwargs)

    def write_for_all(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary, record, tensors)
        temporary.chmod(mode)  # safetensors lets only the owner read

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write_for_all)
    return record


def _content(
    model: nn.Module, name: str | None, builder: Builder | str | None, kwargs: dict[str, Any]
) -> tuple[Record, dict[str, Tensor]]:
    """The record and the tensors of a file for ``model``."""
    _check_savable(model)
    if name is not None and builder is not None:
        raise TypeError(f"`name` (={name!r}) and `builder` (={builder!r}) both say how to build the model; pass one")
    record, builder = record_of(model, name, builder, kwargs)
    record |= {"format_version": 2 if "builder" in record["architecture"] else 1, "versions": _versions()}
    if (why := difference(model, record, builder)) is not None:
        raise ValueError(
            f"{why}. Pass the name or the builder and the keyword arguments it was built with, such as save_acu(model, "
            'path, name="resnet18", output_stride=8)'
        )
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return record, {key: _copy(tensor) for key, tensor in state.items() if key not in record["aliases"]}


def load_acu(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    builder: Builder | None = None,
    trust_builder: bool = False,
    map_location: str | torch.device | None = None,
) -> nn.Module:
    """The model that :func:`save_acu` saved.

    A file with the name of an architecture needs nothing else. One with a builder names code, which is imported only
    if you say so: pass ``model``, ``builder`` or ``trust_builder``, one of them.

    Args:
        path: the file; its suffix says which format it has.
        model: your own model, plain or converted, to load into, in place: exactly the recorded layers are converted,
            weights and positions are loaded. Parameters keep their identity, devices and precision, and ``training``
            stays as it is. If something does not fit, the model is not changed.
        builder: the function or class to build the model with; it is called with the arguments in the file, which are
            plain values.
        trust_builder: import the builder that the file names and call it. Only for files whose source you trust as you
            trust a program.
        map_location: the device for the model. None: the CPU; a given ``model`` stays where it is.

    Returns:
        ``model``, or the model that was built, in eval mode.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: a .safetensors file, and safetensors is not installed.
        TypeError: several of ``model``, ``builder`` and ``trust_builder`` are given; or ``model`` is not a module, or
            compiled, wrapped or sharded; or ``builder`` is a name.
        ValueError: an unknown suffix; the file is damaged, not from :func:`save_acu` or of a newer format (the message
            names the field); it names a builder that you have not allowed; or it does not fit ``model`` or what is
            built, or asks for many more tensors than the file has.
    """
    one_way(model, builder, trust_builder)
    path = Path(path)
    read = find_format(path)[1]
    if not path.is_file():
        raise FileNotFoundError(f"`path` (={str(path)!r}) does not exist or is not a file")
    try:
        record, state = read(path)
    except Exception as error:  # the readers raise many kinds for a damaged file
        why = str(error).partition("\n")[0]
        raise ValueError(f"`path` (={str(path)!r}) is damaged or was not written by save_acu: {why}") from error
    if not isinstance(record, dict) or type(version := record.get("format_version")) is not int or version < 1:
        raise ValueError(
            f"`path` (={str(path)!r}) was not written by save_acu; it has no record of an architecture with a "
            "`format_version` of 1 or more"
        )
    if version > _FORMAT_VERSION:
        raise ValueError(
            f"`path` (={str(path)!r}) has format {version}, and this lightning_acu reads formats up to "
            f"{_FORMAT_VERSION}; update it. The file was written with {record.get('versions')}"
        )
    try:
        check_record(record)
        check_state(state, record)
    except ValueError as error:
        raise ValueError(f"`path` (={str(path)!r}) is damaged or was not written by save_acu: {error}") from error
    named = record["architecture"].get("builder")
    if named is not None and model is None and builder is None and not trust_builder:
        raise ValueError(
            f"`path` (={str(path)!r}) is of a model that {named!r} builds, which is code that would have to be "
            "imported. Nothing was. Pass that function (`builder`) or a model that you have built (`model`); or, if "
            "you trust the file as you trust a program, trust_builder=True (on the command line --trust)"
        )
    with torch.inference_mode(False):  # the parameters have to be able to learn afterwards
        if model is None:
            return _load(path, record, state, builder).to(map_location or "cpu").eval()
        try:
            load_into(model, record, state)
        except ValueError as error:
            raise ValueError(
                f"`path` (={str(path)!r}) does not fit `model` (={type(model).__name__}), which was not changed: "
                f"{error}"
            ) from error
        return model if map_location is None else model.to(map_location)


def one_way(model: nn.Module | None, builder: Builder | None, trust_builder: bool) -> None:
    """Check the arguments of :func:`load_acu` that say what to load into; raises its TypeErrors."""
    if (model is not None) + (builder is not None) + bool(trust_builder) > 1:
        raise TypeError("`model`, `builder` and `trust_builder` exclude each other; pass one of them")
    if builder is not None and not callable(builder):
        raise TypeError(f"`builder` (={builder!r}) must be the function itself; trust_builder=True imports it by name")
    if model is not None:
        require_module(model)
        require_unwrapped(model, "load into")


def _load(path: Path, record: Record, state: dict[str, Tensor], builder: Builder | None) -> nn.Module:
    """The model of a file that has been read and checked."""
    try:
        model = rebuild(record, state, builder)
        state |= {key: state[first] for key, first in record["aliases"].items()}
        check_layers(model, record, state)
        for key, tensor in model.state_dict(keep_vars=True).items():  # in place: tied parameters stay tied
            if key in state and tensor.is_floating_point() == state[key].is_floating_point():
                tensor.data = tensor.data.to(state[key].dtype)
        model.load_state_dict(state)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`path` (={str(path)!r}) does not fit the installed packages: {error}. It was written with "
            f"{record.get('versions')}; here are {_versions()}"
        ) from error
    return model


def _check_savable(model: nn.Module) -> None:
    require_module(model)
    require_unwrapped(model, "save")
    if not any(acu_layers(model)):
        folded = any(map(was_folded, model.modules()))
        why = "was folded into plain convolutions" if folded else "has no active convolution"
        raise ValueError(
            f"`model` (={type(model).__name__}) {why}; save it as any other: torch.export.save, or torch.save of "
            + ("it" if folded else "its state_dict (or call convert_to_acu first)")
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError(
            f"`model` (={type(model).__name__}) has tensors on the meta device, which have no values to save"
        )
    if broken := [name or "the model" for name, layer in acu_layers(model) if not layer.offsets.isfinite().all()]:
        raise ValueError(
            f"`model` (={type(model).__name__}) has positions that are not finite ({few(broken)}), which no file can "
            "bring back; save the model as it was before a training step went wrong"
        )


def _copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU with its own storage, as safetensors needs it."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _versions() -> dict[str, str]:
    installed = [package for package in ("timm", "torchvision") if find_spec(package)]
    return {KEY: __version__} | {package: importlib.metadata.version(package) for package in installed}
