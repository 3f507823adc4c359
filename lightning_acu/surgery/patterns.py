"""How arguments select modules: by name patterns, matched as in peft, and by kernel size."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence, Set

from torch import nn

from .rules import named_conv2ds

__all__ = ["NoEffectWarning", "kernel_size_pair", "name_matcher", "warn_of_idle_patterns"]


class NoEffectWarning(UserWarning):
    """A conversion or a pattern that matched no module, or a conversion that left some of the matches plain."""


def kernel_size_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(3, 3) for 3; a ValueError for what is not a kernel size."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise ValueError(f"`kernel_sizes` has {size!r}; each must be an int >= 1 or a pair of them")
    return pair


def name_matcher(argument: str, patterns: str | Sequence[str] | None) -> Callable[[str], bool]:
    """A function from a name to whether ``patterns`` match it.

    As in peft, a str is a regular expression for the whole name, and a sequence lists names or their endings.
    """
    if patterns is None:
        return lambda name: False
    if isinstance(patterns, str):
        try:
            compiled = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"`{argument}` (={patterns!r}) is not a regular expression: {error}") from error
        return lambda name: compiled.fullmatch(name) is not None
    if not isinstance(patterns, Sequence | Set) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`{argument}` (={patterns!r}) must be a regular expression or a list of names")
    endings = tuple(patterns)
    return lambda name: any(name == ending or name.endswith(f".{ending}") for ending in endings)


def warn_of_idle_patterns(model: nn.Module, stacklevel: int, **arguments: str | Sequence[str] | None) -> None:
    """Warn of each pattern that matches no convolution: a misspelt name would silently convert or exclude nothing."""
    names = [name for aliases in named_conv2ds(model).values() for name in aliases]
    for argument, patterns in arguments.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            matches = name_matcher(argument, pattern if isinstance(patterns, str) else [pattern])
            if names and not any(map(matches, names)):
                warnings.warn(
                    f"`{argument}`: {pattern!r} matches no convolution", NoEffectWarning, stacklevel=stacklevel
                )
