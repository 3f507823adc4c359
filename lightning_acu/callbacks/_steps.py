"""How long a training is, in the unit that all callbacks here count in: the trainer's ``global_step``.

That is one for each step of each optimizer, as in ``Trainer(max_steps=...)``; several batches whose gradients
accumulate make one.
"""

from __future__ import annotations

import math

import lightning.pytorch as pl

__all__ = ["epoch_steps", "total_steps"]


def epoch_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps in one epoch; inf where the loader has no length.

    With several optimizers (manual optimisation), each is taken to step once a batch.
    """
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return math.inf
    return math.ceil(batches / trainer.accumulate_grad_batches) * max(1, len(trainer.optimizers))


def total_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps of the whole training; inf where neither ``max_steps`` nor ``max_epochs`` ends it."""
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        # A length that is unknown ends at max_epochs too, only nobody knows at which step.
        steps = min(steps, epoch_steps(trainer) * max(1, trainer.max_epochs))
    return steps
