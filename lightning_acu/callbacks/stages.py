"""Evaluation of a model before rounding, after it and after fine-tuning, from the checkpoints that a training kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from ..choices import one_of
from ._trainer import averaging_callbacks, callbacks_of
from .round_then_finetune import RoundThenFinetune

__all__ = ["evaluate_stages"]

#: The names of stages, and of the checkpoints that RoundThenFinetune keeps of them.
_KEPT = {"before rounding": "before_rounding", "after rounding": "rounded"}


def evaluate_stages(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    rounding: RoundThenFinetune | None = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    dataloaders: Any = None,
    method: Literal["validate", "test"] = "test",
) -> dict[str, dict[str, float]]:
    """Evaluate the model as it was before and after rounding, and as it is now; call it after ``trainer.fit``.

    Runs ``trainer.test`` (or ``trainer.validate``) on the checkpoints that ``rounding`` kept and on ``module`` as it
    is; loggers receive the metrics as in any such run. ``module`` has its own weights again when this returns or
    raises. Callbacks that hold an average of the model are left out meanwhile, because the kept checkpoints and the
    final model are the average already.

    Args:
        trainer: the trainer of the training.
        module: the model that was trained.
        rounding: the callback that rounded the positions; None if there was none.
        datamodule: the data; or
        dataloaders: the data. Without either, the module's own dataloaders are used.
        method: "test" or "validate".

    Returns:
        The metrics of each stage: "before rounding", "after rounding" (if their checkpoints were kept) and "after
        fine-tuning"; only "final" if nothing was rounded.

    Raises:
        ValueError: ``method`` is neither of the two.
        RuntimeError: the checkpoints are folders of shards, as FSDP2 writes them.

    Warns:
        UserWarning: a checkpoint does not exist any more; that stage is left out.

    Example::

        trainer.fit(module, datamodule=data)
        evaluate_stages(trainer, module, rounding, datamodule=data)
    """
    one_of("method", method, ("test", "validate"))

    def evaluate() -> dict[str, float]:
        results = getattr(trainer, method)(module, dataloaders=dataloaders, datamodule=datamodule, verbose=False)
        return {name: float(value) for metrics in results for name, value in metrics.items()}

    rounded = rounding is not None and rounding.rounded_at is not None
    kept = _kept_checkpoints(rounding) if rounding is not None else {}
    stages = {}
    final = copy.deepcopy(module.state_dict())
    with _without_averaging(trainer):
        try:
            for stage, path in kept.items():
                # weights_only=False: this training wrote the file, and its hyperparameters may be classes.
                module.load_state_dict(torch.load(path, map_location="cpu", weights_only=False)["state_dict"])
                stages[stage] = evaluate()
        finally:
            module.load_state_dict(final)
        stages["after fine-tuning" if rounded else "final"] = evaluate()
    return stages


def _kept_checkpoints(rounding: RoundThenFinetune) -> dict[str, Path]:
    kept = {stage: Path(rounding.checkpoints[name]) for stage, name in _KEPT.items() if name in rounding.checkpoints}
    for stage, path in list(kept.items()):
        if path.is_dir():
            raise RuntimeError(
                f"evaluate_stages: {path} is a folder of shards (FSDP2), which only a sharded model can load; evaluate "
                f"it with trainer.validate(module, ckpt_path={str(path)!r})"
            )
        if not path.exists():  # the run was resumed on another machine, for example
            rank_zero_warn(f"evaluate_stages: {path} does not exist any more; the model {stage} is left out")
            del kept[stage]
    return kept


@contextmanager
def _without_averaging(trainer: pl.Trainer) -> Iterator[None]:
    """Without the callbacks that would swap in an average for the weights that are to be evaluated."""
    callbacks, averaging = callbacks_of(trainer), averaging_callbacks(trainer)
    before = list(callbacks)
    callbacks[:] = [callback for callback in before if callback not in averaging]
    try:
        yield
    finally:
        callbacks[:] = before
