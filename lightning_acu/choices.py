"""Choices by name: the check of one, and the nearest to what was written. Imports nothing, for quick commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["did_you_mean", "one_of"]


def did_you_mean(value: Any, choices: Iterable[str], most: int = 1) -> str:
    """The ``most`` nearest of ``choices`` as the end of a message, ``"; did you mean 'resnet18'?"``, or nothing.

    Upper and lower case count as the same.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(str(value).lower(), by_lower, n=most)
    return f"; did you mean {' or '.join(repr(by_lower[name]) for name in near)}?" if near else ""


def one_of(name: str, value: Any, choices: Iterable[str], *, or_none: bool = False) -> Any:
    """Return ``value``, checked to be one of ``choices`` (or None, with ``or_none``).

    Raises:
        ValueError: it is something else; the message names the choices, and the nearest of them.
    """
    choices = tuple(choices)
    if (isinstance(value, str) and value in choices) or (or_none and value is None):
        return value
    *first, last = [*map(repr, choices), *(["None"] if or_none else [])]
    raise ValueError(f"`{name}` (={value!r}) must be {', '.join(first)} or {last}{did_you_mean(value, choices)}")
