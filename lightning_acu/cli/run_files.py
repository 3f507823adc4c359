"""The files of a run: the configuration beside a checkpoint, or what the checkpoint itself says of its model."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..choices import did_you_mean
from .errors import UsageError

__all__ = ["saved_configuration", "with_saved_configuration"]

_DEFINING = ("--config", "-c", "--model")


def saved_configuration(checkpoint: Path) -> Path | None:
    """``config.yaml`` in the folder of ``checkpoint``, or above it for those in ``checkpoints/``."""
    above = [checkpoint.parent.parent] if checkpoint.parent.name == "checkpoints" else []
    found = (folder / "config.yaml" for folder in (checkpoint.parent, *above))
    return next((file for file in found if file.is_file()), None)


def with_saved_configuration(words: Sequence[str]) -> list[str]:
    """``words`` of a command of LightningCLI, with the model of ``--ckpt_path`` where nothing else says what it is.

    Raises:
        UsageError: the checkpoint does not exist.
    """
    command, *rest = words
    names = {word.partition("=")[0].partition(".")[0] for word in rest}
    checkpoint = _value_of("--ckpt_path", rest)
    if checkpoint is None or names.intersection(_DEFINING):
        return list(words)
    path = Path(checkpoint)
    if not path.is_file():
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise UsageError(f"--ckpt_path (={checkpoint}) does not exist or is not a file{near}")
    file = saved_configuration(path)
    if file is not None:
        print(f"lightning-acu {command}: with the configuration {file}", file=sys.stderr)
        return [command, "--config", str(file), *rest]
    return [command, "--config", _model_of(path), *rest]


def _model_of(checkpoint: Path) -> str:
    """A configuration, as text, of the ImageClassifier that wrote ``checkpoint``."""
    from ..saving.checkpoint import classifier_arguments

    arguments = classifier_arguments(checkpoint)
    if arguments is None:
        raise UsageError(
            f"{checkpoint} has no config.yaml beside it, and is not of an ImageClassifier: say what its model is\n"
            "with --config FILE or --model=my_module.MyModel"
        )
    if dataclasses.is_dataclass(arguments.get("convert")):
        arguments["convert"] = dataclasses.asdict(arguments["convert"])
    return json.dumps({"model": {"class_path": "lightning_acu.ImageClassifier", "init_args": arguments}})


def _value_of(option: str, words: Sequence[str]) -> str | None:
    for index, word in enumerate(words):
        if word == option and index + 1 < len(words):
            return words[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
