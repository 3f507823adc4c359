"""A bound on what a file can make its reader build: a few bytes may ask for a network of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["BuildLimit", "TooLargeError"]

#: A network may make this many times the tensors and bytes of its file while it is built (initialisation makes
#: temporary ones), and this much more, whatever the file's size.
_FACTOR, _MORE_TENSORS, _MORE_BYTES = 8, 4096, 2**28

#: Functions whose numbers are sizes although they are not in a list.
_RANGES = ("arange", "linspace", "logspace", "range", "eye", "randperm")


class TooLargeError(ValueError):
    """More tensors or bytes were asked for than the limit."""


class BuildLimit(TorchDispatchMode):
    """In this block and thread, refuse to make many more tensors than a file holds, before their memory is taken.

    Args:
        tensors: those of the file.

    Raises:
        TooLargeError: where more are asked for.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        # Of their storages: a tensor that repeats one number may have any shape, and so may one without values.
        tensors = [tensor for tensor in tensors if tensor.layout == torch.strided and not tensor.is_meta]
        stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self._tensors = _FACTOR * len(tensors) + _MORE_TENSORS
        self._bytes = _FACTOR * sum(stored.values()) + _MORE_BYTES

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count what ``func`` makes, if it makes tensors from numbers."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        given = [*args, *kwargs.values()]
        given += [part for value in given if isinstance(value, list | tuple) for part in value]  # (of torch.stack)
        if name.startswith("new_") or not any(isinstance(value, Tensor) for value in given):
            self._count(name, [*args, kwargs.get("size", ())], kwargs.get("dtype") or torch.float32)
        return func(*args, **kwargs)

    def _count(self, name: str, args: Sequence[Any], dtype: torch.dtype) -> None:
        size = next((value for value in args if isinstance(value, list | tuple)), None)
        if name in _RANGES:
            numbers = [abs(value) for value in args if isinstance(value, int | float)]
            elements = max(numbers, default=0) ** (2 if name == "eye" else 1)
        else:
            elements = math.prod(size or ())
        self._tensors -= 1
        self._bytes -= elements * dtype.itemsize  # type: ignore[assignment]
        if self._tensors < 0 or self._bytes < 0:
            raise TooLargeError("its architecture asks for many more tensors, or larger ones, than the file holds")
