"""From a configuration of configs/paper to that of one run: length, data, seed and where its files go."""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_acu.cli.config_files import ConfigFile
from lightning_acu.cli.configs import configs_directory

from .tables import Row

__all__ = ["callbacks_of", "classes_of", "effective_config", "length_of", "load_config", "settings_of"]

#: Arguments that count steps, by the last part of a callback's class path.
_STEPS = {
    "PositionLRSchedule": ("warmup_steps",),
    "RoundThenFinetune": ("at_step",),
    "OffsetLogger": ("every_n_steps",),
    "ModelCheckpoint": ("every_n_train_steps",),
}


def load_config(path: Path) -> dict[str, Any]:
    """What the configuration file ``path`` and its bases say, merged as ``lightning-acu fit`` merges them."""
    config: dict[str, Any] = _parser().parse_args(["--config", str(path)], defaults=False).as_dict()
    del config["config"]  # the names of the files
    return config


@cache
def _parser() -> LightningArgumentParser:
    """What the files of configs/ may say."""
    parser = LightningArgumentParser()
    parser.add_argument("--config", action=ConfigFile)
    parser.add_argument("--seed_everything", type=int)
    parser.add_argument("--test_after_fit", type=bool)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser


def effective_config(row: Row, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The configuration of ``row`` as it is run; paths in it are relative to the run's folder.

    ``options``: ``steps`` (None: the paper's), ``batch_size``, ``lr``, ``multiplier``, ``data``, ``preprocessing``,
    ``compile_mode`` and ``device`` of the command line, each None where the configuration decides.
    """
    config = load_config(_file(row))
    config["seed_everything"] = seed
    trainer, optimizer = config["trainer"], config["model"]["init_args"]["optimizer"]["init_args"]
    published = _learning_steps(config)
    steps = options.steps or published
    _shorten(config, steps / published)
    _set_checkpoints(trainer["callbacks"], steps)
    for callback, arguments in _callbacks(config):
        if callback == "PositionLRSchedule":
            # Another learning rate of the weights leaves that of the positions as it is.
            arguments["multiplier"] *= 1 if options.lr is None else optimizer["lr"] / options.lr
            arguments["multiplier"] = options.multiplier or float(f"{arguments['multiplier']:.3g}")
        if callback == "RoundThenFinetune" and options.lr is not None:
            arguments["finetune_lr"] *= options.lr / optimizer["lr"]
    if options.lr is not None:
        optimizer["lr"] = options.lr
    if options.compile_mode is not None:
        config["model"]["init_args"]["compile_mode"] = options.compile_mode
    if options.device is not None:
        trainer["accelerator"] = options.device
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        # Every record is on disk before the next checkpoint: nothing of it is lost when the run is killed.
        "init_args": {"save_dir": ".", "name": "", "flush_logs_every_n_steps": 1},
    }
    trainer["enable_progress_bar"] = False
    trainer["enable_model_summary"] = False
    _set_data(config, options)
    return config


def length_of(config: dict[str, Any]) -> int:
    """Steps of the whole training, fine-tuning included."""
    steps: int = config["trainer"]["max_steps"]
    return steps


def classes_of(row: Row) -> int:
    """The number of classes of the network of ``row``."""
    classes: int = load_config(_file(row))["model"]["init_args"]["num_classes"]
    return classes


def callbacks_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of each callback, by the name of its class."""
    return dict(_callbacks(config))


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What the command line decides, of a run's configuration: rows that are compared have it in common."""
    optimizer, data = config["model"]["init_args"]["optimizer"]["init_args"], config["data"]["init_args"]
    callbacks = callbacks_of(config)
    return {
        "--steps": _learning_steps(config),
        "--batch-size": data["batch_size"],
        "--lr": optimizer["lr"],
        "--multiplier": callbacks.get("PositionLRSchedule", {}).get("multiplier"),
        "--data": data.get("path", data.get("root")),
        "--preprocessing": data.get("preprocessing"),
        "--compile-mode": config["model"]["init_args"].get("compile_mode"),
    }


def _file(row: Row) -> Path:
    return configs_directory() / "paper" / f"{row.config}.yaml"


def _set_checkpoints(callbacks: list[dict[str, Any]], steps: int) -> None:
    """At least each twentieth of ``steps``, and after the last of them, which is the trained network."""
    saving = next(callback for callback in callbacks if callback["class_path"].endswith(".ModelCheckpoint"))
    arguments = saving["init_args"]
    arguments["dirpath"] = "checkpoints"
    interval = arguments["every_n_train_steps"] = min(max(1, steps // 20), arguments["every_n_train_steps"])
    if steps % interval:  # within the training: what is saved after it does not go on exactly
        callbacks.append({**saving, "init_args": arguments | {"every_n_train_steps": steps}})


def _learning_steps(config: dict[str, Any]) -> int:
    """Steps before a fine-tuning: those that ``--steps`` stands for."""
    rounded = [arguments["at_step"] for name, arguments in _callbacks(config) if name == "RoundThenFinetune"]
    return rounded[0] if rounded else length_of(config)


def _callbacks(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (callback["class_path"].rpartition(".")[2], callback.setdefault("init_args", {}))
        for callback in config["trainer"]["callbacks"]
    ]


def _shorten(config: dict[str, Any], factor: float) -> None:
    """All that counts steps times ``factor``, in place."""

    def scaled(steps: int) -> int:
        return max(1, round(steps * factor))

    if factor == 1:
        return
    trainer = config["trainer"]
    trainer["max_steps"] = scaled(trainer["max_steps"])
    trainer["log_every_n_steps"] = scaled(trainer["log_every_n_steps"])
    schedule = config["model"]["init_args"]["lr_scheduler"]["init_args"]
    schedule["milestones"] = [scaled(step) for step in schedule["milestones"]]
    for callback, arguments in _callbacks(config):
        for name in _STEPS.get(callback, ()):
            arguments[name] = scaled(arguments[name])
        if callback == "PositionLRSchedule":
            # Taps wander: how far they get grows with the root of the number of steps.
            arguments["multiplier"] /= math.sqrt(factor)


def _set_data(config: dict[str, Any], options: argparse.Namespace) -> None:
    data = config["data"]
    arguments = data["init_args"]
    if options.data is not None:
        path = Path(options.data).expanduser().resolve()
        if path.suffix == ".npz":
            kept = {name: arguments[name] for name in ("preprocessing", "on_device", "batch_size") if name in arguments}
            data["class_path"] = "lightning_acu.data.ArrayDataModule"
            arguments = data["init_args"] = {"path": str(path), "val_size": 0, "crop_padding": 4, "flip": True, **kept}
        else:
            arguments["root"] = str(path)
    else:
        arguments["root"] = str(Path(arguments["root"]).resolve())
    if options.preprocessing is not None:
        arguments["preprocessing"] = options.preprocessing
    if options.batch_size is not None:
        arguments["batch_size"] = options.batch_size
