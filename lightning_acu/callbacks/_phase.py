"""When positions learn: from the end of the warm-up until they are rounded, or the training ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from ._steps import epoch_steps, total_steps
from .round_then_finetune import RoundThenFinetune

__all__ = ["LearningPhase"]


@dataclass(frozen=True)
class LearningPhase:
    """``length`` steps from step ``start`` on; either may be inf, where nobody knows."""

    start: float
    length: float

    @classmethod
    def find(cls, trainer: pl.Trainer, warmup_steps: int, warmup_epochs: int | None) -> LearningPhase:
        """The phase in this training.

        Raises:
            RuntimeError: positions are to be rounded before it starts.

        Warns:
            UserWarning: the training ends before it starts.
        """
        start = epoch_steps(trainer, warmup_epochs) if warmup_epochs else warmup_steps
        warmup = f"`warmup_epochs` (={warmup_epochs})" if warmup_epochs else f"`warmup_steps` (={warmup_steps})"
        steps = end = total_steps(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RoundThenFinetune) and (moment := callback.step_of_rounding(trainer)) is not None:
                end = min(end, moment)
                done = callback.rounded_at is not None or trainer.fast_dev_run  # type: ignore[attr-defined]
                at_epoch = callback.moment.at_epoch
                # Epochs with epochs, exactly: manual optimisation need not step at each batch.
                early = warmup_epochs >= at_epoch if warmup_epochs and at_epoch else start >= moment
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
        return cls(start, math.inf if math.isinf(start) else max(0, end - start))

    def time(self, step: float) -> int:
        """Steps since positions began to learn, 0 to ``length``."""
        return int(min(max(step - self.start, 0), self.length))
