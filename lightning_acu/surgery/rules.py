"""Which convolutions can become active ones, and how: one rule for each class.

A rule is chosen by the exact type of a module. A subclass that is not listed may compute something else (standardise
its weight, pad by the size of the input), so it is skipped with that reason rather than swapped in hope. To support
another class, write a rule and register it::

    @register_rule(MyConv2d)
    def my_conv2d(conv: nn.Module) -> str | None:
        return "a reason" if ... else None
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrize

from ..conv import ACUConv2d, recomputed_parameter
from ..timm_convs import ACUConv2dSame, ACUScaledStdConv2d, ACUScaledStdConv2dSame, ACUStdConv2d, ACUStdConv2dSame

__all__ = ["Rule", "find_rule", "is_conv2d", "named_conv2ds", "register_rule", "why_not_convertible"]


@dataclass(frozen=True)
class Rule:
    """How one class of convolutions becomes active.

    Attributes:
        why_not: the reason why a given module cannot be converted, or None; its docstring says what the class is.
        convert: changes the module in place; called with ``position_groups``, ``fixed_centre`` and ``backend``.
    """

    why_not: Callable[[nn.Module], str | None]
    convert: Callable[..., Any]


#: For subclasses of nn.Conv2d that compute what it does.
_ADOPT = functools.partial(ACUConv2d.adopt, exact=False)

_RULES: dict[type[nn.Module], Rule] = {}


def register_rule(
    cls: type[nn.Module], convert: Callable[..., Any] = _ADOPT
) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Decorator: the function says why a module of exactly class ``cls`` cannot be converted, or None if it can.

    Args:
        cls: the class, matched exactly.
        convert: makes the module active in place, as :meth:`ACUConv2d.adopt` does (the default: for subclasses of
            ``nn.Conv2d`` that compute what it does).
    """

    def decorate(why_not: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        _RULES[cls] = Rule(why_not, convert)
        return why_not

    return decorate


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for the exact type of ``module``."""
    return _RULES.get(type(module))


def is_conv2d(module: nn.Module) -> bool:
    """True for everything that a report should account for as a 2-D convolution, of whatever class."""
    if isinstance(module, nn.Conv2d):
        return True
    # Such as CondConv2d, which is no nn.Conv2d. (A SeparableConv2d is a block of two, found inside it.)
    kinds = {"kernel_size": tuple, "in_channels": int, "out_channels": int}
    return type(module).__name__.endswith("Conv2d") and all(
        isinstance(getattr(module, name, None), kind) for name, kind in kinds.items()
    )


def named_conv2ds(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every 2-D convolution of ``model`` with its qualified names, in order; a shared module has several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_conv2d(module):
            names.setdefault(module, []).append(name)
    return names


def why_not_convertible(module: nn.Module) -> str | None:
    """The reason why no rule can convert ``module``, whatever the user asks for; None if one can."""
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized; remove the parametrization first"
    rule = find_rule(module)
    if rule is None:
        return f"no rule for the class {type(module).__name__}"
    return rule.why_not(module)


def _adoptable(conv: nn.Module) -> str | None:
    """What an adopted convolution needs of its parameters, whatever its class computes from them."""
    if (name := recomputed_parameter(conv)) is not None:
        return (
            f"its {name} is recomputed from other parameters (weight norm, spectral norm, pruning); remove that first"
        )
    weight = conv.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its parameters are not initialised yet; run one batch first"
    if not weight.is_floating_point():  # type: ignore[operator]
        return f"its weight is {weight.dtype}, not real floating point"
    return None


@register_rule(nn.Conv2d)
def _conv2d(conv: nn.Conv2d) -> str | None:
    """nn.Conv2d: any kernel size, stride, dilation, groups and padding."""
    return _adoptable(conv)


@register_rule(Conv2dSame, ACUConv2dSame.adopt)
def _conv2d_same(conv: Conv2dSame) -> str | None:
    """Timm's Conv2dSame: TensorFlow's "SAME" padding, by the size of the image."""
    return _adoptable(conv)


@register_rule(StdConv2d, ACUStdConv2d.adopt)
def _std_conv2d(conv: StdConv2d) -> str | None:
    """Timm's StdConv2d: the weight is standardised in the forward pass."""
    return _adoptable(conv)


@register_rule(StdConv2dSame, ACUStdConv2dSame.adopt)
def _std_conv2d_same(conv: StdConv2dSame) -> str | None:
    """Timm's StdConv2dSame: both."""
    return _adoptable(conv)


@register_rule(ScaledStdConv2d, ACUScaledStdConv2d.adopt)
def _scaled_std_conv2d(conv: ScaledStdConv2d) -> str | None:
    """Timm's ScaledStdConv2d, of the NFNets: standardised, then scaled by a learned gain."""
    return _adoptable(conv)


@register_rule(ScaledStdConv2dSame, ACUScaledStdConv2dSame.adopt)
def _scaled_std_conv2d_same(conv: ScaledStdConv2dSame) -> str | None:
    """Timm's ScaledStdConv2dSame: that, with "SAME" padding."""
    return _adoptable(conv)


@register_rule(CondConv2d)
def _cond_conv2d(conv: CondConv2d) -> str | None:
    """Timm's CondConv2d: never."""
    return "its kernel is mixed anew for every image from several experts, which positions shared by all do not fit"
