"""State dicts of a plain model into a converted one and the other way round: what fits loads, the rest is explained."""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..conv import ACUConv2d
from .guards import guard_merging
from .marks import was_folded
from .rules import find_rule, named_conv2ds, why_not_convertible

__all__ = ["convert_like", "explain_loading", "load_state_dict"]

_SUFFIX = "offsets"


def load_state_dict(
    load: Callable[..., Any], model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """``load(state_dict, strict, assign)``, where ``load`` is ``model``'s own method, for models that surgery touched.

    A plain model's state_dict loads into a converted one whose positions have not moved: it then computes what the
    plain one does. With ``strict=False`` everything is as in torch, and the result lists what is missing.

    Raises:
        RuntimeError: with ``strict``, a plain model's state_dict where positions have moved, or positions for layers
            that are plain here; nothing has been loaded then. What else torch raises.

    Warns:
        UserWarning: with ``strict``, which positions the state_dict does not have.
    """
    names = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, ACUConv2d)}
    missing = {k: m for n, m in names.items() if (k := _key(n, _SUFFIX)) not in state_dict}
    missing = {k: m for k, m in missing.items() if k.removesuffix(_SUFFIX) + "weight" in state_dict}
    own = {name for name, _ in model.named_modules(remove_duplicate=False)}
    stray = [k for k in _position_keys(state_dict) if k.rpartition(".")[0] in own - names.keys()]
    if not strict or not (missing or stray):
        return load(state_dict, strict=strict, assign=assign)
    if stray:
        folded = any(map(was_folded, model.modules()))
        raise RuntimeError(
            f"`state_dict` has positions for {_few(stray)}, which are plain convolutions here. "
            + (
                "This model was folded: load into a converted one, and fold that"
                if folded
                else "Convert this model in the same way first (convert_to_acu, or surgery.convert_like)"
            )
        )
    moved = [key for key, layer in missing.items() if not layer.offsets.is_meta and bool(layer.displacement.any())]
    if moved:
        raise RuntimeError(
            f"`state_dict` is of a plain model: it has no {_few(moved)}, and the positions here have moved. Load it "
            "before they do, or with strict=False, which leaves them where they are"
        )
    complete = OrderedDict(state_dict)
    for key, layer in missing.items():
        offsets = layer.offsets.detach()
        if offsets.is_meta:  # nothing there yet
            start = torch.zeros(1, 2) if layer.start is None else torch.tensor(layer.start)
            offsets = start.to(offsets.dtype).expand(layer.position_groups, layer.geometry.taps, 2).flatten()
        complete[key] = offsets
    if hasattr(state_dict, "_metadata"):
        complete._metadata = state_dict._metadata  # type: ignore[attr-defined]
    result = load(complete, strict=True, assign=assign)
    warnings.warn(
        f"loaded the state_dict of a plain model: it has no {_few(list(missing))}; those taps stay on their grid",
        UserWarning,
        stacklevel=3,
    )
    return result


def explain_loading(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` be :func:`load_state_dict` where the class has torch's own."""
    if type(model).load_state_dict is nn.Module.load_state_dict:
        # In the instance; a partial can be copied and pickled with the model.
        vars(model)["load_state_dict"] = functools.partial(_load, model)


def convert_like(
    model: nn.Module, state_dict: Mapping[str, Any], *, fixed_centre: bool | None = None, backend: str = "auto"
) -> nn.Module:
    """Make active, in place, exactly those convolutions for which ``state_dict`` has positions; load nothing yet.

    For checkpoints of models that were converted in a way that is not known any more (by a callback).

    Args:
        model: plain, or converted in part.
        state_dict: of a converted one.
        fixed_centre: as it was in the conversion. None: fixed in layers whose state_dict has a centre of zeros, as
            training leaves a fixed one.
        backend: of the new layers.

    Raises:
        ValueError: positions for something that is not in ``model`` or cannot be converted; nothing is converted then.
    """
    names = {name: conv for conv, aliases in named_conv2ds(model).items() for name in aliases}
    chosen: dict[nn.Module, tuple[int, bool]] = {}
    for key in _position_keys(state_dict):
        name = key.rpartition(".")[0]
        if (conv := names.get(name)) is None:
            raise ValueError(f"`state_dict` has {key!r}, but {type(model).__name__} has no convolution {name!r}")
        if isinstance(conv, ACUConv2d):
            continue
        if (why := why_not_convertible(conv)) is not None:
            raise ValueError(f"`state_dict` has {key!r}, but {name!r} cannot be converted: {why}")
        taps = conv.kernel_size[0] * conv.kernel_size[1]  # type: ignore[index,operator]
        groups, rest = divmod(state_dict[key].numel(), 2 * taps)
        if rest or groups < 1 or conv.out_channels % groups:  # type: ignore[operator]
            raise ValueError(
                f"`state_dict` has {state_dict[key].numel()} numbers in {key!r}, which {name!r} cannot have"
            )
        centre = state_dict[key].reshape(groups, taps, 2)[:, taps // 2]
        chosen[conv] = groups, not bool(centre.any()) if fixed_centre is None else fixed_centre
    for conv, (groups, fixed) in chosen.items():
        rule = find_rule(conv)
        assert rule is not None
        rule.convert(conv, position_groups=groups, fixed_centre=fixed, backend=backend)
    guard_merging(model)
    explain_loading(model)
    return model


def _load(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
    return load_state_dict(
        functools.partial(type(model).load_state_dict, model), model, state_dict, strict=strict, assign=assign
    )


def _key(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if name else parameter


def _position_keys(state_dict: Mapping[str, Any]) -> list[str]:
    """The keys of positions: 1-D "offsets" beside a 4-D "weight"."""
    found = []
    for key, value in state_dict.items():
        weight = state_dict.get(key.removesuffix(_SUFFIX) + "weight")
        is_positions = key.rpartition(".")[2] == _SUFFIX and isinstance(value, Tensor) and value.ndim == 1
        if is_positions and isinstance(weight, Tensor) and weight.ndim == 4:
            found.append(key)
    return found


def _few(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
