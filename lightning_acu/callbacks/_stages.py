"""What a training leaves on disk: the directory of a run, and how good the models are that it kept there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from ._layers import averaging_callbacks, callbacks_of

if TYPE_CHECKING:
    from .round_then_finetune import RoundThenFinetune

__all__ = ["evaluate_stages", "require_local_directory", "run_directory"]

#: The names of stages, and of the checkpoints that RoundThenFinetune keeps of them.
_KEPT = {"before rounding": "before_rounding", "after rounding": "rounded"}


def evaluate_stages(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    rounding: RoundThenFinetune | None = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    dataloaders: Any = None,
    method: Literal["validate", "test"] = "validate",
) -> dict[str, dict[str, float]]:
    """How good the model was before and after rounding, and is now: to be called after ``trainer.fit``.

    Runs ``trainer.validate`` or ``trainer.test`` on the checkpoints that ``rounding`` kept and on ``module`` as it is;
    loggers hear what they hear of any such run. In the end ``module`` has the weights that it came with, also after an
    error. Callbacks that hold an average of the model take no part: what was kept, and what training ended with, are
    averages already.

    Args:
        trainer: that of the training.
        module: the model that was trained.
        rounding: the callback of the training that rounded positions; None where there was none.
        datamodule: the data; or
        dataloaders: the data; neither for those of the module.
        method: "validate" or "test".

    Returns:
        The metrics of each stage, by name: "before rounding", "after rounding" (as far as they were kept) and "after
        fine-tuning"; only "final" where nothing was rounded.

    Raises:
        ValueError: another ``method``.
        RuntimeError: the checkpoints are folders of shards, as FSDP2 writes them.

    Warns:
        UserWarning: a checkpoint does not exist any more; that stage is left out.

    Example::

        trainer.fit(module, datamodule=data)
        evaluate_stages(trainer, module, rounding, datamodule=data, method="test")
    """
    if method not in ("validate", "test"):
        raise ValueError(f"`method` (={method!r}) must be 'validate' or 'test'")

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
                # weights_only=False: a file of our own, whose hyperparameters may name classes.
                module.load_state_dict(torch.load(path, map_location="cpu", weights_only=False)["state_dict"])
                stages[stage] = evaluate()
        finally:
            module.load_state_dict(final)
        stages["after fine-tuning" if rounded else "final"] = evaluate()
    return stages


def run_directory(trainer: pl.Trainer) -> Path:
    """The directory of this run, the same on every process; call it on all of them.

    The ``log_dir`` of CSVLogger and TensorBoardLogger; for other loggers ``save_dir/name/version``, as
    ModelCheckpoint chooses (``Trainer.log_dir`` would be one directory for all runs there); without a logger the
    trainer's ``default_root_dir``.
    """
    logger = trainer.logger
    path: str | Path | None
    if logger is None:
        path = trainer.default_root_dir
    elif (path := getattr(logger, "log_dir", None)) is None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        path = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return Path(trainer.strategy.broadcast(path))


def require_local_directory(callback: pl.Callback, trainer: pl.Trainer, remedy: str) -> None:
    """An error where the run's directory is a URL (of a bucket), which files would silently not go to."""
    where = str(getattr(trainer.logger, "save_dir", None) or trainer.default_root_dir)
    if "://" in where:
        raise RuntimeError(
            f"{type(callback).__name__} writes local files, but this run's directory is {where!r}; give the logger or "
            f"the trainer's default_root_dir a local one, or set {remedy}"
        )


def _kept_checkpoints(rounding: RoundThenFinetune) -> dict[str, Path]:
    kept = {stage: Path(rounding.checkpoints[name]) for stage, name in _KEPT.items() if name in rounding.checkpoints}
    for stage, path in list(kept.items()):
        if path.is_dir():
            raise RuntimeError(
                f"evaluate_stages: {path} is a folder of shards (FSDP2), which only a sharded model can load; evaluate "
                f"it with trainer.validate(module, ckpt_path={str(path)!r})"
            )
        if not path.exists():  # of a run that was resumed elsewhere
            rank_zero_warn(f"evaluate_stages: {path} does not exist any more; the model {stage} is left out")
            del kept[stage]
    return kept


@contextmanager
def _without_averaging(trainer: pl.Trainer) -> Iterator[None]:
    """Without the callbacks that would put an average in the place of the weights that are to be evaluated."""
    callbacks, averaging = callbacks_of(trainer), averaging_callbacks(trainer)
    trainer.callbacks = [callback for callback in callbacks if callback not in averaging]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
