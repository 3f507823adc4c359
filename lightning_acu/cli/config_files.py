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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, get_loader  # type: ignore[attr-defined]

__all__ = ["ConfigFile", "with_bases"]

#: Far above what configurations need, and far below what takes seconds to read or much memory.
_MAX_BASES, _MAX_CHARACTERS, _MAX_WRITTEN_OUT, _MAX_DEPTH = 32, 2**18, 2**20, 64


class ConfigFile(ActionConfigFile):
    """jsonargparse's ``--config``, which reads the bases of a file before the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Add to ``cfg`` what the bases and the file say; jsonargparse treats text that is not the name of a file."""
        if not os.path.isfile(values):  # not Path's, which raises for a text that is too long to be a name
            with suppress(yaml.YAMLError):  # which jsonargparse reports
                try:
                    _check_extent(values)
                except _ExtentError as error:
                    raise argparse.ArgumentError(self, f"the text {values[:40]!r}... {error}") from error
            super().__call__(parser, cfg, values, option_string)
            return
        try:
            files = with_bases(values)
        except (OSError, ValueError) as error:
            raise argparse.ArgumentError(self, str(error)) from error
        for file in files:
            super().__call__(parser, cfg, str(file), option_string)
            cfg.pop("base", None)


def with_bases(path: str | Path) -> list[Path]:
    """The configuration files that ``path`` stands for: first the one without a base, ..., last ``path`` itself.

    Raises:
        FileNotFoundError: the file or a base does not exist; the message names both.
        OSError: a file cannot be read.
        ValueError: a file is not valid YAML or not a mapping, is too large, has a key with and without "+", its base is
            not the name of a file, or files are the base of each other or too many in a row.
    """
    files = [Path(path)]
    while (base := _base_of(files[0])) is not None:
        if len(files) > _MAX_BASES:
            raise ValueError(f"{path} has more than {_MAX_BASES} bases, each the `base` of another; the last is {base}")
        if not base.is_file():
            raise FileNotFoundError(f"{base}, the `base` of {files[0]}, does not exist or is not a file")
        if any(base.samefile(file) for file in files):
            raise ValueError(f"`base` goes in a circle: {' -> '.join(map(str, [*reversed(files), base]))}")
        files.insert(0, base)
    return files


def _base_of(path: Path) -> Path | None:
    try:
        with path.open() as file:
            text = file.read(_MAX_CHARACTERS + 1)
        _check_extent(text)
        config = get_loader("yaml")(text)  # as jsonargparse will read it
    except OSError:
        raise
    except _ExtentError as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # PyYAML raises anything for a text that does not fit its tag, KeyError for "!!bool x"
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


class _ExtentError(ValueError):
    """What is wrong with a file, as the end of a sentence about it."""


@dataclass
class _Node:
    """A value in a YAML text, with its aliases written out: its anchor, length, and levels below it."""

    anchor: str | None
    characters: int = 1
    height: int = 0


def _check_extent(text: str) -> None:
    """Before anything is made of it: a short text may stand for an endless one, by aliases of aliases.

    Raises:
        _ExtentError: the text is too long, too long with its aliases written out, or too deep; or an alias is in what
            it stands for.
        yaml.YAMLError: the text is not valid YAML.
    """
    if len(text) > _MAX_CHARACTERS:
        raise _ExtentError(f"has more than {_MAX_CHARACTERS} characters, too many for a configuration")
    known: dict[str, _Node] = {}  # by their anchors
    stack = [_Node(None)]  # values that are not complete yet, from the outermost; below them the file itself
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # which follows no alias
        if isinstance(event, yaml.CollectionStartEvent):
            known.pop(event.anchor, None)
            stack.append(_Node(event.anchor))
            node = _Node(None)
        elif isinstance(event, yaml.CollectionEndEvent):
            node = stack.pop()
        elif isinstance(event, yaml.ScalarEvent):
            node = _Node(event.anchor, len(event.value) + 1)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in known and any(node.anchor == event.anchor for node in stack):
                raise _ExtentError(f"never ends: the alias *{event.anchor} is in what it stands for")
            node = known.get(event.anchor) or _Node(None)  # reading it will say that the anchor does not exist
        else:
            continue
        if node.anchor is not None:
            known[node.anchor] = node
        parent = stack[-1]
        parent.characters += node.characters
        parent.height = max(parent.height, node.height + 1)
        if parent.characters > _MAX_WRITTEN_OUT:
            raise _ExtentError(f"has more than {_MAX_WRITTEN_OUT} characters when its aliases are written out")
        if len(stack) + node.height > _MAX_DEPTH:
            raise _ExtentError(f"is nested more than {_MAX_DEPTH} levels deep")


def _check_appending(config: Any, path: Path) -> None:
    """Jsonargparse would forget one of ``callbacks`` and ``callbacks+``, silently."""
    if isinstance(config, dict):
        for key in config:
            if f"{key}+" in config:
                raise ValueError(f"`{key}` and `{key}+` both appear in {path}; use one")
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            _check_appending(value, path)
