"""Load a converted model from a Lightning checkpoint, or from any file that can hold one."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from ..classifier import ImageClassifier
from ..data.base import RECORD
from ..surgery import convert_like
from .architecture import SOURCES
from .files import load_acu
from .limits import BuildLimit

__all__ = ["classifier_arguments", "load_any", "load_converted", "recorded_images"]

#: Under which names LightningCLI may have stored ImageClassifier.
_OWN_PATHS = ("lightning_acu.ImageClassifier", "lightning_acu.classifier.ImageClassifier")


def load_converted(cls: type[pl.LightningModule], path: str | os.PathLike[str], **kwargs: Any) -> pl.LightningModule:
    """``cls.load_from_checkpoint(path, **kwargs)``, also where a callback had converted the module.

    The ``__init__`` of such a module builds it plain, so that Lightning's method fails on the positions in the
    checkpoint. Here the module is loaded without them first; then the convolutions for which the checkpoint has
    positions are converted, and the module is loaded again, in full (``on_load_checkpoint`` is called both times).

    Args:
        cls: the LightningModule's class.
        path: the checkpoint.
        **kwargs: of ``load_from_checkpoint``, such as arguments of ``cls`` that are not in the checkpoint.
            ``weights_only`` is True by default: a checkpoint of anything but tensors and plain values is refused.
            ``weights_only=False`` runs whatever code the file contains: only for files that you trust.

    Raises:
        ValueError: the checkpoint has positions for something that ``cls`` does not have, or cannot be read, or not
            with ``weights_only=True``.
        RuntimeError: weights do not fit, as in torch.
    """
    kwargs.setdefault("map_location", "cpu")
    kwargs.setdefault("weights_only", True)
    strict = kwargs.pop("strict", True)
    checkpoint = _read(Path(path), kwargs["map_location"], kwargs["weights_only"], "weights_only=False")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found keys that are")  # looked at again below
        module: pl.LightningModule = cls.load_from_checkpoint(Path(path), strict=False, **kwargs)
    module.on_load_checkpoint(checkpoint)  # it may change the state_dict
    convert_like(module, checkpoint["state_dict"])
    module.load_state_dict(checkpoint["state_dict"], strict=bool(strict))
    return module


def load_any(path: str | os.PathLike[str], class_path: str | None = None, *, trust: bool = False) -> nn.Module:
    """The model, in eval mode, from a file of :func:`lightning_acu.save_acu` or a Lightning checkpoint.

    Files from others are safe to read as long as ``trust`` is False: nothing in them is executed, imported or
    downloaded, and an :class:`ImageClassifier` is not built much larger than its weights in the file. A class that
    ``class_path`` names gets the hyperparameters in the file, all plain values.

    Args:
        path: the file.
        class_path: "package.Class" of the LightningModule; None: ImageClassifier, and with ``trust`` the class that
            the checkpoint names.
        trust: let the file execute code and import what it names, as Lightning does. Only for files whose source
            you trust as you trust a program.

    Returns:
        For ImageClassifier the model inside it; otherwise the LightningModule.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the class cannot be imported or does not fit the checkpoint, the file is neither, or it needs
            ``trust``; the message says for what.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    if path.suffix != ".ckpt":
        return load_acu(path, trust_builder=trust)
    checkpoint = _read(path, "cpu", not trust, "--trust (`trust`=True)")
    if not _is_checkpoint(checkpoint):
        raise ValueError(f"{path} is not a Lightning checkpoint; files of save_acu end in .pt or .safetensors")
    hparams, state = checkpoint.get("hyper_parameters", {}), checkpoint["state_dict"]
    del checkpoint
    named = hparams.get("_class_path")
    if class_path is None and named is not None and not trust and named not in _OWN_PATHS:
        raise ValueError(
            f"{path} is of the class {named!r}; name it yourself (`class_path`, --class_path) if you trust that code"
        )
    class_path = class_path or named
    cls = ImageClassifier if class_path is None else _import(class_path)
    try:
        if trust:
            module = load_converted(cls, path, weights_only=False)
        elif cls is ImageClassifier:
            module = _load_classifier(path, hparams, state)
        else:
            module = load_converted(cls, path, _instantiator=None)
    except (TypeError, RuntimeError, AttributeError) as error:  # missing arguments, weights of another network
        hint = "; name the class of your LightningModule (`class_path`, --class_path)" if class_path is None else ""
        if "_instantiator" in hparams and not trust:
            hint += "; its arguments may be objects that only --trust (`trust`=True) makes again"
        raise ValueError(f"{path} does not fit {cls.__name__}: {error}{hint}") from error
    module.eval()
    return module.model if isinstance(module, ImageClassifier) else module


def classifier_arguments(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The arguments of the :class:`ImageClassifier` that wrote the checkpoint, or None if another module did.

    Raises:
        ValueError: the file cannot be read without running code in it.
    """
    checkpoint = _read(Path(path), "cpu", True, "--config with the configuration of the training")
    hparams = checkpoint.get("hyper_parameters", {}) if _is_checkpoint(checkpoint) else {}
    if "model" not in hparams or hparams.get("_class_path", _OWN_PATHS[0]) not in _OWN_PATHS:
        return None
    known = inspect.signature(ImageClassifier).parameters.keys() - {"optimizer", "lr_scheduler"}
    return {name: value for name, value in hparams.items() if name in known}


def recorded_images(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the data module of the training recorded about its images (:meth:`ImageDataModule.state_dict`).

    None for other files, and for checkpoints that cannot be read without running code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # unpickling raises many kinds; who wants the model will say what is wrong with the file
        return None
    states = checkpoint.values() if isinstance(checkpoint, Mapping) else ()
    return next((state[RECORD] for state in states if isinstance(state, Mapping) and RECORD in state), None)


def _read(path: Path, map_location: Any, weights_only: bool, how_to_trust: str) -> dict[str, Any]:
    """The content of a checkpoint; a ValueError says why it cannot be read."""
    try:
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not weights_only or "eights only load failed" not in str(error):
            raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = f" ({found[1]})" if found else ""
        raise ValueError(
            f"{path} has something other than tensors and plain values{kind}, and reading that can run any code. If "
            f"you trust where the file is from as you trust a program, use {how_to_trust}"
        ) from error
    except Exception as error:  # unpickling raises many kinds
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    return content


def _is_checkpoint(content: Any) -> bool:
    if not isinstance(content, Mapping) or "pytorch-lightning_version" not in content:
        return False
    state, hparams = content.get("state_dict"), content.get("hyper_parameters", {})
    tensors = isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values())
    return tensors and isinstance(hparams, Mapping)


def _load_classifier(path: Path, hparams: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> ImageClassifier:
    """An ImageClassifier from those hyperparameters that import, download and read nothing, and its weights."""
    name, model_kwargs = hparams.get("model"), hparams.get("model_kwargs") or {}
    if isinstance(name, str) and ":" in name:
        raise ValueError(
            f"{path} has a model (={name!r}) that is built from what is downloaded; use --trust (`trust`=True) if you "
            "trust the file and that source"
        )
    if not isinstance(model_kwargs, Mapping):
        raise ValueError(f"{path} has `model_kwargs` (={model_kwargs!r}) that are not a mapping")
    known = inspect.signature(ImageClassifier).parameters.keys() - {"optimizer", "lr_scheduler"}
    arguments = {key: value for key, value in hparams.items() if key in known}
    arguments["model_kwargs"] = {key: value for key, value in model_kwargs.items() if key not in SOURCES}
    with torch.device("cpu"), BuildLimit(state.values()):
        module = ImageClassifier(**arguments | {"pretrained": False})
    convert_like(module, state)
    module.load_state_dict(state)
    return module


def _import(class_path: str) -> type[pl.LightningModule]:
    package, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`class_path` (={class_path!r}) cannot be imported: {error}; give package.Class") from error
    if not (isinstance(cls, type) and issubclass(cls, pl.LightningModule)):
        raise ValueError(f"`class_path` (={class_path!r}) is not a LightningModule")
    return cls
