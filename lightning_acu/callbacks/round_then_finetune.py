"""Round the learned positions to whole pixels or to dilations, then fine-tune the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from ..checks import at_least, few
from ..conv import ACUConv2d
from ..dilation import RoundTo, check_round_to
from ..figures import plot_shapes
from ..files import write_whole
from ..statistics import LayerStatistics, layer_statistics
from ..training import (
    Collision,
    RoundingReport,
    Schedule,
    check_collision,
    check_finite,
    check_fold_after_rounding,
    compute_as_plain,
    drop_gradients_,
    find_schedule,
    keep_rounded_,
    rate_ratios,
    restart_rates,
    round_and_freeze,
)
from ._clock import Moment, PositionClock
from ._gate import GradientGate
from ._promises import PositionCallback, RoundedPositions, fractional_layers, hold_named_copies, require_attributes
from ._trainer import (
    averages_of,
    is_fast_dev_run,
    require_full_precision,
    require_grids,
    require_layers,
    require_lightning,
    require_local_directory,
    require_whole_positions,
    require_writable_directory,
    reshard,
    run_directory,
    save_whole_checkpoint,
    swapped_in,
    trained_shapes,
    warn_not_written,
)

__all__ = ["RoundThenFinetune"]


class RoundThenFinetune(PositionCallback):
    """Rounds all positions to the lattice at one step, then trains on with frozen positions (the paper's ACU-Round).

    A rounded layer is a plain convolution again, or a sparse one, and runs everywhere; fine-tuning adapts the weights
    to the taps that were moved. From then on positions do not change by a single bit, also after a resume; averaged
    copies of the model (WeightAveraging, StochasticWeightAveraging, timm's ModelEma) get the same positions. The
    optimizer's state of positions (momentum) is deleted; that of the weights is kept.

    The model just before and just after rounding (``before_rounding.ckpt``, ``rounded.ckpt``) and a figure of the
    learned shapes (``shapes_before_rounding.png``) are kept in the log directory.
    :func:`~lightning_acu.callbacks.evaluate_stages` evaluates them after the training.

    Steps are the trainer's ``global_step``, as ``Trainer(max_steps=...)`` counts them.

    Args:
        at_step: round before this optimizer step; or
        at_epoch: round at the start of this epoch, 1 or more (epochs count from 0); or
        at_fraction: round after this fraction of all steps, between 0 and 1. Give exactly one of the three.
        finetune_lr: restart the learning rate of the weights at this value after rounding, overriding their scheduler;
            the highest group gets this value, and the others keep their ratio to it. None: the scheduler goes on.
        finetune_schedule: the schedule of that learning rate until the training ends: "cosine" or "linear" to zero,
            "constant", "step", or a :class:`~lightning_acu.training.schedules.Schedule`.
        collision: what to do when taps of a layer are rounded to the same pixel: "report" them (their weights add up,
            nothing is lost); raise an "error"; or "separate" them, each to a pixel of its own, as near as possible.
        keep: write the two checkpoints (weights only) and the figure to the logger's directory, or without a logger to
            the trainer's ``default_root_dir``.
        copies: attributes of the LightningModule or of its callbacks that hold further copies of the model, such as a
            momentum teacher: modules, or dicts of tensors with the model's names; "teacher" or "helper.shadow". They
            get the same rounded positions. The averages named above are found without.
        to: "pixels", each tap to its nearest; or "dilation": each layer, or position group, becomes the nearest plain
            dilated convolution (see :meth:`ACUConv2d.round_`), whose fold costs what the plain one did.
        fold_after_rounding: with "dilation", compute as those plain convolutions from then on, at their speed (see
            :meth:`ACUConv2d.compute_as_plain`). Parameters and checkpoints stay as they are;
            :func:`lightning_acu.fold_acu` at the end makes the model plain.

    Raises:
        ValueError: not exactly one of the first three arguments is given, or it is out of range; when rounding, if
            positions are not finite.
        RuntimeError: before training starts, if the model has no active convolution, the training ends before the step
            of rounding, or the strategy is not supported; when rounding, for collisions under "error".

    Warns:
        UserWarning: when training ends, positions of the model or of a copy that can be found are not on whole pixels,
            or the best checkpoint of a ModelCheckpoint is from before rounding.

    Example::

        callbacks = [PositionLRSchedule(), RoundThenFinetune(at_fraction=0.7, finetune_lr=0.01)]

    Source: Jeon & Kim, CVPR 2017, section 4.1 (ACU rounded to integer positions, then fine-tuned).
    """

    def __init__(
        self,
        at_step: int | None = None,
        at_epoch: int | None = None,
        at_fraction: float | None = None,
        finetune_lr: float | None = None,
        finetune_schedule: str | Schedule = "cosine",
        collision: Collision = "report",
        keep: bool = True,
        copies: Sequence[str] = (),
        to: RoundTo = "pixels",
        fold_after_rounding: bool = False,
    ) -> None:
        self.moment = Moment(at_step, at_epoch, at_fraction)
        check_collision(collision)
        check_round_to("to", to)
        check_fold_after_rounding(fold_after_rounding, "to", to)
        if finetune_lr is not None and at_least("finetune_lr", finetune_lr) == 0:
            raise ValueError(f"`finetune_lr` (={finetune_lr}) must be positive; with None the scheduler goes on")
        if finetune_lr is None and finetune_schedule != "cosine":
            raise ValueError(f"`finetune_schedule` (={finetune_schedule!r}) has no effect without `finetune_lr`")
        self.finetune_lr = finetune_lr
        self.finetune_schedule = find_schedule("finetune_schedule", finetune_schedule)
        self.collision = collision
        self.to = to
        self.fold_after_rounding = fold_after_rounding
        self.keep = keep
        if isinstance(copies, str):
            raise TypeError(f"`copies` (={copies!r}) must be a list of names; write [{copies!r}]")
        self.copies = tuple(copies)
        self._clock = PositionClock()
        self._forget()

    def _forget(self) -> None:
        #: The step at which positions were rounded, None before.
        self.rounded_at: int | None = None
        #: What they were rounded to.
        self.rounded_to: RoundTo = self.to
        #: By layer, how far the taps had moved just before rounding.
        self.learned: dict[str, LayerStatistics] = {}
        #: The files of the model just before ("before_rounding") and just after rounding ("rounded").
        self.checkpoints: dict[str, str] = {}
        #: For each optimizer, the learning rates of its groups when rounding, divided by the highest.
        self._ratios: list[list[float]] = []
        #: What rounding did, in the process that did it.
        self.report: RoundingReport | None = None
        self._promise = RoundedPositions()
        self._before_evaluation: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset what an earlier training left; the state of a checkpoint to resume from is loaded after this."""
        require_lightning(self, pl_module)
        if stage == "fit":
            if trainer.global_step == 0:
                self._forget()
            self._clock = GradientGate.add(pl_module, self._freeze).clock
            self._clock.begin(trainer)
            self._clock.add(self)
        else:  # which loads the state of a checkpoint, too
            self._before_evaluation = self.state_dict()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the model, the strategy and the directory."""
        self._ended = False
        layers = require_layers(self, pl_module)
        if self.to == "dilation":
            require_grids(self, layers)
        require_whole_positions(self, trainer)
        require_full_precision(self, pl_module)
        if self.keep:
            require_local_directory(self, trainer, "`keep` to False")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that checkpoints can be kept, and that the step of rounding is part of this training."""
        if self.keep:
            require_writable_directory(self, trainer, "`keep` to False")
        require_attributes(trainer, pl_module, self.copies)
        self._promise.start(trainer, pl_module)
        step, steps = self._clock.step_of(self, trainer), self._clock.length.total_steps(trainer)
        if self.finetune_lr is not None and self.finetune_schedule.needs_total and math.isinf(steps):
            raise RuntimeError(
                f"RoundThenFinetune: `finetune_schedule` (={self.finetune_schedule}) needs a training with a known "
                "end; set the trainer's max_steps or choose 'constant'"
            )
        if self.rounded_at is not None:
            if self.rounded_to != self.to:
                raise RuntimeError(
                    f"RoundThenFinetune: `to` is {self.to!r}, but this training is resumed from a checkpoint whose "
                    f"positions were rounded to {self.rounded_to!r}; give that, or resume from one before rounding"
                )
            rank_zero_info(f"RoundThenFinetune: positions were rounded at step {self.rounded_at} and stay frozen")
            self._fold(pl_module)
            self._promise.rounded(trainer, pl_module, resumed=True)
            self._restart_rates(trainer)
            return
        # Under manual optimisation the number of steps in an epoch is an estimate.
        exact = self.moment.at_epoch is None or pl_module.automatic_optimization
        if step is not None and step >= steps and exact and not is_fast_dev_run(trainer):
            raise RuntimeError(
                f"RoundThenFinetune: {self.moment} is step {step}, but this training has only {steps} steps; train "
                "longer or round earlier"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Round when the step is reached."""
        if self.rounded_at is None and self.moment.has_come(trainer, self._clock.length):
            self._round(trainer, pl_module)
        self._restart_rates(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Override the scheduler's learning rate after its step."""
        self._restart_rates(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Round the positions of averaged copies, before they are swapped in."""
        self._hold(trainer, pl_module)
        self._say_fractional(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Round the positions of averaged copies; ``checkpoint`` refers to the same tensors."""
        self._hold(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Round the positions of the final average; warn if the step of rounding was never reached."""
        super().on_train_end(trainer, pl_module)
        self._hold(trainer, pl_module)  # WeightAveraging has copied its average into the model, or will
        if self.rounded_at is None and not is_fast_dev_run(trainer) and trainer.global_step:
            rank_zero_warn(
                f"RoundThenFinetune: training ended at step {trainer.global_step}, before {self.moment}; "
                "the positions are not rounded"
            )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the checkpoint to be tested is from before rounding."""
        self._say_fractional(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the checkpoint to predict with is from before rounding."""
        self._say_fractional(trainer, pl_module)

    def broken_promises(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Positions, of the model or of copies, that are not those that were rounded; best checkpoints from before."""
        return (
            []
            if self.rounded_at is None
            else self._promise.broken(trainer, pl_module, self.rounded_at, self.rounded_to)
        )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module's methods: Lightning does not call teardown after an exception."""
        self._leave(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's methods."""
        if stage == "fit":
            self._leave(pl_module)
        elif self._before_evaluation is not None:
            if self._before_evaluation["rounded_at"] is not None:
                self.load_state_dict(self._before_evaluation)
            self._before_evaluation = None

    def state_dict(self) -> dict[str, Any]:
        """Whether and when positions were rounded, and what is needed to go on from there."""
        return {
            "rounded_at": self.rounded_at,
            "rounded_to": self.rounded_to,
            "learned": {name: vars(row) for name, row in self.learned.items()},
            "checkpoints": dict(self.checkpoints),
            "ratios": self._ratios,
            "best": dict(self._promise.best),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the state of a checkpoint, also of older versions (no ``best``, ``rounded_to``)."""
        self.rounded_at = state_dict["rounded_at"]
        self.rounded_to = state_dict.get("rounded_to", "pixels") if self.rounded_at is not None else self.to
        self.learned = {name: LayerStatistics(**row) for name, row in state_dict["learned"].items()}
        self.checkpoints = dict(state_dict["checkpoints"])
        self._ratios = state_dict["ratios"]
        self._promise.best = dict(state_dict.get("best", {}))

    def _leave(self, pl_module: pl.LightningModule) -> None:
        GradientGate.remove(pl_module, self._freeze)
        self._clock.remove(self)

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = require_layers(self, pl_module)
        check_finite(layers)  # before anything is kept
        learned = {name: layer_statistics(layer) for name, layer in layers}
        self._keep(trainer, pl_module, "before_rounding")
        self._draw(trainer, pl_module)
        reshard(pl_module)  # a validation may have left parameters gathered, and changes of those would be lost
        self.report = report = round_and_freeze(layers, trainer.optimizers, self.collision, self.to)
        self.learned, self.rounded_at, self.rounded_to = learned, trainer.global_step, self.to
        self._hold(trainer, pl_module)
        self._fold(pl_module)
        self._promise.rounded(trainer, pl_module)
        rank_zero_info(f"RoundThenFinetune: rounded the positions at step {self.rounded_at}; {report}")
        if report.nothing_learned:
            rank_zero_warn(
                f"RoundThenFinetune: after rounding all taps are where they started, {report.why_nothing}; raise the "
                "`multiplier` of PositionLRSchedule, or train longer before rounding"
            )
        self._keep(trainer, pl_module, "rounded")
        self._ratios = [rate_ratios(optimizer) for optimizer in trainer.optimizers]

    def _fold(self, pl_module: pl.LightningModule) -> None:
        if self.fold_after_rounding and (active := compute_as_plain(require_layers(self, pl_module))):
            rank_zero_info(
                f"RoundThenFinetune: {few(active)} are not computed as plain convolutions, because their position "
                "groups have different dilations"
            )

    def _hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only in a fit: the same trainer may validate another model later.
        if self.rounded_at is not None and trainer.state.fn == TrainerFn.FITTING:
            keep_rounded_(pl_module, averages_of(trainer))
            hold_named_copies(trainer, pl_module, self.copies)

    def _say_fractional(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = self._before_evaluation
        if state is None or state["rounded_at"] is None or trainer.ckpt_path is None:
            return
        names = fractional_layers(pl_module)
        if names and str(trainer.ckpt_path) not in state["checkpoints"].values():
            rank_zero_warn(
                f"RoundThenFinetune: {str(trainer.ckpt_path)!r} is a checkpoint from before rounding: the positions of "
                f"{few(names)} are not on whole pixels. Without `ckpt_path` the model is evaluated as it is now; "
                "CheckpointAfterRounding saves no checkpoints before rounding"
            )

    def _restart_rates(self, trainer: pl.Trainer) -> None:
        if self.finetune_lr is not None and self.rounded_at is not None:
            length = self._clock.length.total_steps(trainer) - self.rounded_at
            factor = self.finetune_schedule.rate(trainer.global_step - self.rounded_at, length)
            restart_rates(trainer.optimizers, self._ratios, self.finetune_lr * factor)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        directory = run_directory(trainer)
        if self.keep and not is_fast_dev_run(trainer) and not trainer.barebones:
            path = Path(directory, f"{name}.ckpt")
            try:
                with swapped_in(trainer, pl_module):
                    save_whole_checkpoint(trainer, path)
            except OSError as error:
                warn_not_written(self, path, error)
            else:
                self.checkpoints[name] = str(path)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shapes = trained_shapes(pl_module)
        if trainer.is_global_zero and "before_rounding" in self.checkpoints:
            path = Path(self.checkpoints["before_rounding"]).with_name("shapes_before_rounding.png")
            figure = plot_shapes(shapes, title=f"before rounding, iteration {trainer.global_step:,}")
            try:
                write_whole(path, figure.savefig)
            except OSError as error:
                warn_not_written(self, path, error)

    def _freeze(self, trainer: pl.Trainer, optimizer: Optimizer, layers: Sequence[ACUConv2d]) -> None:
        if not self._clock.may_learn(trainer):
            drop_gradients_(layers)
