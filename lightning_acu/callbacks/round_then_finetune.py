"""Round the learned positions to whole pixels, then let the weights adapt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from ..checks import at_least
from ..conv import ACUConv2d
from ..figures import plot_shapes
from ..statistics import LayerStatistics, layer_statistics
from ..training import (
    Collision,
    Schedule,
    check_collision,
    find_schedule,
    keep_rounded_,
    rate_ratios,
    restart_rates,
    round_layers,
)
from ._clock import Moment, PositionClock, step_of_rounding, total_steps
from ._gate import GradientGate
from ._layers import (
    averages_of,
    require_layers,
    require_lightning,
    require_whole_positions,
    reshard,
    swapped_in,
    trained_shapes,
)
from ._stages import require_local_directory, run_directory

__all__ = ["RoundThenFinetune"]


class RoundThenFinetune(pl.Callback):
    """Rounds all positions to the lattice at one step, and trains on with positions frozen (the paper's ACU-Round).

    After rounding a layer is a plain convolution again, or a sparse one, and runs everywhere; the fine-tuning lets the
    weights make up for the taps that moved. Positions stay bit for bit from then on, also after a resume; averaged
    copies of the model (WeightAveraging, StochasticWeightAveraging, timm's ModelEma) get the same positions. The
    optimizer forgets what it knew of positions (momentum) and keeps the rest.

    The log directory keeps the model just before and just after (``before_rounding.ckpt``, ``rounded.ckpt``) and the
    learned shapes (``shapes_before_rounding.png``). How good the model was at each stage, says
    :func:`~lightning_acu.callbacks.evaluate_stages` after the training.

    Steps are the trainer's ``global_step``, as ``Trainer(max_steps=...)`` counts them.

    Args:
        at_step: round before this optimizer step; or
        at_epoch: round at the start of this epoch, 1 or more (0 would be the first); or
        at_fraction: round after this share of all steps, between 0 and 1. Give exactly one of the three.
        finetune_lr: restart the learning rate of the weights at this value when rounding, in place of what their
            scheduler says; groups keep their ratios, and the highest gets this value. None: the scheduler goes on.
        finetune_schedule: how it runs from there to the end of the training: "cosine" or "linear" to zero, "constant",
            "step", or a :class:`~lightning_acu.callbacks.schedules.Schedule`.
        collision: what to do when taps of one layer end on one pixel: "report" them (their weights add up, nothing is
            lost); raise an "error"; or "separate" them, each to a pixel of its own, as near as possible.
        keep: write the two checkpoints (weights only) and the picture. They go to the logger's directory, or without a
            logger to the trainer's ``default_root_dir``.

    Raises:
        ValueError: not exactly one of the three moments, or one out of range.
        RuntimeError: before training starts, if the model has no active convolution, or if the moment never comes or
            the strategy hides positions; when rounding, for collisions under "error".

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
    ) -> None:
        self.moment = Moment(at_step, at_epoch, at_fraction)
        check_collision(collision)
        if finetune_lr is not None and at_least("finetune_lr", finetune_lr) == 0:
            raise ValueError(f"`finetune_lr` (={finetune_lr}) must be positive; None lets the scheduler go on")
        if finetune_lr is None and finetune_schedule != "cosine":
            raise ValueError(f"`finetune_schedule` (={finetune_schedule!r}) does nothing without `finetune_lr`")
        self.finetune_lr = finetune_lr
        self.finetune_schedule = find_schedule("finetune_schedule", finetune_schedule)
        self.collision = collision
        self.keep = keep
        self._clock = PositionClock()
        self._forget()

    def _forget(self) -> None:
        #: The step at which positions were rounded, None before.
        self.rounded_at: int | None = None
        #: How far the taps of each layer had moved by then.
        self.learned: dict[str, LayerStatistics] = {}
        #: Where the model just before and just after rounding was saved.
        self.checkpoints: dict[str, str] = {}
        #: For each optimizer, its groups' learning rates over the highest, when rounding.
        self._ratios: list[list[float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier training; a checkpoint to resume from is read after this."""
        require_lightning(self, pl_module)
        if stage == "fit":
            if trainer.global_step == 0:
                self._forget()
            self._clock = GradientGate.add(pl_module, self._freeze).clock
            self._clock.set(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that there is something to round."""
        require_layers(self, pl_module)
        require_whole_positions(self, trainer)
        if self.keep:
            require_local_directory(self, trainer, "`keep` to False")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the step, and whether it can work."""
        step, steps = step_of_rounding(self, trainer), total_steps(trainer)
        if self.finetune_lr is not None and self.finetune_schedule.needs_total and math.isinf(steps):
            raise RuntimeError(
                f"RoundThenFinetune: `finetune_schedule` (={self.finetune_schedule}) needs a training with an end; "
                "set the trainer's max_steps or choose 'constant'"
            )
        if self.rounded_at is not None:
            rank_zero_info(f"RoundThenFinetune: positions were rounded at step {self.rounded_at} and stay frozen")
            self._restart_rates(trainer)
            return
        # Under manual optimisation the steps of an epoch are a guess.
        known = self.moment.at_epoch is None or pl_module.automatic_optimization
        if step is not None and step >= steps and known and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RuntimeError(f"RoundThenFinetune: {self.moment} is step {step}, but this training has only {steps}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Round when the moment has come."""
        if self.rounded_at is None and self.moment.has_come(trainer):
            self._round(trainer, pl_module)
        self._restart_rates(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go on with the restarted learning rate after a scheduler's step."""
        self._restart_rates(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Whole positions in averaged copies, before those are swapped in."""
        self._hold(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Whole positions in averaged copies; ``checkpoint`` has references to them."""
        self._hold(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Whole positions in what averaging made of the model; say so if the step never came."""
        self._hold(trainer, pl_module)  # WeightAveraging has copied its average into the model, or will
        if self.rounded_at is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"RoundThenFinetune: training ended at step {trainer.global_step}, before {self.moment}; "
                "the positions are not rounded"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning calls no teardown then."""
        self._leave(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if stage == "fit":
            self._leave(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Whether and when positions were rounded, for a resume."""
        return {
            "rounded_at": self.rounded_at,
            "learned": {name: vars(row) for name, row in self.learned.items()},
            "checkpoints": dict(self.checkpoints),
            "ratios": self._ratios,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint stopped."""
        self.rounded_at = state_dict["rounded_at"]
        self.learned = {name: LayerStatistics(**row) for name, row in state_dict["learned"].items()}
        self.checkpoints = dict(state_dict["checkpoints"])
        self._ratios = state_dict["ratios"]

    def _leave(self, pl_module: pl.LightningModule) -> None:
        GradientGate.remove(pl_module, self._freeze)
        self._clock.unset(self)

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = require_layers(self, pl_module)
        learned = {name: layer_statistics(layer) for name, layer in layers}
        self._keep(trainer, pl_module, "before_rounding")
        self._draw(trainer, pl_module)
        reshard(pl_module)  # a validation may have left parameters gathered, where changes would be lost
        report = round_layers(layers, self.collision)
        self.learned, self.rounded_at = learned, trainer.global_step
        keep_rounded_(pl_module, averages_of(trainer))
        rank_zero_info(f"RoundThenFinetune: rounded the positions at step {self.rounded_at}; {report}")
        if report.nothing_learned:
            rank_zero_warn(
                "RoundThenFinetune: after rounding all taps are where they started, so nothing was learned; raise the "
                "`multiplier` of PositionLRSchedule, or train longer before rounding"
            )
        for optimizer in trainer.optimizers:  # momentum of positions means nothing any more
            for _, layer in layers:
                optimizer.state.pop(layer.offsets, None)
        self._keep(trainer, pl_module, "rounded")
        self._ratios = [rate_ratios(optimizer) for optimizer in trainer.optimizers]

    def _hold(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not where another model is validated with the same trainer.
        if self.rounded_at is not None and trainer.state.fn == TrainerFn.FITTING:
            keep_rounded_(pl_module, averages_of(trainer))

    def _restart_rates(self, trainer: pl.Trainer) -> None:
        if self.finetune_lr is not None and self.rounded_at is not None:
            length = total_steps(trainer) - self.rounded_at
            share = self.finetune_schedule.rate(trainer.global_step - self.rounded_at, length)
            restart_rates(trainer.optimizers, self._ratios, self.finetune_lr * share)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> None:
        directory = run_directory(trainer)
        if self.keep and not trainer.fast_dev_run and not trainer.barebones:  # type: ignore[attr-defined]
            path = Path(directory, f"{name}.ckpt")
            with swapped_in(trainer, pl_module):
                trainer.save_checkpoint(path, weights_only=True)
            self.checkpoints[name] = str(path)

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        shapes = trained_shapes(pl_module)
        if trainer.is_global_zero and "before_rounding" in self.checkpoints:
            path = Path(self.checkpoints["before_rounding"]).with_name("shapes_before_rounding.png")
            plot_shapes(shapes, title=f"before rounding, iteration {trainer.global_step:,}").savefig(path)

    def _freeze(self, trainer: pl.Trainer, optimizer: Optimizer, layers: Sequence[ACUConv2d]) -> None:
        # None, not requires_grad=False: DDP waits for the gradient of every parameter it saw at the start.
        if not self._clock.may_learn(trainer):
            for layer in layers:
                layer.offsets.grad = None
