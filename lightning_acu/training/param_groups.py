"""Parameter groups in optimizers and under schedulers that are already there: one of their own for positions.

And learning rates: of positions, tied to those of the weights; of the weights, restarted for fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..conv import ACUConv2d

__all__ = [
    "GROUP_NAME",
    "add_late_positions",
    "is_position_group",
    "parameter_ids",
    "rate_ratios",
    "restart_rates",
    "set_learning_rate",
    "split_off_positions",
    "tie_learning_rates",
]

#: The name of the new group, for LearningRateMonitor and for people.
GROUP_NAME = "acu_positions"

#: In the new group: the index of the group its parameters came from, whose learning rate it follows.
_SOURCE = "acu_source"

#: What schedulers of torch, and of timm (base_values), keep for each parameter group: to extend by a scaled entry, or
#: by a copy.
_SCALED = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "base_values")
_COPIED = ("lr_lambdas", "base_momentums", "max_momentums")

#: Learning rates that schedulers keep inside a parameter group.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def split_off_positions(
    optimizer: Optimizer,
    schedulers: Iterable[Any],
    offsets: Iterable[nn.Parameter],
    multiplier: float,
    weight_decay: float,
    keep_last: bool = False,
) -> list[nn.Parameter]:
    """Move those ``offsets`` that ``optimizer`` holds into groups of their own, one for each group they were in.

    The new group has the old one's settings, ``multiplier`` times its learning rate, and ``weight_decay``. The lists
    that ``schedulers`` keep of the groups are extended to match: 6 of 14 torch schedulers fail otherwise.

    Groups that were split off before stay as they are, so that this can be asked again when a callback has added
    parameters later (as BackboneFinetuning does).

    New groups go to the end, where they change no other's index; with ``keep_last`` beside the one they come from, so
    that the first and the last group stay first and last.

    Args:
        optimizer: whose groups to split.
        schedulers: its learning rate schedulers, of torch or of timm.
        offsets: the ``offsets`` of active convolutions; those that ``optimizer`` does not hold play no part.
        multiplier: learning rate of positions over that of the group they came from.
        weight_decay: for positions; it pulls the taps back to the regular grid.
        keep_last: put new groups beside their source instead of at the end.

    Returns:
        The offsets that ``optimizer`` holds.

    Raises:
        RuntimeError: the optimizer has no learning rate to take a share of.
    """
    wanted = {id(parameter) for parameter in offsets}
    found: list[nn.Parameter] = []
    schedulers = [inner for scheduler in schedulers for inner in _walk(scheduler)]
    names_taken = {group.get("name") for group in optimizer.param_groups}
    groups = optimizer.param_groups
    for group in list(groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in wanted]
        found += mine
        if not mine or is_position_group(group):
            continue
        if group["lr"] is None:
            raise RuntimeError(
                f"{type(optimizer).__name__} has no learning rate (lr=None) that positions could have a share of; "
                "choose an optimizer that has one"
            )
        source = next(index for index, other in enumerate(groups) if other is group)
        new = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if "param_names" in group:
            names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
            group["param_names"] = [name for key, name in names.items() if key not in wanted]
            new["params"] = [(names[id(parameter)], parameter) for parameter in mine]
        else:
            new["params"] = mine
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in wanted]
        new.update({key: new[key] * multiplier for key in _GROUP_RATES if key in new})
        # LearningRateMonitor wants names that differ.
        name = f"{GROUP_NAME}_of_group_{source}" if GROUP_NAME in names_taken else GROUP_NAME
        names_taken.add(name)
        new.update(weight_decay=weight_decay, name=name, **{_SOURCE: source})
        place = max(1, source) if keep_last else len(groups)
        for scheduler in schedulers:
            _extend(scheduler, source, place, len(groups), multiplier)
        optimizer.add_param_group(new)
        groups.insert(place, groups.pop())
        for other in groups:
            if is_position_group(other) and other[_SOURCE] >= place:
                other[_SOURCE] += 1
    return found


def add_late_positions(optimizers: Iterable[Optimizer], layers: Iterable[tuple[str, ACUConv2d]]) -> list[str]:
    """Put the offsets of ``layers`` that no optimizer holds into the group that holds the layer's weight.

    For optimizers made before the conversion: LightningCLI makes those of ``--optimizer`` before any hook runs.

    Returns:
        The names of the layers whose offsets were added.
    """
    groups = {id(parameter): group for o in optimizers for group in o.param_groups for parameter in group["params"]}
    added = []
    for name, layer in layers:
        group = groups.get(id(layer.weight))
        if group is None or id(layer.offsets) in groups:
            continue
        group["params"].append(layer.offsets)
        if "param_names" in group:
            group["param_names"].append(f"{name}.offsets" if name else "offsets")
        added.append(name)
    return added


def parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """The ids of all parameters that ``optimizers`` hold."""
    return {id(parameter) for o in optimizers for group in o.param_groups for parameter in group["params"]}


def is_position_group(group: dict[str, Any]) -> bool:
    """Whether :func:`split_off_positions` made this parameter group."""
    return _SOURCE in group


def tie_learning_rates(optimizer: Optimizer, multiplier: float) -> None:
    """Set the learning rate of positions to ``multiplier`` times that of the group they came from.

    Schedulers with absolute rates (OneCycle, Cyclic, cosine with a floor) would lose the ratio.
    """
    for group in optimizer.param_groups:
        if is_position_group(group):
            set_learning_rate(group, optimizer.param_groups[group[_SOURCE]]["lr"] * multiplier)


def set_learning_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """As torch's schedulers do: in place where it is a tensor, which a CUDA graph or a compiled step has noted."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_ratios(optimizer: Optimizer) -> list[float]:
    """The learning rate of each parameter group over that of the highest; all 1 where all are zero."""
    rates = [0.0 if is_position_group(group) else float(group["lr"]) for group in optimizer.param_groups]
    return [rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates]


def restart_rates(optimizers: Sequence[Optimizer], ratios: Sequence[Sequence[float]], rate: float) -> None:
    """Set every group's learning rate to ``rate`` times its ratio, in place of what a scheduler says.

    Groups of positions follow their source by themselves. Groups that came after the ratios were taken
    (BackboneFinetuning adds some) keep the rate that whoever added them gives them.

    Args:
        optimizers: whose rates to set.
        ratios: for each optimizer, what :func:`rate_ratios` said when fine-tuning began.
        rate: of the group with the highest ratio.
    """
    for optimizer, shares in zip(optimizers, ratios, strict=True):
        for group, share in zip(optimizer.param_groups, shares, strict=False):
            if not is_position_group(group):
                set_learning_rate(group, rate * share)


def _walk(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those it is made of (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from _walk(inner)


def _extend(scheduler: Any, source: int, place: int, groups: int, multiplier: float) -> None:
    for name in (*_SCALED, *_COPIED):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == groups:  # else it is no list of groups
            values.insert(place, values[source] * multiplier if name in _SCALED else values[source])
