"""Which modules are meant: names as peft matches them, and kernel sizes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

from torch import nn

from .rules import named_conv2ds

__all__ = ["NoEffectWarning", "kernel_size_pair", "name_matcher", "warn_of_idle_patterns"]


class NoEffectWarning(UserWarning):
    """A conversion that matched no module."""


def kernel_size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """3 to (3, 3); a ValueError for what is no kernel size."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"`kernel_sizes` has {size!r}; each must be an int >= 1 or a pair of them")
    return pair


def name_matcher(argument: str, patterns: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Peft's convention: a str is a regular expression for the whole name, a sequence lists names or endings."""
    if patterns is None:
        return lambda name: False
    if isinstance(patterns, str):
        try:
            compiled = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"`{argument}` (={patterns!r}) is not a regular expression: {error}") from error
        return lambda name: compiled.fullmatch(name) is not None
    endings = tuple(patterns)
    return lambda name: any(name == ending or name.endswith(f".{ending}") for ending in endings)


def warn_of_idle_patterns(model: nn.Module, stacklevel: int, **arguments: str | Sequence[str] | None) -> None:
    """A misspelt name would otherwise convert, or leave out, nothing."""
    names = [name for aliases in named_conv2ds(model).values() for name in aliases]
    for argument, patterns in arguments.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            matches = name_matcher(argument, pattern if isinstance(patterns, str) else [pattern])
            if names and not any(map(matches, names)):
                warnings.warn(
                    f"`{argument}`: {pattern!r} matches no convolution", NoEffectWarning, stacklevel=stacklevel
                )
