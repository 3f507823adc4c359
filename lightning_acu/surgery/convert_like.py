"""Convert a model as the one was whose state_dict is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..checks import qualified_name
from ..conv import ACUConv2d
from .activate import Activation, activate
from .rules import named_conv2ds, why_not_convertible

__all__ = ["convert_like"]


def convert_like(
    model: nn.Module, state_dict: Mapping[str, Any], *, fixed_centre: bool | None = None, backend: str = "auto"
) -> nn.Module:
    """Convert, in place, exactly those convolutions for which ``state_dict`` has positions; nothing is loaded yet.

    For checkpoints of models whose conversion is not known any more (because a callback converted them).

    Args:
        model: a plain or partly converted model.
        state_dict: that of a converted one.
        fixed_centre: as in the conversion. None: the centre is fixed in layers whose state_dict has zeros there, as
            training leaves a fixed one.
        backend: the backend of the new layers.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: ``state_dict`` has positions for something that is not in ``model`` or cannot be converted.
            Nothing has been converted then.
    """
    convs = {name: conv for conv, aliases in named_conv2ds(model).items() for name in aliases}
    layers: dict[nn.Module, Activation] = {}
    for name, offsets in _positions(state_dict).items():
        key = qualified_name(name, "offsets")
        if (conv := convs.get(name)) is None:
            raise ValueError(f"`state_dict` has {key!r}, but {type(model).__name__} has no convolution {name!r}")
        if isinstance(conv, ACUConv2d):
            continue
        if (why := why_not_convertible(conv)) is not None:
            raise ValueError(f"`state_dict` has {key!r}, but {name!r} cannot be converted: {why}")
        taps: int = conv.kernel_size[0] * conv.kernel_size[1]  # type: ignore[index,operator,assignment]
        groups, rest = divmod(offsets.numel(), 2 * taps)
        if rest or groups < 1 or conv.out_channels % groups:  # type: ignore[operator]
            raise ValueError(f"`state_dict` has {offsets.numel()} numbers in {key!r}, which do not fit {name!r}")
        centre = offsets.reshape(groups, taps, 2)[:, taps // 2]
        fixed = not bool(centre.any()) if fixed_centre is None else fixed_centre
        layers[conv] = Activation(groups, fixed, backend)
    return activate(model, layers)


def _positions(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """From names of layers to their positions: a 1-D "offsets" beside a 4-D "weight"."""
    found = {}
    for key, value in state_dict.items():
        name, _, parameter = key.rpartition(".")
        if parameter != "offsets" or not isinstance(value, Tensor) or value.ndim != 1:
            continue
        weight = state_dict.get(qualified_name(name, "weight"))
        if isinstance(weight, Tensor) and weight.ndim == 4:
            found[name] = value
    return found
