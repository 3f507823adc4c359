"""Log how the positions learn: scalars and figures to every logger, and an animation of the shapes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ..checks import whole_number
from ..conv import ACUConv2d
from ..figures import LayerShape, animate_shapes, plot_shapes
from ..figures.page import shapes_page
from ..files import write_whole
from ..metrics import EffectiveReceptiveField, position_metrics
from ..statistics import layer_statistics
from ..training import parameter_ids
from ._promises import PositionCallback
from ._trainer import (
    is_fast_dev_run,
    require_full_precision,
    require_layers,
    require_lightning,
    require_local_directory,
    require_whole_positions,
    require_writable_directory,
    run_directory,
    trained_shapes,
    warn_not_written,
)

__all__ = ["OffsetLogger"]

_KINDS = ("mean_displacement", "max_displacement", "receptive_radius")

#: Limits of the animation: its frames, and the numbers in all of them, which every checkpoint contains. Beyond, every
#: second frame is dropped, and frames are taken half as often from then on.
_MAX_FRAMES = 64
_MAX_NUMBERS = 4_000_000


#: Seconds: after which a page loads itself again, and between two pages at least; and how many times as long as writing
#: one takes is between two, so that pages take at most 1 % of the training.
_REFRESH, _SHORTEST_WAIT, _TIMES_AS_LONG = 10, 5.0, 100


class OffsetLogger(PositionCallback):
    """Logs how far the taps of every layer have moved and how fast, and draws the learned shapes.

    Scalars go to every attached logger, in pixels (``step_speed``: pixels per step, mean since the last record):
    ``acu/mean_displacement``, ``acu/max_displacement``, ``acu/receptive_radius``, ``acu/step_speed``,
    ``acu/off_lattice`` (share of taps not on whole pixels) and ``acu/collisions`` (taps at the position of another)
    over all layers (see :mod:`lightning_acu.metrics`); and the first four for each layer, as
    ``acu/mean_displacement/LAYER``. The progress bar shows the mean displacement as "moved_px".

    While training goes on, ``shapes.html`` in the run's log directory shows the shapes so far, with a slider over the
    steps; opened in a browser it loads itself again every 10 seconds. It is written at a record, if the last time was
    100 times as long ago as writing takes, and 5 seconds: at most 1 % of the training. ``lightning-acu view`` writes a
    fuller one.

    When training ends, the shapes of all layers are drawn to ``shapes.png`` in the run's log directory, and their
    animation since the start to ``shapes.gif``. The figure also goes to TensorBoard and W&B, the animation to W&B. A
    resumed training continues the animation; one that was killed after its last step gets both when it is resumed.

    Args:
        every_n_steps: optimizer steps between two records. Each record is also a frame of the animation (64 at most;
            beyond, every second frame is dropped, and frames are taken half as often).
        figures: draw the shapes.
        animation: make the animation.
        figures_every_n_steps: also draw and log the figure during training; this takes about a second for 50 layers.
        live: write ``shapes.html``; None: as ``figures``.
        receptive_field_images: also log ``acu/receptive_field`` at each record: the radius, in pixels, of the effective
            receptive field (:class:`~lightning_acu.metrics.EffectiveReceptiveField`) over so many images of the batch.
            This takes a forward and a backward pass; 0: not.

    Raises:
        ValueError: ``every_n_steps`` or ``figures_every_n_steps`` below 1.
        RuntimeError: before training starts, if the model has no active convolution, or the log directory cannot be
            written to.

    Warns:
        UserWarning: a picture could not be written; the training goes on.

    Example::

        trainer = Trainer(logger=TensorBoardLogger("runs"), callbacks=[PositionLRSchedule(), OffsetLogger(500)])
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        figures: bool = True,
        animation: bool = True,
        figures_every_n_steps: int | None = None,
        live: bool | None = None,
        receptive_field_images: int = 0,
    ) -> None:
        self.every_n_steps = whole_number("every_n_steps", every_n_steps, 1)
        self.figures = figures
        self.animation = animation
        self.live = figures if live is None else live
        self.receptive_field_images = whole_number("receptive_field_images", receptive_field_images)
        self.figures_every_n_steps = None
        if figures_every_n_steps is not None:
            if not figures:
                raise ValueError(
                    f"`figures_every_n_steps` (={figures_every_n_steps}) has no effect with `figures`=False"
                )
            self.figures_every_n_steps = whole_number("figures_every_n_steps", figures_every_n_steps, 1)
        self._forget()

    def _forget(self) -> None:
        #: The last record: the step, and each layer's positions (P, K, 2).
        self._last: tuple[int, dict[str, Tensor]] | None = None
        self._frames: list[tuple[int, dict[str, Tensor]]] = []
        self._records = 0
        self._stride = 1  # records from one frame to the next
        self._step = 0
        self._page_due = 0.0  # on time.monotonic's clock, which every process reads differently
        # Where the page goes, and the layers in it: found by all processes together, so that one alone can write it.
        self._page: tuple[Path, list[LayerShape]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset what an earlier training left; the state of a checkpoint to resume from is loaded after this."""
        require_lightning(self, pl_module)
        if stage == "fit" and trainer.global_step == 0:
            self._forget()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the model, the strategy and the directory."""
        self._ended = False
        require_layers(self, pl_module)
        require_whole_positions(self, trainer)
        require_full_precision(self, pl_module)
        if self.figures or self.animation or self.live:
            require_local_directory(self, trainer, "`figures`, `animation` and `live` to False")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that pictures can be written; record where the taps start."""
        if self.figures or self.animation or self.live:
            require_writable_directory(self, trainer, "`figures`, `animation` and `live` to False")
        held = parameter_ids(trainer.optimizers)
        layers = require_layers(self, pl_module)
        if not any(id(layer.offsets) in held for _, layer in layers):
            rank_zero_warn(
                "OffsetLogger: no optimizer holds any positions, so they will not move; convert the model before "
                "configure_optimizers, or add PositionLRSchedule"
            )
        self._step = trainer.global_step
        if self.live:
            self._page = run_directory(trainer) / "shapes.html", trained_shapes(pl_module)
        if self._last is None:
            self._remember(trainer.global_step, {name: layer.positions.cpu() for name, layer in layers})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record and draw when due; once for each step, also if gradients accumulate over several batches."""
        # With several optimizers one batch may take several steps.
        before, self._step = self._step, trainer.global_step
        if self._step // self.every_n_steps > before // self.every_n_steps:
            moved = self._record(trainer, pl_module, batch)
            if not trainer.barebones:  # for the progress bar alone: loggers have had it
                pl_module.log("moved_px", moved, prog_bar=True, logger=False, rank_zero_only=True)
            if self.live and time.monotonic() >= self._page_due and not is_fast_dev_run(trainer):
                self._write_page(trainer, _REFRESH)
        often = self.figures_every_n_steps
        if often is not None and self._step // often > before // often and not is_fast_dev_run(trainer):
            self._draw(trainer, pl_module, f"shapes_{self._step:06}.png")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let loggers write what they hold back: a training resumed from the checkpoint does not record it again."""
        for logger in trainer.loggers:
            logger.save()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the final positions, draw them and make the animation."""
        super().on_train_end(trainer, pl_module)
        self._record(trainer, pl_module)
        if is_fast_dev_run(trainer) or trainer.barebones:
            return
        if self.live:
            # Again: training has not started if there were no steps left.
            self._page = run_directory(trainer) / "shapes.html", trained_shapes(pl_module)
            self._write_page(trainer, None)
        if self.figures:
            self._draw(trainer, pl_module, "shapes.png")
        if self.animation:
            self._animate(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last record and the frames so far."""
        return {"last": self._last, "frames": list(self._frames), "records": self._records, "stride": self._stride}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self._last, self._frames = state_dict["last"], list(state_dict["frames"])
        self._records, self._stride = state_dict["records"], state_dict["stride"]

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any = None) -> float:
        """Log, and remember the positions, unless that was done at this step; returns the mean displacement."""
        layers = require_layers(self, pl_module)
        # On every process: under FSDP2 reading the positions is a collective operation.
        positions = {name: layer.positions.cpu() for name, layer in layers}
        if self._last is None:  # trained without this callback, and resumed after the last step
            self._remember(trainer.global_step, positions)
        assert self._last is not None
        values = self._scalars(trainer.global_step, layers, positions)
        if self._last[0] == trainer.global_step:
            return values["acu/mean_displacement"]
        if self.receptive_field_images and batch is not None:
            values["acu/receptive_field"] = self._receptive_field(pl_module, batch)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
        self._remember(trainer.global_step, positions)
        return values["acu/mean_displacement"]

    def _receptive_field(self, pl_module: pl.LightningModule, batch: Any) -> float:
        images = batch
        while isinstance(images, (list, tuple)) and images:
            images = images[0]
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise RuntimeError(
                "OffsetLogger: `receptive_field_images` needs batches that begin with images (N, C, H, W), got "
                f"{type(batch).__name__}; set it to 0"
            )
        field = EffectiveReceptiveField()
        try:
            field.update(pl_module, images[: self.receptive_field_images].float())
        except NotImplementedError as error:
            raise RuntimeError(
                f"OffsetLogger: `receptive_field_images` (={self.receptive_field_images}) calls "
                f"{type(pl_module).__name__} with images, which has no such `forward`; add one, or set it to 0"
            ) from error
        return field.compute().item()

    def _scalars(
        self, step: int, layers: list[tuple[str, ACUConv2d]], positions: dict[str, Tensor]
    ) -> dict[str, float]:
        assert self._last is not None
        last_step, last = self._last
        rows = {name: layer_statistics(layer) for name, layer in layers}
        metrics = position_metrics(prefix="acu/")
        for row in rows.values():
            metrics.update(row)
        values = {name: float(value) for name, value in metrics.compute().items()}
        speeds = {}
        for name, layer in layers:
            distance = (positions[name] - last[name]).norm(dim=-1)[:, layer.movable.cpu()]
            speeds[name] = distance.mean().item() / max(1, step - last_step) if distance.numel() else 0.0
        taps = max(1, sum(row.taps for row in rows.values()))
        values["acu/step_speed"] = sum(speeds[name] * row.taps for name, row in rows.items()) / taps
        for name, row in rows.items():
            values |= {f"acu/{kind}/{name}": getattr(row, kind) for kind in _KINDS}
            values[f"acu/step_speed/{name}"] = speeds[name]
        return values

    def _remember(self, step: int, positions: dict[str, Tensor]) -> None:
        self._last = (step, positions)
        if (self.animation or self.live) and self._records % self._stride == 0:
            self._frames.append(self._last)
            limit = max(2, min(_MAX_FRAMES, _MAX_NUMBERS // sum(taps.numel() for taps in positions.values())))
            if len(self._frames) > limit:
                self._frames = self._frames[::2]
                self._stride *= 2
        self._records += 1

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        path, shapes = run_directory(trainer) / name, trained_shapes(pl_module)
        if trainer.is_global_zero:
            figure = plot_shapes(shapes, title=f"iteration {trainer.global_step:,}")
            written = self._write(path, lambda file: write_whole(file, figure.savefig))
            for logger in trainer.loggers:
                experiment: Any = getattr(logger, "experiment", None)
                if hasattr(experiment, "add_figure"):  # TensorBoard
                    experiment.add_figure("acu/shapes", figure, trainer.global_step)
                elif hasattr(logger, "log_image") and written:  # W&B
                    logger.log_image("acu/shapes", [str(path)], step=trainer.global_step)

    def _write_page(self, trainer: pl.Trainer, refresh: int | None) -> None:
        """Not a collective operation: processes come here at different times."""
        began = time.monotonic()
        if trainer.is_global_zero:
            assert self._page is not None
            path, shapes = self._page
            page = shapes_page(
                self._film(shapes),
                title=f"Step {trainer.global_step:,}",
                subtitle="" if refresh is None else f"Training goes on; this page loads itself every {refresh} s.",
                refresh=refresh,
            )
            self._write(path, lambda file: write_whole(file, lambda draft: draft.write_text(page, encoding="utf-8")))
        now = time.monotonic()
        self._page_due = now + max(_SHORTEST_WAIT, _TIMES_AS_LONG * (now - began))

    def _film(self, shapes: Sequence[LayerShape]) -> list[tuple[int, list[LayerShape]]]:
        assert self._last is not None
        frames = self._frames + ([] if self._frames[-1][0] == self._last[0] else [self._last])
        return [
            (step, [replace(shape, positions=positions[shape.name]) for shape in shapes]) for step, positions in frames
        ]

    def _animate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path, shapes = run_directory(trainer) / "shapes.gif", trained_shapes(pl_module)
        if trainer.is_global_zero:
            written = self._write(path, functools.partial(animate_shapes, self._film(shapes)))
            for logger in trainer.loggers:
                if hasattr(logger, "log_video") and written:  # W&B
                    logger.log_video("acu/film", [str(path)], step=trainer.global_step, format=["gif"])

    def _write(self, path: Path, write: Callable[[Path], Any]) -> bool:
        """Whether the file could be written; a picture that cannot be written must not end a training."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            warn_not_written(self, path, error)
            return False
        return True
