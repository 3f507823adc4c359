"""The length of a training in optimizer steps, the step at which positions are rounded, and whether they may learn now.

All callbacks of this package count the trainer's ``global_step``, as ``Trainer(max_steps=...)`` does: one for each step
of each optimizer. With gradient accumulation several batches make one step.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from ..checks import at_least, whole_number
from ..training import LearningPhase
from ._trainer import callbacks_of, is_fast_dev_run

__all__ = ["Length", "Moment", "PositionClock", "Warmup"]


@dataclass(frozen=True)
class Length:
    """What the trainer was told of the length of a training when it began, and that length in optimizer steps.

    Remembered because StochasticWeightAveraging changes both on its way: for a model with batch norm it adds an epoch,
    and in that one accumulates the gradients of all batches.
    """

    max_epochs: int | None = None
    accumulate_grad_batches: int = 1

    def epoch_steps(self, trainer: pl.Trainer, epochs: int = 1) -> float:
        """Optimizer steps in the first ``epochs`` epochs; inf if the loader has no length.

        With several optimizers (manual optimisation), each is assumed to step once a batch.
        """
        if not epochs:
            return 0
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
        if math.isinf(batches):
            return math.inf
        scheduled = [c for c in callbacks_of(trainer) if isinstance(c, GradientAccumulationScheduler)]
        if not scheduled:
            steps = math.ceil(batches / self.accumulate_grad_batches) * epochs
        else:
            steps = sum(math.ceil(batches / scheduled[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
        return steps * max(1, len(trainer.optimizers))

    def total_steps(self, trainer: pl.Trainer) -> float:
        """Optimizer steps of the whole training; inf if its end is not known."""
        steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
        if self.max_epochs is not None and self.max_epochs != -1:
            steps = min(steps, self.epoch_steps(trainer, max(1, self.max_epochs)))
        return steps


@dataclass(frozen=True)
class Moment:
    """A point in training: before step ``at_step``, at the start of ``at_epoch`` or after ``at_fraction`` of the steps.

    Raises:
        ValueError: not exactly one of the three is given, or it is out of range.
    """

    at_step: int | None = None
    at_epoch: int | None = None
    at_fraction: float | None = None

    def __post_init__(self) -> None:
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of `at_step`, `at_epoch` and `at_fraction`; got {chosen or 'none'}")
        ((name, value),) = chosen.items()
        if name != "at_fraction":
            object.__setattr__(self, name, whole_number(name, value, 1))
        elif not 0 < at_least(name, value) < 1:
            raise ValueError(f"`{name}` (={value}) must be between 0 and 1")

    def __str__(self) -> str:
        """The argument and its value, for messages."""
        return next(f"`{name}` (={value})" for name, value in asdict(self).items() if value is not None)

    def step(self, trainer: pl.Trainer, length: Length) -> float | None:
        """The optimizer step; None for ``at_epoch`` if the length of an epoch is not known.

        Raises:
            RuntimeError: ``at_fraction`` of a training whose end is not known.
        """
        if self.at_step is not None:
            return self.at_step
        if self.at_epoch is not None:
            steps = length.epoch_steps(trainer, self.at_epoch)
            return None if math.isinf(steps) else steps
        assert self.at_fraction is not None
        steps = length.total_steps(trainer)
        if math.isinf(steps):
            raise RuntimeError(
                f"RoundThenFinetune: {self} needs a training with a known end; set the trainer's max_steps (or "
                "max_epochs, if the loader has a length), or give `at_step` or `at_epoch`"
            )
        return math.ceil(self.at_fraction * steps)

    def has_come(self, trainer: pl.Trainer, length: Length) -> bool:
        """Whether it has been reached; call it before a step."""
        if self.at_epoch is not None:
            return trainer.current_epoch >= self.at_epoch
        step = self.step(trainer, length)
        return step is not None and trainer.global_step >= step


@dataclass(frozen=True)
class Warmup:
    """The first ``steps`` optimizer steps, or ``epochs`` epochs, in which positions do not move."""

    steps: int = 0
    epochs: int = 0

    def __str__(self) -> str:
        """The argument and its value, for messages."""
        return f"`warmup_epochs` (={self.epochs})" if self.epochs else f"`warmup_steps` (={self.steps})"

    def end(self, trainer: pl.Trainer, length: Length) -> float:
        """The step at which it ends; inf for epochs of a loader that has no length."""
        return length.epoch_steps(trainer, self.epochs) if self.epochs else self.steps

    def lasts(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether ``step``, a step of the current epoch, is part of the warm-up."""
        return step < self.steps or trainer.current_epoch < self.epochs


class Rounding(Protocol):
    """What the clock needs to know of a callback that rounds positions."""

    moment: Moment
    rounded_at: int | None


class PositionClock:
    """Answers whether positions may learn now: from the end of the warm-up until they are rounded.

    Each module in training has one, kept by its GradientGate, so that all callbacks of a training share the answer.
    RoundThenFinetune registers itself here; each PositionLRSchedule asks with its own warm-up.
    """

    def __init__(self) -> None:
        #: The callbacks that will round the positions of this module, or have done so.
        self.roundings: list[Rounding] = []
        self.length = Length()

    def begin(self, trainer: pl.Trainer) -> None:
        """Remember the length of the training; call it in ``setup``, before other callbacks' ``on_fit_start``."""
        self.length = Length(trainer.max_epochs, trainer.accumulate_grad_batches)

    def add(self, rounding: Rounding) -> None:
        """Take ``rounding`` into account from now on; adding it twice does no harm."""
        if not any(other is rounding for other in self.roundings):
            self.roundings.append(rounding)

    def remove(self, rounding: Rounding) -> None:
        """Take ``rounding`` into account no longer."""
        self.roundings = [other for other in self.roundings if other is not rounding]

    def may_learn(self, trainer: pl.Trainer, warmup: Warmup | None = None, step: int | None = None) -> bool:
        """Whether positions may move in ``step`` of the current epoch (default: the next step)."""
        if any(rounding.rounded_at is not None for rounding in self.roundings):
            return False
        return warmup is None or not warmup.lasts(trainer, trainer.global_step if step is None else step)

    def step_of(self, rounding: Rounding, trainer: pl.Trainer) -> float | None:
        """The optimizer step before which positions are, or were, rounded; None if it is not known.

        Raises:
            RuntimeError: ``at_fraction`` of a training whose end is not known.
        """
        return rounding.moment.step(trainer, self.length) if rounding.rounded_at is None else rounding.rounded_at

    def phase(self, trainer: pl.Trainer, warmup: Warmup) -> LearningPhase:
        """The steps in which positions learn: from the end of the warm-up to rounding, or to the end of the training.

        Raises:
            RuntimeError: positions would be rounded before the warm-up ends.

        Warns:
            UserWarning: the training ends before the warm-up does.
        """
        start = warmup.end(trainer, self.length)
        steps = end = self.length.total_steps(trainer)
        for rounding in self.roundings:
            if (moment := self.step_of(rounding, trainer)) is None:
                continue
            end = min(end, moment)
            at_epoch = rounding.moment.at_epoch
            # Two epoch numbers compare exactly; in steps they may not, as manual optimisation need not step each batch.
            early = warmup.epochs >= at_epoch if warmup.epochs and at_epoch else start >= moment
            if early and rounding.rounded_at is None and not is_fast_dev_run(trainer):
                raise RuntimeError(
                    f"PositionLRSchedule: positions would be rounded at step {moment:.0f}, before the warm-up "
                    f"({warmup}) ends, so none would have moved. Train longer, round later or shorten the warm-up"
                )
        if steps <= start < math.inf and not is_fast_dev_run(trainer):
            rank_zero_warn(
                f"PositionLRSchedule: {warmup} is not less than the {steps} steps of this training, so the positions "
                "will never move; choose a shorter warm-up"
            )
        return LearningPhase(start, math.inf if math.isinf(start) else max(0, end - start))
