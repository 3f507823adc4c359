"""The attributes of a plain convolution, and checks that an active one can take its place."""

from __future__ import annotations

import operator
from typing import Any, Literal

from torch import nn

__all__ = [
    "CONFIGURATION",
    "PositionGroups",
    "check_own_parameters",
    "check_plain",
    "number_of_position_groups",
    "recomputed_parameter",
]

#: Sets of positions of a layer: a number, or "channels", one for each input channel of a depthwise layer.
PositionGroups = int | Literal["channels"]

#: The attributes of a convolution besides its parameters: those of nn.Conv2d, and of timm's classes.
CONFIGURATION = (
    frozenset(vars(nn.Conv2d(1, 1, 1, device="meta"))) - frozenset(vars(nn.Module())) - {"weight", "bias"}
) | {"eps", "gain_init", "same_pad", "scale"}


def check_plain(conv: nn.Module, plain_class: type[nn.Conv2d]) -> None:
    """Check that ``conv`` is of exactly the class ``plain_class``.

    Raises:
        TypeError: it is not; a subclass may compute something else.
    """
    if type(conv) is not plain_class:
        raise TypeError(
            f"`conv` (={type(conv).__name__}) must be exactly a {plain_class.__name__}: a subclass may compute "
            "something else; convert_to_acu knows which classes it can convert"
        )


def recomputed_parameter(conv: nn.Module) -> str | None:
    """The first of "weight", "bias" and "gain" that is computed from other parameters instead of being one, or None.

    Weight norm, spectral norm and pruning do that, in hooks or by parametrization.
    """
    return next((n for n in ("weight", "bias", "gain") if n not in conv._parameters and hasattr(conv, n)), None)


def check_own_parameters(conv: nn.Module) -> None:
    """Check that weight and bias are parameters of the layer itself.

    Raises:
        ValueError: one is recomputed from other parameters.
    """
    if (name := recomputed_parameter(conv)) is not None:
        raise ValueError(
            f"the {name} of this {type(conv).__name__} is recomputed from other parameters "
            "(weight norm, spectral norm or pruning); remove that first"
        )


def number_of_position_groups(position_groups: PositionGroups, conv: Any, name: str = "") -> int:
    """``position_groups`` as a number, for ``conv``, which has the attributes of an ``nn.Conv2d``.

    Raises:
        ValueError: it is neither "channels" nor a number that divides ``out_channels``, or it is "channels" and the
            convolution is not depthwise. The message has ``name``.
    """
    of = f" of {name}" if name else ""
    if position_groups == "channels":
        if conv.groups != conv.in_channels:
            raise ValueError(
                f"`position_groups` (='channels') needs a depthwise convolution: the `groups`{of} (={conv.groups}) "
                f"must equal its `in_channels` (={conv.in_channels}); give a number instead"
            )
        return int(conv.in_channels)
    try:
        number = operator.index(position_groups)
    except TypeError:
        number = 0
    if number < 1 or conv.out_channels % number:
        raise ValueError(
            f"`position_groups` (={position_groups!r}) must divide `out_channels`{of} (={conv.out_channels}), or be "
            "'channels'"
        )
    return number
