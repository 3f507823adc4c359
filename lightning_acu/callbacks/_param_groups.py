"""Positions in a parameter group of their own, in optimizers and under schedulers that are already there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["GROUP_NAME", "split_off_positions", "tie_learning_rates"]

#: The name of the new group, for LearningRateMonitor and for people.
GROUP_NAME = "acu_positions"

#: In the new group: the index of the group its parameters came from, whose learning rate it follows.
_SOURCE = "acu_source"

#: What torch's schedulers keep for each parameter group: to extend by a scaled entry, or by a copy.
_SCALED = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_COPIED = ("lr_lambdas", "base_momentums", "max_momentums")

#: Learning rates that schedulers keep inside a parameter group.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def split_off_positions(
    optimizer: Optimizer,
    schedulers: Iterable[Any],
    offsets: Iterable[nn.Parameter],
    multiplier: float,
    weight_decay: float,
) -> list[nn.Parameter]:
    """Move those ``offsets`` that ``optimizer`` holds into groups of their own, one for each group they were in.

    The new group has the old one's settings, ``multiplier`` times its learning rate, and ``weight_decay``. The lists
    that ``schedulers`` keep of the groups are extended to match: 6 of 14 torch schedulers fail otherwise.

    Returns:
        The offsets that were found.
    """
    wanted = {id(parameter) for parameter in offsets}
    found: list[nn.Parameter] = []
    schedulers = [inner for scheduler in schedulers for inner in _walk(scheduler)]
    for source in range(len(optimizer.param_groups)):
        group = optimizer.param_groups[source]
        mine = [parameter for parameter in group["params"] if id(parameter) in wanted]
        if not mine:
            continue
        found += mine
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
        name = GROUP_NAME if len(found) == len(mine) else f"{GROUP_NAME}_of_group_{source}"
        new.update(weight_decay=weight_decay, name=name, **{_SOURCE: source})
        optimizer.add_param_group(new)
        for scheduler in schedulers:
            _extend(scheduler, source, multiplier)
    return found


def tie_learning_rates(optimizer: Optimizer, multiplier: float) -> None:
    """Set the learning rate of positions to ``multiplier`` times that of the group they came from.

    Schedulers with absolute rates (OneCycle, Cyclic, cosine with a floor) would lose the ratio.
    """
    for group in optimizer.param_groups:
        if _SOURCE in group:
            group["lr"] = optimizer.param_groups[group[_SOURCE]]["lr"] * multiplier


def _walk(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those it is made of (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from _walk(inner)


def _extend(scheduler: Any, source: int, multiplier: float) -> None:
    for name in _SCALED:
        if isinstance(values := getattr(scheduler, name, None), list):
            values.append(values[source] * multiplier)
    for name in _COPIED:
        if isinstance(values := getattr(scheduler, name, None), list):
            values.append(values[source])
