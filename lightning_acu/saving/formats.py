"""The two formats of a file: .safetensors, and .pt read with ``weights_only=True``; each with a record and tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import require_package

__all__ = ["KEY", "find_format"]

#: The record's key: in the header of a .safetensors file, or in the dict of a .pt file.
KEY = "lightning_acu"


def _write_safetensors(path: Path, record: dict[str, Any], state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt", KEY: json.dumps(record)})


def _read_safetensors(path: Path) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        record = json.loads((file.metadata() or {}).get(KEY, "null"))
        return record, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _write_torch(path: Path, record: dict[str, Any], state: dict[str, Tensor]) -> None:
    torch.save({KEY: record, "state_dict": state}, path)


def _read_torch(path: Path) -> tuple[Any, dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or KEY not in content:
        return None, {}
    return content[KEY], content["state_dict"]


_FORMATS = {
    ".safetensors": (_write_safetensors, _read_safetensors),
    ".pt": (_write_torch, _read_torch),
    ".pth": (_write_torch, _read_torch),
}


def find_format(path: Path) -> tuple[Callable[..., None], Callable[[Path], tuple[Any, dict[str, Tensor]]]]:
    """The functions that write and read the format of ``path``, by its suffix.

    Raises:
        ModuleNotFoundError: a .safetensors file, and safetensors is not installed.
        ValueError: an unknown suffix.
    """
    if path.suffix not in _FORMATS:
        raise ValueError(f"`path` (={str(path)!r}) must end in {', '.join(_FORMATS)}, which chooses the format")
    if path.suffix == ".safetensors":
        require_package("safetensors", f"`path` (={str(path)!r})")
    return _FORMATS[path.suffix]
