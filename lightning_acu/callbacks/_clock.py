"""How long a training is, when a moment in it comes, and whether positions may learn now.

All callbacks here count in the trainer's ``global_step``: one for each step of each optimizer, as in
``Trainer(max_steps=...)``; several batches whose gradients accumulate make one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Protocol

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from ..checks import at_least, whole_number
from ._layers import callbacks_of

__all__ = ["LearningPhase", "Moment", "PositionClock", "Warmup", "epoch_steps", "step_of_rounding", "total_steps"]


def epoch_steps(trainer: pl.Trainer, epochs: int = 1) -> float:
    """Optimizer steps in the first ``epochs`` epochs; inf where the loader has no length.

    With several optimizers (manual optimisation), each is taken to step once a batch.
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
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * epochs
    else:
        steps = sum(math.ceil(batches / scheduled[0].get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
    return steps * max(1, len(trainer.optimizers))


def total_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole training; inf where nobody knows its end."""
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        steps = min(steps, epoch_steps(trainer, max(1, trainer.max_epochs)))
    return steps


@dataclass(frozen=True)
class Moment:
    """Before optimizer step ``at_step``, at the start of epoch ``at_epoch``, or after ``at_fraction`` of all steps.

    Raises:
        ValueError: not exactly one of the three, or one out of range.
    """

    at_step: int | None = None
    at_epoch: int | None = None
    at_fraction: float | None = None

    def __post_init__(self) -> None:
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of `at_step`, `at_epoch` and `at_fraction`, got {chosen or 'none'}")
        ((name, value),) = chosen.items()
        if name != "at_fraction":
            object.__setattr__(self, name, whole_number(name, value, 1))
        elif not 0 < at_least(name, value) < 1:
            raise ValueError(f"`{name}` (={value}) must be between 0 and 1")

    def __str__(self) -> str:
        """As messages name it: the argument and its value."""
        return next(f"`{name}` (={value})" for name, value in asdict(self).items() if value is not None)

    def step(self, trainer: pl.Trainer) -> float | None:
        """The optimizer step; None for an epoch where epochs have no known length.

        Raises:
            RuntimeError: a fraction of a training without end.
        """
        if self.at_step is not None:
            return self.at_step
        if self.at_epoch is not None:
            steps = epoch_steps(trainer, self.at_epoch)
            return None if math.isinf(steps) else steps
        assert self.at_fraction is not None
        steps = total_steps(trainer)
        if math.isinf(steps):
            raise RuntimeError(
                f"RoundThenFinetune: {self} of a training without a known end is not a step; set the trainer's "
                "max_steps (or max_epochs, where the loader has a length), or give `at_step` or `at_epoch`"
            )
        return math.ceil(self.at_fraction * steps)

    def has_come(self, trainer: pl.Trainer) -> bool:
        """Whether it is now or was before; to be asked before a step."""
        if self.at_epoch is not None:
            return trainer.current_epoch >= self.at_epoch
        step = self.step(trainer)
        return step is not None and trainer.global_step >= step


@dataclass(frozen=True)
class Warmup:
    """The first ``steps`` optimizer steps, or ``epochs`` epochs, in which positions keep still."""

    steps: int = 0
    epochs: int = 0

    def __str__(self) -> str:
        """As messages name it: the argument and its value."""
        return f"`warmup_epochs` (={self.epochs})" if self.epochs else f"`warmup_steps` (={self.steps})"

    def length(self, trainer: pl.Trainer) -> float:
        """In steps; inf for epochs of a loader that has no length."""
        return epoch_steps(trainer, self.epochs) if self.epochs else self.steps

    def lasts(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether ``step``, which is of the current epoch, belongs to it."""
        return step < self.steps or trainer.current_epoch < self.epochs


@dataclass(frozen=True)
class LearningPhase:
    """``length`` steps from step ``start`` on; either may be inf, where nobody knows."""

    start: float
    length: float

    def time(self, step: float) -> int:
        """Steps since positions began to learn, 0 to ``length``."""
        return int(min(max(step - self.start, 0), self.length))


class Rounding(Protocol):
    """What the clock asks of a callback that rounds positions."""

    moment: Moment
    rounded_at: int | None


def step_of_rounding(rounding: Rounding, trainer: pl.Trainer) -> float | None:
    """The optimizer step before which positions are, or were, rounded; None where epochs have no known length.

    Raises:
        RuntimeError: a fraction of a training without end.
    """
    return rounding.moment.step(trainer) if rounding.rounded_at is None else rounding.rounded_at


class PositionClock:
    """May positions learn now? From the end of the warm-up until they are rounded.

    One for each module in training; its GradientGate holds it, so that all callbacks of that training share it.
    RoundThenFinetune sets it; each PositionLRSchedule asks it, with its own warm-up.
    """

    def __init__(self) -> None:
        #: The callbacks that will round the positions of this module, or have.
        self.roundings: list[Rounding] = []

    def set(self, rounding: Rounding) -> None:
        """Heed ``rounding`` from now on; harmless when that is done already."""
        if not any(known is rounding for known in self.roundings):
            self.roundings.append(rounding)

    def unset(self, rounding: Rounding) -> None:
        """Heed it no longer."""
        self.roundings = [known for known in self.roundings if known is not rounding]

    def may_learn(self, trainer: pl.Trainer, warmup: Warmup | None = None, step: int | None = None) -> bool:
        """Whether positions may move in ``step`` of the current epoch (default: the one that comes next)."""
        if any(rounding.rounded_at is not None for rounding in self.roundings):
            return False
        return warmup is None or not warmup.lasts(trainer, trainer.global_step if step is None else step)

    def phase(self, trainer: pl.Trainer, warmup: Warmup) -> LearningPhase:
        """The steps in which positions learn: to their rounding, or to the end of the training.

        Raises:
            RuntimeError: positions are to be rounded before the warm-up ends.

        Warns:
            UserWarning: the training ends before the warm-up does.
        """
        start = warmup.length(trainer)
        steps = end = total_steps(trainer)
        for rounding in self.roundings:
            if (moment := step_of_rounding(rounding, trainer)) is None:
                continue
            end = min(end, moment)
            done = rounding.rounded_at is not None or trainer.fast_dev_run  # type: ignore[attr-defined]
            at_epoch = rounding.moment.at_epoch
            # Epochs with epochs, exactly: manual optimisation need not step at each batch.
            early = warmup.epochs >= at_epoch if warmup.epochs and at_epoch else start >= moment
            if early and not done:
                raise RuntimeError(
                    f"PositionLRSchedule: positions are to be rounded at step {moment:.0f}, before the warm-up "
                    f"ends, {warmup}; nothing would have moved. Train longer, round later or warm up less"
                )
        if steps <= start < math.inf and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"PositionLRSchedule: {warmup} is no less than the {steps} steps of this training, so the positions "
                "will never move; choose fewer"
            )
        return LearningPhase(start, math.inf if math.isinf(start) else max(0, end - start))
