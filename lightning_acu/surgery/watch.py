"""Notice when code reads the parameters of given layers from outside, instead of calling the layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from .outputs import tensors_in

__all__ = ["ParameterRead", "WatchParameters", "in_forward", "modules_in_call"]

#: What may be asked of a parameter without reading its numbers.
_HARMLESS = frozenset(
    (
        "device", "dtype", "layout", "shape", "ndim", "names", "size", "dim", "numel", "nelement", "element_size",
        "stride", "grad", "grad_fn", "requires_grad", "requires_grad_", "detach_", "is_leaf", "is_cuda",
        "is_meta", "is_sparse", "is_contiguous", "is_floating_point", "is_complex", "__len__", "__hash__", "__repr__",
    )
)  # fmt: skip

_CALL = nn.Module._call_impl.__code__
_APPLY = nn.Module._apply.__code__


class ParameterRead(RuntimeError):  # noqa: N818 (an event rather than an error)
    """Raised at the first read of a parameter that must not be read."""


class WatchParameters(TorchFunctionMode):
    """In this block and thread, notice reads of the parameters of ``layers`` that the layers do not make themselves.

    Args:
        layers: the layers; their own calls may read.
        stop: raise :class:`ParameterRead` before the read happens.

    Attributes:
        seen: the layers of which a parameter was read.
    """

    def __init__(self, layers: Iterable[nn.Module], stop: bool) -> None:
        super().__init__()
        self._owner = {id(parameter): layer for layer in layers for parameter in layer.parameters()}
        self._stop = stop
        self.seen: list[nn.Module] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not _is_harmless(func):
            owners = {owner for tensor in tensors_in([args, kwargs]) if (owner := self._owner.get(id(tensor)))}
            read = [owner for owner in owners if not in_forward(owner) and not _in_apply()]
            self.seen += [owner for owner in read if owner not in self.seen]
            if read and self._stop:
                raise ParameterRead
        return func(*args, **kwargs)


def _is_harmless(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):  # of a property such as Tensor.shape
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name in _HARMLESS


def _in_apply() -> bool:
    """Whether ``module.to``, ``half`` or the like is running, which change every parameter by itself, in place."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame is not None


def modules_in_call() -> Iterator[nn.Module]:
    """The modules that are being called right now, in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def in_forward(layer: nn.Module | None = None) -> bool:
    """Whether ``layer``, by default any module, is being called right now, in this thread."""
    return any(layer is None or module is layer for module in modules_in_call())
