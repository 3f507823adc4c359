"""A validation in the middle of a training that leaves no trace in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torchmetrics import Metric

from ._averages import averaging_callbacks

__all__ = ["evaluate", "log_evaluation"]


def evaluate(trainer: pl.Trainer) -> dict[str, float]:
    """Run the validation loop now; the metrics that ``trainer.validate`` would return, or none without validation.

    Nothing else notices: other callbacks (early stopping, checkpoints), loggers, the metrics they monitor,
    torchmetrics that the module holds, random numbers and the loop's counters are as before. Callbacks that swap
    averaged weights in for a validation do so. Only what the module's own validation hooks keep in plain attributes
    stays.
    """
    if not trainer.enable_validation:
        return {}
    with _without_trace(trainer), isolate_rng():
        trainer.validating = True
        results = trainer.fit_loop.epoch_loop.val_loop.run()
    return {name: float(value) for metrics in results for name, value in metrics.items()}


@rank_zero_only
def log_evaluation(trainer: pl.Trainer, moment: str, metrics: dict[str, float]) -> None:
    """Hand ``metrics`` to every logger as ``acu/MOMENT/NAME``, and say them."""
    if not metrics:
        return
    for logger in trainer.loggers:
        logger.log_metrics({f"acu/{moment}/{name}": value for name, value in metrics.items()}, step=trainer.global_step)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    rank_zero_info(f"{moment.replace('_', ' ')}, step {trainer.global_step}: {numbers}")


@contextmanager
def _without_trace(trainer: pl.Trainer) -> Iterator[None]:
    """Callbacks (but averaging ones) and loggers that do nothing, and all state as it was in the end."""
    loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
    counted, restarting = loop.batch_progress.state_dict(), loop.restarting
    noted = {name: value for name, value in vars(connector).items() if name != "trainer"}
    seen, reloaded = copy.copy(loop._seen_batches_per_dataloader), loop._last_val_dl_reload_epoch
    last_time = getattr(trainer, "_last_val_time", None)  # new in Lightning 2.6
    metrics = _metric_states(trainer.lightning_module)
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    try:
        averaging = averaging_callbacks(trainer)
        trainer.callbacks = [c if c in averaging else _muted(c) for c in callbacks]  # type: ignore[attr-defined]
        loop.restarting = False  # True after a resume: it would take up the validation that was interrupted
        trainer.loggers = [_Muted(logger) for logger in loggers]
        vars(connector).update({name: copy.copy(value) for name, value in noted.items()})
        yield
    finally:
        trainer.training = True
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        vars(connector).update(noted)
        loop.batch_progress.load_state_dict(counted)
        loop.restarting = restarting
        loop._seen_batches_per_dataloader, loop._last_val_dl_reload_epoch = seen, reloaded
        if last_time is not None:
            trainer._last_val_time = last_time  # type: ignore[attr-defined]
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _metric_states(module: nn.Module) -> list[tuple[Metric, dict[str, Any]]]:
    """What torchmetrics have gathered: a MaxMetric of the best accuracy so far is not to hear of this validation."""
    kept = ("_update_count", "_computed", "_forward_cache")
    return [
        (metric, metric._copy_state_dict() | {name: getattr(metric, name) for name in kept})
        for metric in module.modules()
        if isinstance(metric, Metric)
    ]


def _muted(callback: pl.Callback) -> pl.Callback:
    """The same callback, for those who ask the trainer for it, but with hooks that do nothing."""
    hooks = [name for name in vars(pl.Callback) if name.startswith("on_")]
    kind = type(type(callback).__name__, (type(callback),), dict.fromkeys(hooks, _do_nothing))
    muted: pl.Callback = object.__new__(kind)
    muted.__dict__ = callback.__dict__
    return muted


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Muted(DummyLogger):  # type: ignore[misc]
    """Takes everything and keeps nothing; has the name and the directories of the logger it stands for."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def name(self) -> Any:
        """As there."""
        return self._logger.name

    @property
    def version(self) -> Any:
        """As there."""
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        """As there."""
        return self._logger.save_dir

    @property
    def log_dir(self) -> str | None:
        """As there, or ``save_dir``."""
        return getattr(self._logger, "log_dir", self._logger.save_dir)
