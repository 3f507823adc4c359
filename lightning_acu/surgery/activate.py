"""Convert given convolutions, all or none, and guard the methods of the model that would lose their positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..ops import check_backend
from ..plain import PositionGroups, number_of_position_groups
from .checks import check_model
from .guards import guard_merging
from .marks import SKIP_REASON
from .rules import find_rule, named_conv2ds, why_not_convertible
from .transformers_guards import guard_transformers

__all__ = ["Activation", "activate"]


@dataclass(frozen=True)
class Activation:
    """How one convolution is converted.

    Args:
        position_groups, fixed_centre, backend: as in :class:`lightning_acu.ACUConv2d`.
    """

    position_groups: PositionGroups = 1
    fixed_centre: bool = True
    backend: str = "auto"


def activate(model: nn.Module, layers: Mapping[nn.Module, Activation]) -> nn.Module:
    """Convert exactly the convolutions that are the keys of ``layers``, in place; the outputs stay the same.

    :func:`lightning_acu.convert_to_acu` chooses the layers and calls this.

    Args:
        model: any module that contains them.
        layers: from each convolution to how it is converted.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: a layer that is not in ``model`` or cannot be converted, ``position_groups`` that do not fit it
            (see :class:`lightning_acu.ACUConv2d`), or an unknown backend. Nothing has been converted then.
    """
    check_model(model)
    names = named_conv2ds(model)
    rules = {}
    for conv, how in layers.items():
        if conv not in names:
            raise ValueError(f"`layers` has a {type(conv).__name__} that is not a 2-D convolution in `model`")
        name = names[conv][0] or "the model"
        rule, why = find_rule(conv), why_not_convertible(conv)
        if rule is None or why is not None:
            raise ValueError(f"{name} cannot be converted: {why}")
        try:
            number_of_position_groups(how.position_groups, conv, name)
        except ValueError as error:
            raise ValueError(f"{error}; or exclude it") from error
        check_backend(how.backend)
        rules[conv] = rule
    for conv, how in layers.items():
        vars(conv).pop(SKIP_REASON, None)  # from an earlier conversion of fewer layers
        rules[conv].convert(
            conv, position_groups=how.position_groups, fixed_centre=how.fixed_centre, backend=how.backend
        )
    guard_merging(model)
    guard_transformers(model)
    return model
