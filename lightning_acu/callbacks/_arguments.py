"""Checks of what people give to callbacks, before any training starts."""

from __future__ import annotations

import numbers
from typing import Any

__all__ = ["at_least", "whole_number"]

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
