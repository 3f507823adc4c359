"""Configuration files that build on another: ``base: FILE`` at the top of a YAML file.

A file says only what differs from its base, which may have a base itself:

    base: cifar10_plain.yaml            # relative to the folder of this file
    model:
      init_args:
        convert: {kernel_sizes: [3]}
    trainer:
      callbacks+:                       # appended to the list of the base
        - class_path: lightning_acu.callbacks.OffsetLogger

``--config FILE`` then means ``--config BASE --config FILE``, which jsonargparse merges: mappings and the arguments of
classes key by key, while any other value replaces that of the base, and ``+`` after the name of a list appends to it.
Where a file names another ``class_path`` than its base, those arguments are kept that the new class has too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

__all__ = ["ConfigFile", "with_bases"]


class ConfigFile(ActionConfigFile):
    """jsonargparse's ``--config``, which reads the bases of a file before the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Add to ``cfg`` what the bases and the file say; jsonargparse treats text that is not the name of a file."""
        if not os.path.isfile(values):  # not Path's, which raises for a text that is too long to be a name
            super().__call__(parser, cfg, values, option_string)
            return
        try:
            files = with_bases(values)
        except (FileNotFoundError, ValueError) as error:
            raise argparse.ArgumentError(self, str(error)) from error
        for file in files:
            super().__call__(parser, cfg, str(file), option_string)
            cfg.pop("base", None)


def with_bases(path: str | Path) -> list[Path]:
    """The configuration files that ``path`` stands for: first the one without a base, ..., last ``path`` itself.

    Raises:
        FileNotFoundError: the file or a base does not exist; the message names both.
        ValueError: a file is not valid YAML or not a mapping, has a key with and without "+", its base is not the name
            of a file, or files are the base of each other.
    """
    files = [Path(path)]
    while (base := _base_of(files[0])) is not None:
        if not base.is_file():
            raise FileNotFoundError(f"{base}, the `base` of {files[0]}, does not exist or is not a file")
        if any(base.samefile(file) for file in files):
            raise ValueError(f"`base` goes in a circle: {' -> '.join(map(str, [*reversed(files), base]))}")
        files.insert(0, base)
    return files


def _base_of(path: Path) -> Path | None:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a valid YAML file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of options, not {type(config).__name__}")
    _check_appending(config, path)
    name = config.get("base")
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"`base` (={name!r}) in {path} must be the name of a file")
    return path.parent / name


def _check_appending(config: Any, path: Path) -> None:
    """Jsonargparse would forget one of ``callbacks`` and ``callbacks+``, silently."""
    if isinstance(config, dict):
        for key in config:
            if f"{key}+" in config:
                raise ValueError(f"`{key}` and `{key}+` both appear in {path}; use one")
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            _check_appending(value, path)
