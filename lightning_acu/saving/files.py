"""Save a converted model in one file: architecture, conversion, weights and positions; and load it again.

A file has a record (JSON) and a state_dict. The record has the name and arguments of the architecture for
:func:`create_model`, and how each active layer was converted, so that loading needs neither the code nor the arguments
of the training. Files from others are safe to read in both formats: nothing in them is executed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_acu import __version__

from ..checks import WRAPPERS, few, find_wrapper, qualified_name, require_module, require_package
from ..conv import ACUConv2d, acu_layers
from ..files import write_whole
from ..sharded import is_sharded
from ..surgery import was_folded
from .architecture import difference, rebuild, record_of
from .record import Record, check_record, check_state

__all__ = ["load_acu", "save_acu"]

#: Increased when files change so that older versions of the package cannot read them.
_FORMAT_VERSION = 1

#: The record's key: in the header of a .safetensors file, or in the dict of a .pt file.
_KEY = "lightning_acu"


def save_acu(model: nn.Module, path: str | os.PathLike[str], *, name: str | None = None, **kwargs: Any) -> None:
    """Save a converted model so that :func:`load_acu` alone brings it back.

    The architecture is built again and compared with ``model`` first, so that every file that is written can be loaded.
    Not saved: ``requires_grad``, train or eval mode, memory formats, hooks. The file is written whole or not at all,
    and missing directories are created. With several processes, call it on one.

    Args:
        model: a model of timm or torchvision with active convolutions.
        path: ends in ".safetensors", ".pt" or ".pth", which chooses the format.
        name: the architecture, as :func:`lightning_acu.create_model` takes it: "resnet18", "torchvision/resnet18".
            None: as the model states it, which those of timm do.
        **kwargs: the arguments that the model was built with; those that say where weights come from (``pretrained``)
            are ignored. ``num_classes`` and ``in_chans`` are read from the model if they are not given.

    Raises:
        ModuleNotFoundError: a .safetensors file, and safetensors is not installed.
        TypeError: ``model`` is a LightningModule, compiled, wrapped (DDP) or sharded (FSDP), or ``kwargs`` cannot be
            stored as JSON.
        ValueError: an unknown suffix; a model without active convolutions; an architecture that is unknown, or differs
            from ``model`` (the message names the first difference); positions that are not finite.
        OSError: the file cannot be written; an earlier file of that name is as it was.
    """
    path = Path(path)
    write = _format(path)[0]
    _check_savable(model)
    record = record_of(model, name, kwargs) | {"format_version": _FORMAT_VERSION, "versions": _versions()}
    if (why := difference(model, record)) is not None:
        raise ValueError(
            f"{why}. Pass the name and the keyword arguments it was built with, such as save_acu(model, path, "
            'name="resnet18", output_stride=8)'
        )
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tensors = {key: _copy(tensor) for key, tensor in state.items() if key not in record["aliases"]}

    def write_for_all(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary, record, tensors)
        temporary.chmod(mode)  # safetensors lets only the owner read

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write_for_all)


def load_acu(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> nn.Module:
    """The model that :func:`save_acu` saved, in eval mode.

    Args:
        path: the file; its suffix says which format it has.
        map_location: the device for the model.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: a .safetensors file, and safetensors is not installed.
        ValueError: an unknown suffix; the file is damaged, not from :func:`save_acu` or of a newer format (the message
            names the field); or its architecture is not in the installed timm or torchvision, differs there, or asks
            for many more tensors than the file has.
    """
    path = Path(path)
    read = _format(path)[1]
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
    with torch.inference_mode(False):  # the parameters have to be able to learn afterwards
        return _load(path, record, state).to(map_location).eval()


def _load(path: Path, record: Record, state: dict[str, Tensor]) -> nn.Module:
    """The model of a file that has been read and checked."""
    try:
        model = rebuild(record, state)
        state |= {key: state[first] for key, first in record["aliases"].items()}
        for name, layer in acu_layers(model):
            _check_layer(name, layer, state)
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


def _check_layer(name: str, layer: ACUConv2d, state: dict[str, Tensor]) -> None:
    """Check what the record says of ``layer`` against its number of taps; a ValueError says what differs."""
    taps = layer.geometry.taps
    if (key := qualified_name(name, "offsets")) not in state:
        raise ValueError(f"the file has no {key!r}")
    if layer.fixed_tap is not None and layer.fixed_tap >= taps:
        raise ValueError(f"`fixed_tap` (={layer.fixed_tap}) of {name} must be less than its number of taps (={taps})")
    if layer.start is not None and len(layer.start) != taps:
        raise ValueError(f"`start` of {name} has {len(layer.start)} positions for {taps} taps")


def _check_savable(model: nn.Module) -> None:
    require_module(model)
    if (wrapper := find_wrapper(model)) is not None:
        raise TypeError(f"`model` (={type(model).__name__}) is a {wrapper}; save {WRAPPERS[wrapper]}")
    if any(map(is_sharded, model.parameters())):
        raise TypeError(
            f"`model` (={type(model).__name__}) is sharded over processes; load its full state_dict into an "
            "unsharded copy and save that"
        )
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
    return {_KEY: __version__} | {package: importlib.metadata.version(package) for package in installed}


def _write_safetensors(path: Path, record: dict[str, Any], state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt", _KEY: json.dumps(record)})


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = json.loads((file.metadata() or {}).get(_KEY, "null"))
        return record, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _write_torch(path: Path, record: dict[str, Any], state: dict[str, Tensor]) -> None:
    torch.save({_KEY: record, "state_dict": state}, path)


def _read_torch(path: Path) -> tuple[Any, dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or _KEY not in content:
        return None, {}
    return content[_KEY], content["state_dict"]


_FORMATS = {
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".pt": (_write_torch, _read_torch),
    ".pth": (_write_torch, _read_torch),
}


def _format(path: Path) -> tuple[Callable[..., None], Callable[[Path], tuple[Any, dict[str, Tensor]]]]:
    if path.suffix not in _FORMATS:
        raise ValueError(f"`path` (={str(path)!r}) must end in {', '.join(_FORMATS)}, which chooses the format")
    if path.suffix == ".safetensors":
        require_package("safetensors", f"`path` (={str(path)!r})")
    return _FORMATS[path.suffix]
