"""One moment in a training, given as a step, an epoch or a share of the whole."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import lightning.pytorch as pl

from ..checks import at_least, whole_number
from ._steps import epoch_steps, total_steps

__all__ = ["Moment"]


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
                f"RoundThenFinetune: {self} of a training without a known end is no step; set the trainer's max_steps "
                "(or max_epochs, where the loader has a length), or give `at_step` or `at_epoch`"
            )
        return math.ceil(self.at_fraction * steps)

    def has_come(self, trainer: pl.Trainer) -> bool:
        """Whether it is now or was before; to be asked before a step."""
        if self.at_epoch is not None:
            return trainer.current_epoch >= self.at_epoch
        step = self.step(trainer)
        return step is not None and trainer.global_step >= step
