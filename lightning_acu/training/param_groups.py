"""A parameter group for positions in an existing optimizer, under existing schedulers; and learning rates.

The learning rate of positions is tied to that of the weights; that of the weights can be restarted for fine-tuning.
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
    "source_group",
    "split_off_positions",
    "tie_learning_rates",
]

#: The name of the new group, as LearningRateMonitor shows it.
GROUP_NAME = "acu_positions"

#: A key of the new group: the index of the group its parameters came from, whose learning rate it is tied to.
_SOURCE = "acu_source"

#: Lists that schedulers of torch and of timm (base_values) keep with an entry for each parameter group. The entry of
#: a new group is the scaled or copied one of its source.
_SCALED = ("base_lrs", "_last_lr", "max_lrs", "min_lrs", "base_values")
_COPIED = ("lr_lambdas", "base_momentums", "max_momentums")

#: Learning rates that schedulers keep in a parameter group.
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

    A new group has the settings of the old one, ``multiplier`` times its learning rate, and ``weight_decay``. The
    lists that ``schedulers`` keep of the groups are extended to match: 6 of 14 torch schedulers fail otherwise.

    Groups that were split off before stay as they are, so that this can be called again after parameters were added
    (as BackboneFinetuning does).

    New groups are appended, so that no other group's index changes; with ``keep_last`` they are inserted next to their
    source, so that the first and the last group stay first and last.

    Args:
        optimizer: the optimizer whose groups to split.
        schedulers: its learning rate schedulers, of torch or of timm.
        offsets: the ``offsets`` of active convolutions; those that ``optimizer`` does not hold are ignored.
        multiplier: learning rate of positions over that of the group they came from.
        weight_decay: for positions; it pulls the taps back to the regular grid.
        keep_last: insert new groups next to their source instead of at the end.

    Returns:
        The offsets that ``optimizer`` holds.

    Raises:
        RuntimeError: the optimizer has no learning rate (Adafactor with lr=None), or is torch's
            ZeroRedundancyOptimizer.
    """
    ids = {id(parameter) for parameter in offsets}
    held: list[nn.Parameter] = []
    schedulers = [inner for scheduler in schedulers for inner in _walk(scheduler)]
    group_names = {group.get("name") for group in optimizer.param_groups}
    groups = optimizer.param_groups
    for group in list(groups):
        positions = [parameter for parameter in group["params"] if id(parameter) in ids]
        held += positions
        if not positions or is_position_group(group):
            continue
        # It gives its groups to an optimizer of its own on each process, whose groups cannot be split any more.
        if any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__):
            raise RuntimeError(
                f"{type(optimizer).__name__} cannot have a parameter group of positions added: it has shared out its "
                "parameters over the processes already; choose another optimizer, or shard the model by fully_shard"
            )
        if group["lr"] is None:
            raise RuntimeError(
                f"{type(optimizer).__name__} has no learning rate (lr=None) to set that of positions from; give it one "
                "or choose another optimizer"
            )
        source = next(index for index, other in enumerate(groups) if other is group)
        new = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        if "param_names" in group:
            names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
            group["param_names"] = [name for key, name in names.items() if key not in ids]
            new["params"] = [(names[id(parameter)], parameter) for parameter in positions]
        else:
            new["params"] = positions
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        new.update({key: new[key] * multiplier for key in _GROUP_RATES if key in new})
        # LearningRateMonitor needs different names.
        name = f"{GROUP_NAME}_of_group_{source}" if GROUP_NAME in group_names else GROUP_NAME
        group_names.add(name)
        new.update(weight_decay=weight_decay, name=name, **{_SOURCE: source})
        index = max(1, source) if keep_last else len(groups)
        for scheduler in schedulers:
            _extend(scheduler, source, index, len(groups), multiplier)
        optimizer.add_param_group(new)
        groups.insert(index, groups.pop())
        for other in groups:
            if is_position_group(other) and other[_SOURCE] >= index:
                other[_SOURCE] += 1
    return held


def add_late_positions(optimizers: Iterable[Optimizer], layers: Iterable[tuple[str, ACUConv2d]]) -> list[str]:
    """Add the offsets of ``layers`` that no optimizer holds to the group that holds the layer's weight.

    For optimizers made before the conversion: LightningCLI makes that of ``--optimizer`` before any hook runs.

    Args:
        optimizers: the optimizers of the model.
        layers: (name, layer), as :func:`~lightning_acu.training.trained_layers` finds them.

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


def source_group(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The group of ``optimizer`` that the positions in ``group``, a group of positions, came from."""
    source: dict[str, Any] = optimizer.param_groups[group[_SOURCE]]
    return source


def tie_learning_rates(optimizer: Optimizer, multiplier: float) -> None:
    """Set the learning rate of positions to ``multiplier`` times that of the group they came from.

    Call it before each step: schedulers with absolute rates (OneCycle, Cyclic, cosine with a floor) change the ratio.
    """
    for group in optimizer.param_groups:
        if is_position_group(group):
            set_learning_rate(group, source_group(optimizer, group)["lr"] * multiplier)


def set_learning_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set the learning rate of ``group``; in place if it is a tensor, as CUDA graphs and compiled steps refer to it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_ratios(optimizer: Optimizer) -> list[float]:
    """The learning rate of each parameter group divided by the highest; for :func:`restart_rates`.

    It is 0 for groups of positions; if all learning rates are 0, all ratios are 1.
    """
    rates = [0.0 if is_position_group(group) else float(group["lr"]) for group in optimizer.param_groups]
    return [rate / max(rates) if max(rates) > 0 else 1.0 for rate in rates]


def restart_rates(optimizers: Sequence[Optimizer], ratios: Sequence[Sequence[float]], rate: float) -> None:
    """Set every group's learning rate to ``rate`` times its ratio, overriding schedulers.

    Groups of positions are not changed (see :func:`tie_learning_rates`), nor are groups that were added after the
    ratios were computed (BackboneFinetuning adds some).

    Args:
        optimizers: the optimizers whose learning rates to set.
        ratios: for each optimizer, the :func:`rate_ratios` from when fine-tuning began.
        rate: the learning rate of the groups whose ratio is 1.
    """
    for optimizer, of_groups in zip(optimizers, ratios, strict=True):
        for group, ratio in zip(optimizer.param_groups, of_groups, strict=False):
            if not is_position_group(group):
                set_learning_rate(group, rate * ratio)


def _walk(scheduler: Any) -> Iterator[Any]:
    """A scheduler and those it consists of (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", []):
        yield from _walk(inner)


def _extend(scheduler: Any, source: int, index: int, groups: int, multiplier: float) -> None:
    for name in (*_SCALED, *_COPIED):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == groups:  # otherwise it has no entry for each group
            values.insert(index, values[source] * multiplier if name in _SCALED else values[source])
