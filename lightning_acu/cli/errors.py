"""Errors in a few lines: what was wrong and the nearest valid value, instead of a traceback."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..choices import did_you_mean
from .misspelt import without_types

__all__ = ["Parser", "UsageError", "fail", "quiet_retries", "short_errors"]

#: At most this much of a message is shown.
_LINES, _CHARACTERS = 4, 1000

#: Where code is that is not the user's; below them also "site-packages" anywhere.
_LIBRARIES = [str(Path(__file__).parents[1]), sysconfig.get_path("stdlib")]


class UsageError(Exception):
    """The words of a command do not fit it."""


def fail(command: str, message: str, code: int = 2, hint: str | None = None) -> NoReturn:
    """End with ``message`` on stderr, and a ``hint`` in a last line (default: where the help is)."""
    lines = [line.rstrip() for line in message.splitlines() if line.strip()] or ["no message"]
    text = "\n".join(lines[:_LINES])
    if len(text) > _CHARACTERS:
        text = f"{text[:_CHARACTERS]}..."
    print(f"{command}: {text}\n{hint or f'{command} --help lists its options'}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are two lines that name the nearest option or value."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(f"lightning-acu {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """End with 2."""
        options = [option for action in self._actions for option in action.option_strings]
        choices = [str(choice) for action in self._actions for choice in action.choices or ()]
        if found := re.search(r"unrecognized arguments: (\S+)", message):
            message += did_you_mean(found[1].partition("=")[0], options)
        elif found := re.search(r"invalid choice: '([^']*)'", message):
            message += did_you_mean(found[1], choices)
        fail(self.prog, message)


@contextmanager
def short_errors(command: str, debug: bool) -> Iterator[None]:
    """Turn errors into a few lines, unless ``debug``; but those in the user's own code keep their traceback.

    So do errors in the middle of a training: a crash after days should not have to be repeated to be understood.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # of `lightning-acu configs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
        sys.exit(1)
    except Exception as error:
        if debug or (not isinstance(error, UsageError) and _needs_traceback(error)):
            raise
        wrong = isinstance(
            error, UsageError | ValueError | TypeError | FileNotFoundError
        )  # what was given; else what was done
        fail(
            command,
            _said(error),
            2 if wrong else 1,
            None if isinstance(error, UsageError) else f"{command} ... --debug shows the traceback",
        )


@contextmanager
def quiet_retries() -> Iterator[None]:
    """Without huggingface_hub's two lines for each of its ten attempts; the error after the last one says enough."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _said(error: BaseException) -> str:
    """The message of ``error``, which may be without words."""
    text = without_types(str(error))
    # Messages written for users are sentences; a KeyError's is a key, an assertion's may be nothing.
    return (
        text
        if (" " in text or isinstance(error, UsageError)) and not isinstance(error, KeyError)
        else f"{type(error).__name__}: {text}"
    )


def _needs_traceback(error: BaseException) -> bool:
    """Whether it passed through code of the user, or training had begun."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if _is_users(Path(frame.f_code.co_filename)):
            return True
        trainer: Any = frame.f_locals.get("self")
        if type(trainer).__name__ == "Trainer" and getattr(trainer, "global_step", 0) > 0:
            return True
        trace = trace.tb_next
    return False


def _is_users(file: Path) -> bool:
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return file.is_file() and not installed and not any(map(file.is_relative_to, _LIBRARIES))
