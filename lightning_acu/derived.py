"""Active versions of subclasses of ``nn.Conv2d`` that change nothing of what is computed, such as its constructor.

For each of them one class is made, a subclass of :class:`ACUConv2d` and of the class itself: the methods and attributes
that others have added stay, and so does ``isinstance``. Such layers are copied and pickled as others are: by the class
that they were converted from, which has to be importable, and not by the one made here.
"""

from __future__ import annotations

import functools
import types
from typing import Any, ClassVar

from torch import nn

from .conv import ACUConv2d
from .folded import FoldedConv2d, ReshapedConv2d
from .geometry import Padding, resolve_padding

__all__ = ["DerivedACUConv2d", "DerivedReshapedConv2d", "active_class", "reshaped_class", "what_differs"]

#: Methods and attributes that decide what a convolution computes, or how Python finds them.
_COMPUTING = frozenset(
    (
        "__call__", "_call_impl", "_wrapped_call_impl", "forward", "_conv_forward", "weight", "bias",
        "__getattr__", "__getattribute__", "__setattr__", "__slots__", "__init_subclass__", "__torch_function__",
    )
)  # fmt: skip

#: What ACUConv2d adds: a subclass that has one of these itself means something else by it.
_OWN = (frozenset(dir(ACUConv2d)) | frozenset(ACUConv2d.__annotations__)) - frozenset(dir(nn.Conv2d))


def what_differs(conv: nn.Module) -> str | None:
    """What makes ``conv``, of a subclass of ``nn.Conv2d``, another function than an ``nn.Conv2d``; None: nothing does.

    It may compute something else if its class overrides what computes the output, or if it has parameters or buffers
    of its own.
    """
    for name in vars(conv):
        if name in _OWN:
            return f"has its own `{name}`"
    for cls in type(conv).__mro__:
        if cls is nn.Conv2d:
            break
        for name in vars(cls):
            if name in _COMPUTING:
                return f"overrides `{name}`"
            if name in _OWN:
                return f"has its own `{name}`"
    own = [name for name, _ in (*conv.named_parameters(), *conv.named_buffers()) if name not in ("weight", "bias")]
    return f"has a tensor {own[0]!r} of its own" if own else None


class DerivedACUConv2d(ACUConv2d):
    """The base of all classes made here; subclasses compute what other ``forward`` methods do."""

    #: The one of those that the class is made from.
    derived_base: ClassVar[type[DerivedACUConv2d]]

    def fold(self, form: str = "auto") -> nn.Conv2d | FoldedConv2d:
        """As in :class:`ACUConv2d`; of the class that the layer was converted from, if the shape is as it was."""
        folded = super().fold(form)
        if type(folded) is nn.Conv2d and self._has_the_shape_of(folded):
            folded.__class__ = self.plain_class
            vars(folded).update({key: value for key, value in vars(self).items() if key not in vars(folded)})
            for name in ("offsets", *ACUConv2d.__annotations__):
                vars(folded).pop(name, None)
        return folded

    def _has_the_shape_of(self, conv: nn.Conv2d) -> bool:
        geometry = self.geometry
        if (conv.kernel_size, conv.dilation) != (geometry.kernel_size, geometry.dilation):
            return False
        padding: Padding = conv.padding if conv.padding_mode == "zeros" else 0
        return geometry.padding == resolve_padding(padding, geometry.kernel_size, geometry.stride, geometry.dilation)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        usual: Any = super().__reduce_ex__(2)
        return _new, (self.plain_class, self.derived_base), *usual[2:]


def _new(plain_class: Any, base: Any) -> ACUConv2d:
    """An empty layer, to be filled by ``__setstate__``."""
    cls = active_class(plain_class, base)
    return cls.__new__(cls)


class DerivedReshapedConv2d(ReshapedConv2d):
    """The base of the classes that such layers have after a fold into a kernel of another shape."""

    #: The one that the class is made from.
    converted_from: ClassVar[type[nn.Conv2d]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        usual: Any = super().__reduce_ex__(2)
        return _new_reshaped, (self.converted_from,), *usual[2:]


def _new_reshaped(converted_from: Any) -> DerivedReshapedConv2d:
    """An empty layer, to be filled by ``__setstate__``."""
    cls = reshaped_class(converted_from)
    return cls.__new__(cls)  # type: ignore[no-any-return]


def reshaped_class(converted_from: type[nn.Conv2d]) -> type[DerivedReshapedConv2d]:
    """The version of a subclass of ``nn.Conv2d`` after a fold into another shape; always the same class."""
    key: Any = converted_from
    return _make_reshaped(key)  # type: ignore[no-any-return]


@functools.cache
def _make_reshaped(converted_from: Any) -> Any:
    name = f"Reshaped{converted_from.__name__}"
    names = {
        "converted_from": converted_from,
        "__module__": converted_from.__module__,
        "__qualname__": name,
        "__doc__": f"``{converted_from.__name__}``, folded into a kernel of another shape.",
    }
    return types.new_class(name, (DerivedReshapedConv2d, converted_from), exec_body=lambda own: own.update(names))


def active_class(
    plain_class: type[nn.Conv2d], base: type[DerivedACUConv2d] = DerivedACUConv2d
) -> type[DerivedACUConv2d]:
    """The active version of a subclass of ``nn.Conv2d``; always the same class.

    Args:
        plain_class: the subclass; :func:`what_differs` has nothing to say about it, or ``base`` knows what it computes.
        base: DerivedACUConv2d, or a subclass of it.
    """
    classes: tuple[Any, Any] = (plain_class, base)
    return _make(*classes)


@functools.cache
def _make(plain_class: Any, base: Any) -> Any:
    name = f"ACU{plain_class.__name__}"
    names = {
        "plain_class": plain_class,
        "derived_base": base,
        "__module__": plain_class.__module__,
        "__qualname__": name,
        "__doc__": f"``{plain_class.__name__}``, active.",
    }
    return types.new_class(name, (base, plain_class), exec_body=lambda own: own.update(names))
