"""Load a converted model from a Lightning checkpoint, or from any file that can hold one."""

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

    The ``__init__`` of such a module builds it plain, so that Lightning's method fails on the positions in the
    checkpoint. Here the module is loaded without them first; then the convolutions for which the checkpoint has
    positions are converted, and the module is loaded again, in full (``on_load_checkpoint`` is called both times).

    Args:
        cls: the LightningModule's class.
        path: the checkpoint. As with Lightning, loading may execute code in it: only load files you trust.
        **kwargs: of ``load_from_checkpoint``, such as arguments of ``cls`` that are not in the checkpoint.

    Raises:
        ValueError: the checkpoint has positions for something that ``cls`` does not have.
        RuntimeError: weights do not fit, as in torch.
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
    """The model, in eval mode, from a file of :func:`lightning_acu.save_acu` or a Lightning checkpoint.

    Args:
        path: the file.
        class_path: "package.Class" of the LightningModule; None: what the checkpoint says, else ImageClassifier.

    Returns:
        For ImageClassifier the model inside it; otherwise the LightningModule.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the class cannot be imported or does not fit the checkpoint, or the file is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    if path.suffix != ".ckpt":
        return load_acu(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling raises many kinds
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, Mapping) or "pytorch-lightning_version" not in checkpoint:
        raise ValueError(f"{path} is not a Lightning checkpoint; files of save_acu end in .pt or .safetensors")
    class_path = class_path or checkpoint.get("hyper_parameters", {}).get("_class_path")
    del checkpoint
    cls = ImageClassifier if class_path is None else _import(class_path)
    try:
        module = load_converted(cls, path).eval()
    except (TypeError, RuntimeError) as error:  # missing arguments, weights of another network
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
        raise ValueError(f"`class_path` (={class_path!r}) is not a LightningModule")
    return cls
