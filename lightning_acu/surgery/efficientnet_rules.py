"""The rules for the convolutions of EfficientNet-PyTorch, by their names, as it need not be installed."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from ..conv import ACUConv2d
from ..derived import active_class
from ..efficientnet_convs import DynamicSamePadding, StaticSamePadding
from .rules import Rule, register_named_rule, why_not_adoptable

__all__ = []  # type: ignore[var-annotated]


def _why_not(conv: Any) -> str | None:
    if conv.padding_mode != "zeros" or any(conv.padding):
        return "it pads twice, by its own rule and by `padding`"
    return why_not_adoptable(conv)


def _adopt(base: Any, conv: nn.Conv2d, **arguments: Any) -> ACUConv2d:
    return active_class(type(conv), base).adopt(conv, **arguments)


for _module in ("efficientnet_pytorch.utils", "segmentation_models_pytorch.encoders._efficientnet"):
    for _name, _base in (
        ("Conv2dDynamicSamePadding", DynamicSamePadding),
        ("Conv2dStaticSamePadding", StaticSamePadding),
    ):
        register_named_rule(_module, _name, Rule(_why_not, functools.partial(_adopt, _base)))
