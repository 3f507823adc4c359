"""Folders that ``save_pretrained`` of Hugging Face's transformers wrote of a converted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..surgery.transformers_guards import CONFIG_KEY
from .builders import Builder, find_builder, is_transformers, safe_config
from .given_model import check_layers, load_into
from .limits import BuildLimit
from .record import check_record, check_state
from .restore import restore_layers

__all__ = ["load_transformers", "transformers_record"]


def transformers_record(folder: Path) -> dict[str, Any] | None:
    """The content of config.json in ``folder``, if transformers and SavingGuard wrote it; else None.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for lists nested too deeply
        raise ValueError(f"{path} is damaged: {error}") from error
    ours = isinstance(config, dict) and config.get("model_type") != "lightning_acu" and CONFIG_KEY in config
    return config if ours else None


def load_transformers(
    folder: Path, config: dict[str, Any], model: nn.Module | None, builder: Builder | None, trust_builder: bool
) -> nn.Module:
    """The model of such a folder; arguments and errors as in :func:`lightning_acu.from_pretrained`.

    transformers gets the tensors and the configuration, not the folder: nothing else in it is read.
    """
    try:
        own = config[CONFIG_KEY]
        if not isinstance(own, dict):
            raise ValueError(f"`{CONFIG_KEY}` is a {type(own).__name__}")
        named: Any = own.get("builder")
        record = {
            "architecture": {"builder": named, "kwargs": {}},
            "layers": own.get("layers"),
            "aliases": {},
            "buffer_dtypes": {},
        }
        check_record(record)
    except ValueError as error:
        raise ValueError(f"config.json in {folder} is damaged: {error}") from error
    cls: Any = builder if model is None else type(model)
    if cls is None and trust_builder:
        cls = find_builder(named)
    if not is_transformers(cls):
        raise ValueError(
            f"{folder} was saved by transformers, of the class {named!r}; pass that class (`builder`) or a model "
            "of it (`model`), or trust_builder=True if you trust the folder as you trust a program"
        )
    state = _read(folder)
    try:
        check_state(state, record)
        loaded = _load(cls, config, record, state)
        check_layers(loaded, record, loaded.state_dict())
        if model is None:
            return loaded.eval()
        load_into(model, record, loaded.state_dict())
    except Exception as error:  # transformers raises many kinds
        whom = cls.__name__ if model is None else f"`model` (={cls.__name__}), which was not changed"
        raise ValueError(f"{folder} does not fit {whom}: {error}") from error
    return model


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    paths = sorted([*folder.glob("model.safetensors"), *folder.glob("model-*-of-*.safetensors")])
    if not paths:
        raise FileNotFoundError(f"{folder} has no file model.safetensors")
    try:
        return {key: tensor for path in paths for key, tensor in load_file(path).items()}
    except Exception as error:
        raise ValueError(f"a file model*.safetensors in {folder} is damaged: {error}") from error


def _load(cls: Any, config: dict[str, Any], record: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, *args, **kwargs)
        restore_layers(self, record["layers"])

    # Of the same name, by which transformers knows how to translate the names of tensors in a file.
    names = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    converting: Any = type(cls.__name__, (cls,), names)
    own = safe_config(cls, {key: value for key, value in config.items() if key != CONFIG_KEY})
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), BuildLimit(state.values()):
        model, info = converting.from_pretrained(
            None, config=own, state_dict=state, dtype="auto", output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"there is no {missing[0]} in it")
    if dropped := sorted(key for key in info["unexpected_keys"] if key.rpartition(".")[2] == "offsets"):
        raise ValueError(f"it has no place for the positions {dropped[0]}")
    model.__class__ = cls
    return model  # type: ignore[no-any-return]
