"""How long a training is, in the unit that all callbacks here count in: the trainer's ``global_step``.

That is one for each step of each optimizer, as in ``Trainer(max_steps=...)``; several batches whose gradients
accumulate make one.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

__all__ = ["epoch_steps", "total_steps"]


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
    scheduled = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
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
