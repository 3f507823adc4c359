"""``lightning-acu completion SHELL``: a script that completes commands, options and file names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..checks import require_package
from .commands import COMMANDS, TRAINING, module_of
from .errors import Parser

__all__ = ["make_parser", "run"]

_SHELLS = ("bash", "zsh", "tcsh")

#: Options whose value is a file.
_FILES = ("--config", "--ckpt", "--ckpt_path", "--output", "--out", "--figure")


def make_parser() -> Parser:
    """The options."""
    parser = Parser("completion", "print a script for your shell; it needs the package shtab, once")
    parser.add_argument("shell", choices=_SHELLS)
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu completion bash``."""
    options = make_parser().parse_args(words[1:])
    require_package("shtab", "lightning-acu completion")
    import shtab

    print(shtab.complete(_all_commands(shtab.FILE), shell=options.shell))


def _all_commands(file: Any) -> argparse.ArgumentParser:
    """One parser with every option of every command; LightningCLI's own has types that shtab does not know."""
    root = argparse.ArgumentParser("lightning-acu")
    root.add_argument("--version", action="version", version="")
    root.add_argument("--debug", action="store_true")
    commands = root.add_subparsers()
    lightning = _lightning_parsers()
    for name, (summary, _) in COMMANDS.items():
        target = commands.add_parser(name, help=summary, add_help=False)
        sources = [lightning[name]] if name in TRAINING else []
        if name not in TRAINING or name == "predict":
            sources.append(module_of(name).make_parser())
        for source in sources:
            _copy(source, target, file)
    return root


def _copy(source: Any, target: argparse.ArgumentParser, file: Any) -> None:
    for action in source._actions:
        names = [option for option in action.option_strings if option not in target._option_string_actions]
        if action.option_strings and not names:
            continue
        choices = list(action.choices) if isinstance(action.choices, Sequence) else None
        kind = {"nargs": "?", "choices": choices} if names or choices else {"nargs": "*"}
        copy = target.add_argument(*(names or [action.dest]), **kind, help=str(action.help or ""))  # type: ignore[arg-type]
        if (names and names[-1] in _FILES) or not (names or choices):
            copy.complete = file  # type: ignore[attr-defined]


def _lightning_parsers() -> dict[str, Any]:
    from .training import ACULightningCLI, run_lightning

    class _BuiltError(Exception):
        pass

    class Listing(ACULightningCLI):
        def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
            raise _BuiltError(self._subcommand_parsers)

    try:
        run_lightning([], Listing)
    except _BuiltError as built:
        parsers: dict[str, Any] = built.args[0]
    return parsers
