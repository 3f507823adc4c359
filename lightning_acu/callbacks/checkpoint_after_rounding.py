"""A ModelCheckpoint whose best model has rounded positions."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from ._trainer import callbacks_of
from .round_then_finetune import RoundThenFinetune

__all__ = ["CheckpointAfterRounding"]


class CheckpointAfterRounding(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with the same arguments, that begins when positions have been rounded.

    A model is often best just before its positions are rounded, so that ``trainer.test(ckpt_path="best")`` with a
    plain ModelCheckpoint tests a model whose positions are fractional, and not the one that the training is for.

    Raises:
        RuntimeError: before training starts, if the trainer has no RoundThenFinetune.

    Example::

        callbacks = [RoundThenFinetune(at_fraction=0.7), CheckpointAfterRounding(monitor="val/loss")]
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that positions will be rounded."""
        if not _roundings(trainer):
            raise RuntimeError(
                "CheckpointAfterRounding would never save: add RoundThenFinetune to the trainer's callbacks, or use "
                "ModelCheckpoint"
            )

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any, **keywords: Any) -> None:
        """Save if it is due and positions have been rounded."""
        if _rounded(trainer):
            super().on_train_batch_end(trainer, *arguments, **keywords)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is due and positions have been rounded."""
        if _rounded(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if it is due and positions have been rounded."""
        if _rounded(trainer):
            super().on_validation_end(trainer, pl_module)


def _roundings(trainer: pl.Trainer) -> list[RoundThenFinetune]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, RoundThenFinetune)]


def _rounded(trainer: pl.Trainer) -> bool:
    return all(rounding.rounded_at is not None for rounding in _roundings(trainer))
