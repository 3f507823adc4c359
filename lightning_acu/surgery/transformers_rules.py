"""The rules for convolutions of Hugging Face's transformers, by their names, as it need not be installed."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..conv import ACUConv2d
from ..derived import active_class
from ..transformers_convs import WeightStandardized, ZeroPadded
from .rules import Rule, register_named_rule, why_not_adoptable

__all__ = []  # type: ignore[var-annotated]

_PADS_TWICE = "it pads twice, by its own rule and by `padding`"


def _why_not_standardized(conv: Any) -> str | None:
    if conv.padding_mode != "zeros":
        return f"its `padding_mode` (={conv.padding_mode!r}) is ignored in its forward pass"
    if conv.pad is not None:
        if any(conv.padding):
            return _PADS_TWICE
        cls = type(conv.pad)
        if (cls.__module__, cls.__qualname__) != (type(conv).__module__, "DynamicPad2d") or conv.pad.value != 0:
            return f"its `pad` (={conv.pad}) is not TensorFlow's zero padding"
    return why_not_adoptable(conv)


def _why_not_padded(conv: Any) -> str | None:
    return _PADS_TWICE if conv.padding_mode != "zeros" or any(conv.padding) else why_not_adoptable(conv)


def _adopt(base: Any, conv: nn.Conv2d, **arguments: Any) -> ACUConv2d:
    return active_class(type(conv), base).adopt(conv, **arguments)


for _model, _name, _why_not, _base in (
    ("bit", "WeightStandardizedConv2d", _why_not_standardized, WeightStandardized),
    ("perceiver", "Conv2dSamePadding", _why_not_padded, ZeroPadded),
):
    _rule = Rule(_why_not, functools.partial(_adopt, _base))
    register_named_rule(f"transformers.models.{_model}.modeling_{_model}", _name, _rule)
