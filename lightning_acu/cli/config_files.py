"""Configuration files that build on another: ``base: FILE`` at the top of a YAML file.

A file says only what differs from its base, which may have a base itself:

    base: cifar10_plain.yaml            # relative to the folder of this file
    model:
      init_args:
        convert: {kernel_sizes: [3]}    # mappings merge, key by key; anything else replaces what the base says
    trainer:
      callbacks+:                       # "+" after a key: these come after those of the base's list
        - class_path: lightning_acu.callbacks.OffsetLogger

Where a mapping names another ``class_path`` than the base does, it replaces the base's: the arguments of one class mean
nothing to another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import get_loader
from yaml import SafeDumper, YAMLError, dump

__all__ = ["BASE", "base_of", "expand_configs", "load_config"]

BASE = "base"


def load_config(path: str | Path) -> dict[str, Any]:
    """The configuration in a YAML file, merged into its base.

    Raises:
        FileNotFoundError: the file or a base does not exist; the message says which file asks for it.
        ValueError: a file is no YAML or no mapping, a base is no file name, files are the base of each other, "+" is
            used where the base has no list, or a key stands there with and without it.
    """
    chain: list[Path] = []
    configs = []
    following: Path | None = Path(path)
    while following is not None:
        if following.resolve() in (seen.resolve() for seen in chain):
            raise ValueError(f"`base` goes in a circle: {' -> '.join(map(str, [*chain, following]))}")
        if not following.is_file():
            asked = f", which is `base` in {chain[-1]}" if chain else ""
            raise FileNotFoundError(f"there is no configuration file {following}{asked}")
        chain.append(following)
        configs.append(_read(following))
        following = _base(configs[-1], chain[-1])
    merged: dict[str, Any] = {}
    for config, source in zip(reversed(configs), reversed(chain), strict=True):
        config.pop(BASE, None)
        merged = _merge(merged, config, str(source))
    return merged


def base_of(path: Path) -> Path | None:
    """The file that the configuration in ``path`` builds on, None where there is none; ValueError as load_config."""
    return _base(_read(path), path)


def expand_configs(arguments: Sequence[str]) -> list[str]:
    """A command line in which each ``--config FILE`` with a base is the merged configuration, as LightningCLI takes it.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_config`.
    """
    expanded: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if equals and option in ("--config", "-c"):
            expanded.append(f"{option}={_expand(value)}")
        elif expanded and expanded[-1] in ("--config", "-c"):
            expanded.append(_expand(argument))
        else:
            expanded.append(argument)
    return expanded


def _expand(value: str) -> str:
    """YAML on one line; what is no file, or has no base, is left to LightningCLI."""
    if not os.path.isfile(value):  # not Path's, which raises for a text that is too long to be a name
        return value
    config = _load(Path(value))
    if not isinstance(config, dict) or BASE not in config:
        return value
    style: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "allow_unicode": True, "width": math.inf}
    return str(dump(load_config(value), Dumper=_Dumper, **style)).strip()


class _Dumper(SafeDumper):
    """Quotes every string: "1e-4" is one in YAML 1.1, and a number to LightningCLI."""


_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _load(path: Path) -> Any:
    try:
        # As LightningCLI reads: "1e-4" is a number there, though not in YAML 1.1.
        return get_loader("yaml")(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    config = _load(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of options, and holds {type(config).__name__}")
    return config


def _base(config: dict[str, Any], path: Path) -> Path | None:
    name = config.get(BASE)
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"`base` (={name!r}) in {path} must be the name of a file")
    return path.parent / name


def _merge(base: dict[str, Any], config: dict[str, Any], source: str) -> dict[str, Any]:
    """``config`` over ``base``, neither of which changes."""
    merged = dict(base)
    for key, value in config.items():
        name = str(key).removesuffix("+")
        known = merged.get(name)
        if name != str(key):
            if name in config:
                raise ValueError(
                    f"`{name}` and `{key}` both stand in {source}: say what replaces the list, or is added"
                )
            if not isinstance(known, list) or not isinstance(value, list):
                raise ValueError(f"`{key}` in {source} needs a list here and a list `{name}` in the base")
            merged[name] = [*known, *value]
        elif isinstance(value, dict):
            kept = known if isinstance(known, dict) and not _another_class(known, value) else {}
            merged[key] = _merge(kept, value, source)
        else:
            merged[key] = value
    return merged


def _another_class(base: dict[str, Any], config: dict[str, Any]) -> bool:
    return "class_path" in config and config["class_path"] != base.get("class_path")
