"""Checks of arguments that several rooms make, and how their messages list names."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["at_least", "few", "require_module", "whole_number"]

#: Python's and numpy's.
NUMBERS: Any = numbers.Real


def at_least(name: str, value: Any, minimum: float = 0) -> Any:
    """``value``, a number of at least ``minimum``.

    Raises:
        TypeError: no number.
        ValueError: a smaller one.
    """
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"`{name}` (={value!r}) must be a number")
    if not value >= minimum:
        limit = "not be negative" if minimum == 0 else f"be at least {minimum}"
        raise ValueError(f"`{name}` (={value}) must {limit}")
    return value


def whole_number(name: str, value: Any, minimum: int = 0) -> int:
    """``value`` as an int of at least ``minimum``; 1e4 is a whole number, too.

    Raises:
        TypeError: no number, or one that is not whole.
        ValueError: a smaller one.
    """
    number = at_least(name, value, minimum)
    if number != int(number):
        raise TypeError(f"`{name}` (={value}) must be a whole number")
    return int(number)


def require_module(model: Any) -> None:
    """Nothing for a module.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__} (={model!r})")


def few(names: Sequence[Any]) -> str:
    """The first three of ``names`` and how many more there are, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more
