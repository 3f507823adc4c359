"""See the positions learn: numbers to every logger, and the picture of the shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only

from ..figures import plot_shapes
from ..metrics import model_statistics
from ._gradients import require_layers
from .directory import run_directory

__all__ = ["OffsetLogger"]


class OffsetLogger(pl.Callback):
    """Logs how far the taps of every layer have moved, and draws their shapes when training ends.

    Scalars, in pixels, for each layer and as a mean over layers, to every attached logger:
    ``acu/mean_displacement/LAYER``, ``acu/max_displacement/LAYER``, ``acu/receptive_radius/LAYER``.
    The figure is written to ``shapes.png`` in the trainer's log directory, and handed to TensorBoard and W&B.

    Args:
        every_n_steps: optimizer steps between two records.
        figures: draw the shapes when training ends.

    Raises:
        ValueError: ``every_n_steps`` below 1.
        RuntimeError: at the start of training, if the model has no active convolution.
    """

    def __init__(self, every_n_steps: int = 100, figures: bool = True) -> None:
        if every_n_steps < 1:
            raise ValueError(f"`every_n_steps` (={every_n_steps}) must be at least 1")
        self.every_n_steps = every_n_steps
        self.figures = figures
        self._last = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to log."""
        require_layers(self, pl_module)
        self._last = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the scalars, once for each step that is due (not again while gradients accumulate)."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._last:
            self._last = step
            self._log_scalars(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the end, and draw it."""
        if self._last != trainer.global_step:
            self._log_scalars(trainer, pl_module)
        directory = run_directory(trainer)
        if self.figures and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._log_figure(trainer, pl_module, directory)

    @rank_zero_only
    def _log_scalars(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.loggers:
            return
        layers = model_statistics(pl_module)
        values: dict[str, float] = {}
        for kind in ("mean_displacement", "max_displacement", "receptive_radius"):
            per_layer = {name: getattr(statistics, kind) for name, statistics in layers.items()}
            values[f"acu/{kind}"] = sum(per_layer.values()) / len(per_layer)
            values |= {f"acu/{kind}/{name}": value for name, value in per_layer.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    @rank_zero_only
    def _log_figure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, directory: Path) -> None:
        figure = plot_shapes(pl_module, title=f"iteration {trainer.global_step:,}")
        directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(directory / "shapes.png")
        for logger in trainer.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_figure"):  # TensorBoard
                experiment.add_figure("acu/shapes", figure, trainer.global_step)
            elif hasattr(logger, "log_image"):  # W&B
                logger.log_image("acu/shapes", [str(directory / "shapes.png")], step=trainer.global_step)
