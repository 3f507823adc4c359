"""Checks that several rooms make of arguments and installed packages, and how their messages list names."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

__all__ = [
    "WRAPPERS",
    "at_least",
    "check_finite_offsets",
    "few",
    "find_wrapper",
    "qualified_name",
    "refuse_peft",
    "require_module",
    "require_package",
    "whole_number",
]

#: Classes that wrap a model, by name so that none has to be imported, and where the model itself is found.
WRAPPERS = {
    "OptimizedModule": "model._orig_mod",
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "FullyShardedDataParallel": "model.module",
    "FSDPModule": "an unsharded copy that has loaded its full state_dict",
    "LightningModule": "the model inside it, such as module.model",
}

#: Python's and numpy's.
NUMBERS: Any = numbers.Real


def at_least(name: str, value: Any, minimum: float = 0) -> Any:
    """Return ``value``, checked to be a finite number of at least ``minimum``.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: it is smaller, infinite or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"`{name}` (={value!r}) must be a number")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` (={value}) must be finite")
    if value < minimum:
        limit = "not be negative" if minimum == 0 else f"be at least {minimum}"
        raise ValueError(f"`{name}` (={value}) must {limit}")
    return value


def whole_number(name: str, value: Any, minimum: int = 0) -> int:
    """Return ``value`` as an int of at least ``minimum``; 1e4 is a whole number, too.

    Raises:
        TypeError: ``value`` is not a number, or not a whole one.
        ValueError: it is smaller.
    """
    number = at_least(name, value, minimum)
    if number != int(number):
        raise TypeError(f"`{name}` (={value}) must be a whole number")
    return int(number)


def check_finite_offsets(layers: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the offsets (P, K, 2) of each layer, with its name, are finite; those on the meta device pass.

    Raises:
        ValueError: some are nan or inf; the message names the taps and, where they have names, the layers.
    """
    bad = [
        f"tap {tap}" + (f" of position group {group}" if len(offsets) > 1 else "") + (f" of {name}" if name else "")
        for name, offsets in layers
        if not offsets.is_meta
        for group, tap in (~offsets.isfinite().all(-1)).nonzero().tolist()
    ]
    if bad:
        raise ValueError(
            f"positions are not finite: {few(bad)}; the training has diverged: load an earlier checkpoint, and lower "
            "the learning rate of positions or of the weights"
        )


def require_module(model: Any) -> None:
    """Check that ``model`` is an ``nn.Module``.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__} (={model!r})")


def require_package(name: str, purpose: str, module: str | None = None) -> None:
    """Check that the package ``name`` is installed, which ``purpose`` needs ("saving as .safetensors").

    ``module``: what it installs, where that has another name.

    Raises:
        ModuleNotFoundError: it is not; the message says how to install it.
    """
    if not _installed(module or name):
        raise ModuleNotFoundError(f"{purpose} needs {name}, which is not installed: pip install {name}", name=name)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def refuse_peft(cls: type, advice: str) -> None:
    """Check that the caller's caller is not PEFT, whose LoRA builds its branch by ``type(layer)(...)``.

    Raises:
        TypeError: it is.
    """
    if sys._getframe(2).f_globals.get("__name__", "").partition(".")[0] == "peft":
        raise TypeError(
            f"PEFT's LoRA builds its branch as another {cls.__name__} and merges by adding weights, as if all kernels "
            f"lay on one grid, which is wrong here; {advice}"
        )


def few(names: Sequence[Any]) -> str:
    """The first three of ``names`` and how many more there are, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more


def qualified_name(*parts: str) -> str:
    """Names of modules and parameters joined by dots; the root's name is empty."""
    return ".".join(filter(None, parts))


def find_wrapper(module: nn.Module) -> str | None:
    """The name of the wrapper in ``WRAPPERS`` that ``module`` is an instance of, or None."""
    kinds = {cls.__name__ for cls in type(module).__mro__}
    return next((name for name in WRAPPERS if name in kinds), None)
