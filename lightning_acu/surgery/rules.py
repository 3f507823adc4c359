"""Which convolutions can be converted, and how: one rule for each class.

A rule is chosen by the exact type of a module. A subclass of ``nn.Conv2d`` without a rule is converted if it changes
nothing of what is computed (:mod:`lightning_acu.derived`). Any other class may compute something else (standardise its
weight, pad by the size of the input), so it is skipped, with that reason. To support it, write a rule and register it::

    @register_rule(MyConv2d)
    def my_conv2d(conv: nn.Module) -> str | None:
        return "a reason" if ... else None
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..conv import ACUConv2d
from ..derived import active_class, what_differs
from ..folded import FoldedConv2d, ReshapedConv2d
from ..plain import recomputed_parameter

__all__ = [
    "Rule",
    "find_rule",
    "is_conv2d",
    "named_conv2ds",
    "register_named_rule",
    "register_rule",
    "why_not_adoptable",
    "why_not_convertible",
]


@dataclass(frozen=True)
class Rule:
    """How convolutions of one class are converted.

    Attributes:
        why_not: from a module to the reason why it cannot be converted, or None.
        convert: converts the module in place; called with ``position_groups``, ``fixed_centre`` and ``backend``.
    """

    why_not: Callable[[nn.Module], str | None]
    convert: Callable[..., Any]


#: For subclasses of nn.Conv2d that compute the same.
_ADOPT = functools.partial(ACUConv2d.adopt, exact=False)

_RULES: dict[type[nn.Module], Rule] = {}

#: The same for classes that are not imported here, by (module, name).
_NAMED_RULES: dict[tuple[str, str], Rule] = {}


def register_rule(
    cls: type[nn.Module], convert: Callable[..., Any] = _ADOPT
) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Decorator for a function that returns why a module of exactly class ``cls`` cannot be converted, or None.

    Args:
        cls: the class, matched exactly.
        convert: converts the module in place. By default :meth:`ACUConv2d.adopt`, for subclasses of ``nn.Conv2d``
            that compute the same.
    """

    def decorate(why_not: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        _RULES[cls] = Rule(why_not, convert)
        return why_not

    return decorate


def register_named_rule(module: str, name: str, rule: Rule) -> None:
    """A rule for the class ``name`` of ``module``, which need not be installed."""
    _NAMED_RULES[module, name] = rule


def find_rule(module: nn.Module) -> Rule | None:
    """The rule for the exact type of ``module``, or that for subclasses which compute what ``nn.Conv2d`` does."""
    cls = ReshapedConv2d if isinstance(module, ReshapedConv2d) else type(module)
    rule = _RULES.get(cls) or _NAMED_RULES.get((cls.__module__, cls.__qualname__))
    if rule is None and isinstance(module, nn.Conv2d) and what_differs(module) is None:
        return _SAME_COMPUTATION
    return rule


def is_conv2d(module: nn.Module) -> bool:
    """Whether a report should list ``module`` as a 2-D convolution, of whatever class."""
    if isinstance(module, nn.Conv2d):
        return True
    if isinstance(module, FoldedConv2d):  # its summands are
        return False
    # Such as CondConv2d, which is not an nn.Conv2d. (A SeparableConv2d is a block; its two convolutions are found.)
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
    """The reason why ``module`` cannot be converted with any arguments; None if it can."""
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized; remove the parametrization first"
    if any(nn.parameter.is_lazy(parameter) for parameter in module._parameters.values() if parameter is not None):
        return "its parameters are not initialised yet; run one batch first"
    rule = find_rule(module)
    if rule is None:
        differs = f", which {what_differs(module)}" if isinstance(module, nn.Conv2d) else ""
        how = "; lightning_acu.surgery.register_rule adds one" if is_conv2d(module) else ""
        return f"no rule for the class {type(module).__name__}{differs}{how}"
    return rule.why_not(module)


def why_not_adoptable(conv: nn.Module) -> str | None:
    """The reason why :meth:`ACUConv2d.adopt` cannot use the parameters of ``conv``, or None; for rules."""
    if (name := recomputed_parameter(conv)) is not None:
        return (
            f"its {name} is recomputed from other parameters (weight norm, spectral norm, pruning); remove that first"
        )
    if not conv.weight.is_floating_point():  # type: ignore[operator]
        return f"its weight is {conv.weight.dtype}, not real floating point"
    return None


@register_rule(nn.Conv2d)
def _conv2d(conv: nn.Conv2d) -> str | None:
    """nn.Conv2d: any kernel size, stride, dilation, groups and padding."""
    return why_not_adoptable(conv)


def _adopt_inside(conv: ReshapedConv2d, **how: Any) -> None:
    ACUConv2d.adopt(conv.become_sum().convs[0], **how)  # type: ignore[arg-type]


@register_rule(ReshapedConv2d, _adopt_inside)
def _reshaped_conv2d(conv: ReshapedConv2d) -> str | None:
    """A fold that shows the geometry of before: what is inside becomes active, with the geometry of the fold."""
    return why_not_adoptable(conv)


def _adopt_subclass(conv: nn.Conv2d, **arguments: Any) -> ACUConv2d:
    return active_class(type(conv)).adopt(conv, **arguments)


#: For subclasses of nn.Conv2d that compute what it does.
_SAME_COMPUTATION = Rule(why_not_adoptable, _adopt_subclass)
