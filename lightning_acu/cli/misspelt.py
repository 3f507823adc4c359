"""jsonargparse's messages about wrong options and values in one line, with the nearest valid one."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..choices import did_you_mean

__all__ = ["explain", "without_types"]


def explain(message: str, options: Iterable[str] = ()) -> str:
    """What a ``message`` of jsonargparse means for someone who wrote a command or a configuration.

    Args:
        message: what a parser says is wrong.
        options: those of the command, beginning with ``--``.
    """
    path = "--" + ".".join(re.findall(r'Parser key "([^"]+)"', message))
    for pattern, say in _REASONS:
        if found := re.search(pattern, message):
            return say(found, path, list(options))
    return without_types(message)


def without_types(message: str) -> str:
    """``message``; only its reasons, if it lists every type that a value may have, as jsonargparse's do."""
    if "\nErrors:" not in message:
        return message
    listed = message.partition("\nErrors:")[2].partition("\nGiven value")[0]
    reasons = re.findall(r"^\s*- (.*)", listed, re.MULTILINE)
    return "\n".join(reason.strip() for reason in reasons if "NoneType" not in reason)


def _unrecognized(found: re.Match[str], path: str, options: list[str]) -> str:
    return f"there is no option {found[1]}{did_you_mean(found[1].rstrip('+'), options)}"


def _not_accepted(found: re.Match[str], path: str, options: list[str]) -> str:
    """Option 'x' is not accepted: the class is named before it, or after it for functions that make something."""
    before = re.findall(r"class_path '([^']+)'", found.string[: found.start()])
    after = re.match(r"[^\n]*class_path='([^']+)'", found.string[found.end() :])
    name = after[1] if after else before[-1] if before else ""
    cls = _imported(name)
    family = inspect.getmro(cls) if inspect.isclass(cls) else [cls] if callable(cls) else []  # behind **kwargs
    known = [argument for each in family if each is not object for argument in inspect.signature(each).parameters]
    key = re.split(r"[.=]", found[1])[0]
    return f"{path}: {name.rpartition('.')[2]} has no argument {key!r}{did_you_mean(key, known)}"


def _no_attribute(found: re.Match[str], path: str, options: list[str]) -> str:
    return f"{path}: there is no {found[2]} in {found[1]}{did_you_mean(found[2], _public(found[1]))}"


def _no_module(found: re.Match[str], path: str, options: list[str]) -> str:
    here = [file.stem for file in Path().glob("*.py")]
    return f"{path}: there is no module {found[1]!r} (searched, too: the current folder){did_you_mean(found[1], here)}"


def _no_class(found: re.Match[str], path: str, options: list[str]) -> str:
    known = [
        name for room in ("lightning_acu", "lightning_acu.data", "lightning_acu.callbacks") for name in _public(room)
    ]
    return f"{path} (={found[1]!r}) is not the name of a class: give package.Class{did_you_mean(found[1], known)}"


def _required(found: re.Match[str], path: str, options: list[str]) -> str:
    names = [name.strip() for name in found[1].split(",")]
    if names[-1].endswith(".model"):  # of the command, whose name is before the dot
        return (
            "give --config FILE (`lightning-acu configs` lists some), or a model: --model=my_module.MyModel\n"
            "or --model=ImageClassifier --model.model=resnet18 --data=ImageFolderDataModule --data.root=FOLDER"
        )
    return f"{', '.join(f'{path}.{name}' for name in names)} must be given"


def _literal(found: re.Match[str], path: str, options: list[str]) -> str:
    choices = re.findall(r"'([^']*)'", "".join(re.findall(r"Expected a typing\.Literal\[(.*?)\]", found.string)))
    value = _value(found.string)
    return f"{path} (={value}) must be one of {', '.join(choices)}{did_you_mean(value, choices)}"


def _wrong_type(found: re.Match[str], path: str, options: list[str]) -> str:
    kinds = [kind for kind in re.findall(r"Expected a <class '([^']+)'>", found.string) if kind != "NoneType"]
    return f"{path} (={_value(found.string)}) must be of type {' or '.join(dict.fromkeys(kinds))}"


def _no_file(found: re.Match[str], path: str, options: list[str]) -> str:
    file = Path(found[1])
    beside = [other.name for other in file.parent.glob("*")] if file.parent.is_dir() else []
    hint = did_you_mean(file.name, beside) or "; `lightning-acu configs` lists those that come with the package"
    return f"{path}: {file} does not exist{hint}"


def _subcommand(found: re.Match[str], path: str, options: list[str]) -> str:
    return f"there is no command {found[1]!r}; the options before a command are those of LightningCLI: --config"


#: Patterns of what jsonargparse says, the more specific before the more general, and what is said instead.
_REASONS = [
    (r"^unrecognized arguments: ([^\s=]+)", _unrecognized),
    (r"argument subcommand: invalid choice: '([^']*)'", _subcommand),
    (r"Option '([^']+)' is not accepted", _not_accepted),
    (r"module '([^']+)' has no attribute '([^']+)'", _no_attribute),
    (r"No module named '([^']+)'", _no_module),
    (r"Expected a dot import path string: (\S+)", _no_class),
    (r"arguments are required: (.+)", _required),
    (r"Expected a typing\.Literal", _literal),
    (r"File does not exist: '([^']+)'", _no_file),
    (r"(?s)Parser key .*Expected a <class \'(?!NoneType)", _wrong_type),
]


def _value(message: str) -> str:
    """The first value that jsonargparse says was given."""
    found = re.search(r"NestedArg\(key='[^']*', val='([^']*)'\)|(?:Got|Given) value: (.*)", message)
    return (found[1] or found[2]).strip() if found else "?"


def _imported(name: str) -> Any:
    """What ``name`` means in a module that was imported already, or None."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, None)


def _public(module: str) -> list[str]:
    return [name for name in dir(sys.modules.get(module)) if not name.startswith("_")]
