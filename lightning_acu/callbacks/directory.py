"""Where the files of one training go."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

__all__ = ["require_local_directory", "run_directory"]


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
