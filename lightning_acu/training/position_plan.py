"""When positions learn and when they are rounded, in steps of one optimizer; and what can be trained at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from ..checks import at_least, require_module, whole_number
from ..conv import ACUConv2d
from .averages import trained_layers
from .gradients import confine_positions_
from .param_groups import is_position_group
from .schedules import Schedule, find_schedule

__all__ = ["LearningPhase", "PositionPlan", "check_model", "check_schedulers"]


@dataclass(frozen=True)
class LearningPhase:
    """The steps in which positions learn: ``length`` steps from ``start`` on; inf if not known."""

    start: float
    length: float

    def time(self, step: float) -> int:
        """Steps since the start of the phase, 0 to ``length``."""
        return int(min(max(step - self.start, 0), self.length))


@dataclass(frozen=True)
class PositionPlan:
    """The steps of a training of positions.

    Attributes:
        phase: the steps in which positions learn.
        round_at: the number of steps after which they are rounded; None for never.
        schedule: of their learning rate, over the phase.
    """

    phase: LearningPhase
    round_at: int | None
    schedule: Schedule

    @classmethod
    def make(
        cls, schedule: str | Schedule, warmup_steps: int, total_steps: int | None, round_at: float | None
    ) -> PositionPlan:
        """From the arguments of :class:`~lightning_acu.training.PositionTrainer`, checked.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: one out of range, or missing.
        """
        schedule = find_schedule("schedule", schedule)
        start = whole_number("warmup_steps", warmup_steps)
        if total_steps is not None:
            total_steps = whole_number("total_steps", total_steps, 1)
            if total_steps <= start:
                raise ValueError(
                    f"`total_steps` (={total_steps}) is not more than `warmup_steps` (={start}), so positions would "
                    "never move; train longer or shorten the warm-up"
                )
        step = None if round_at is None else _rounding_step(round_at, total_steps)
        if step is not None and step <= start:
            raise ValueError(
                f"`round_at` (={round_at}) is step {step}, not after the warm-up (`warmup_steps`={start}), so "
                "positions would be rounded before they moved; round later or shorten the warm-up"
            )
        end = total_steps if step is None else step
        if end is None and schedule.needs_total:
            raise ValueError(
                f"`schedule` (={schedule}) needs a training with a known end; give `total_steps` or `round_at`"
            )
        return cls(LearningPhase(start, math.inf if end is None else end - start), step, schedule)

    def factor(self, step: int) -> float:
        """The factor of the schedule on the learning rate at ``step``."""
        return self.schedule.rate(self.phase.time(step), self.phase.length)

    def confine(
        self, layers: Sequence[ACUConv2d], before: int, after: int, max_displacement: float | None = None
    ) -> None:
        """Move taps that learn back inside their limit, and towards where the schedule pulls them.

        Args:
            layers: the layers whose positions were stepped.
            before: the number of steps before the step, or several, that were just taken.
            after: the number of steps now.
            max_displacement: maximum distance in pixels of a tap from where it started; None for no limit.
        """
        pull = self.schedule.pull(self.phase.time(before), self.phase.time(after), self.phase.length)
        if pull > 0 or max_displacement is not None:
            learning = [layer for layer in layers if layer.offsets.requires_grad]
            confine_positions_(learning, pull, max_displacement, self.schedule.pull_to)


def check_model(model: Any) -> None:
    """Check that ``model`` has positions that can be trained.

    Raises:
        TypeError: it is not a module.
        ValueError: it has none, or all are frozen.
    """
    require_module(model)
    layers = trained_layers(model)
    if not layers:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no active convolutions; "
            "call lightning_acu.convert_to_acu(model) first"
        )
    if not any(layer.offsets.requires_grad for _, layer in layers):
        raise ValueError(
            "the positions of all layers of `model` have requires_grad=False; unfreeze some with "
            "layer.offsets.requires_grad_(True), see lightning_acu.acu_layers"
        )


def check_schedulers(optimizer: Optimizer, schedulers: Sequence[Any] | None) -> None:
    """Check that the schedulers of ``optimizer`` are known: their lists have an entry for each parameter group.

    Raises:
        TypeError: ``schedulers`` is not a list.
        ValueError: one of ``schedulers`` is that of another optimizer.
        RuntimeError: a scheduler was made and ``schedulers`` is None.
    """
    if schedulers is not None and not isinstance(schedulers, (list, tuple)):
        raise TypeError(
            f"`schedulers` must be a list of schedulers, got {type(schedulers).__name__}; write [scheduler]"
        )
    for scheduler in schedulers or ():
        if getattr(scheduler, "optimizer", None) is not optimizer:
            raise ValueError(f"`schedulers`: {type(scheduler).__name__} is not a scheduler of `optimizer`")
    groups = (group for group in optimizer.param_groups if not is_position_group(group))
    if schedulers is None and any("initial_lr" in group for group in groups):
        raise RuntimeError(
            f"`optimizer` ({type(optimizer).__name__}) has a scheduler already, which does not know the new parameter "
            "group; make it after the PositionTrainer, or give it in `schedulers` (a list; [] if it is used no longer)"
        )


def _rounding_step(round_at: Any, total_steps: int | None) -> int:
    at_least("round_at", round_at)
    if not isinstance(round_at, float):
        step = whole_number("round_at", round_at, 1)
        if total_steps is not None and step > total_steps:
            raise ValueError(f"`round_at` (={round_at}) is after the training ends, `total_steps` (={total_steps})")
        return step
    if not 0 < round_at <= 1:
        raise ValueError(f"`round_at` (={round_at}) must be a step (an int) or a fraction above 0 and up to 1.0")
    if total_steps is None:
        raise ValueError(f"`round_at` (={round_at}) is a fraction of `total_steps`; give that, or a step (an int)")
    return math.ceil(round_at * total_steps)
