"""A converted model from whatever file it was kept in: one of save_acu, or a Lightning checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from ..classifier import ImageClassifier
from ..surgery import convert_like
from .files import load_acu

__all__ = ["load_any", "load_converted"]


def load_converted(cls: type[pl.LightningModule], path: str | os.PathLike[str], **kwargs: Any) -> pl.LightningModule:
    """``cls.load_from_checkpoint(path, **kwargs)``, also where a callback had converted the module.

    ConvertToACU changes a module that its own ``__init__`` builds plain, so that Lightning's method meets positions it
    does not know. Here the module is loaded without them at first; then those convolutions for which the checkpoint has
    positions become active, and it is loaded once more, in full (``on_load_checkpoint`` is called both times).

    Args:
        cls: the LightningModule's class.
        path: the checkpoint. Like Lightning, this may execute code in it: only load what you trust.
        **kwargs: of ``load_from_checkpoint``, such as the arguments of ``cls`` that the checkpoint does not hold.

    Raises:
        ValueError: positions for something that ``cls`` does not have.
        RuntimeError: weights that do not fit, as in torch.
    """
    kwargs.setdefault("map_location", "cpu")
    kwargs.setdefault("weights_only", False)  # hyperparameters may hold any class
    strict = kwargs.pop("strict", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found keys that are")  # looked at again below
        module: pl.LightningModule = cls.load_from_checkpoint(Path(path), strict=False, **kwargs)
    checkpoint = torch.load(path, map_location=kwargs["map_location"], weights_only=kwargs["weights_only"])
    module.on_load_checkpoint(checkpoint)  # it may change the state_dict
    convert_like(module, checkpoint["state_dict"])
    module.load_state_dict(checkpoint["state_dict"], strict=bool(strict))
    return module


def load_any(path: str | os.PathLike[str], class_path: str | None = None) -> nn.Module:
    """The model, in eval mode, out of a file of :func:`lightning_acu.save_acu` or a Lightning checkpoint.

    Args:
        path: the file.
        class_path: "package.Class" of the LightningModule; None: what the checkpoint says, else ImageClassifier.

    Returns:
        For ImageClassifier its inner model; otherwise the LightningModule, whose ``forward`` is what is meant.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a class that cannot be imported, or does not fit the checkpoint, or a file that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix != ".ckpt":
        return load_acu(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling has many
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path} is no Lightning checkpoint; files of save_acu end in .pt or .safetensors")
    class_path = class_path or checkpoint.get("hyper_parameters", {}).get("_class_path")
    del checkpoint
    cls = ImageClassifier if class_path is None else _import(class_path)
    try:
        module = load_converted(cls, path).eval()
    except (TypeError, RuntimeError) as error:  # arguments that are missing, weights of another network
        hint = "; name the class of your LightningModule (`class_path`, --class_path)" if class_path is None else ""
        raise ValueError(f"{path} does not fit {cls.__name__}: {error}{hint}") from error
    return module.model if isinstance(module, ImageClassifier) else module


def _import(class_path: str) -> type[pl.LightningModule]:
    package, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`class_path` (={class_path!r}) cannot be imported: {error}; give package.Class") from error
    if not (isinstance(cls, type) and issubclass(cls, pl.LightningModule)):
        raise ValueError(f"`class_path` (={class_path!r}) is no LightningModule")
    return cls
