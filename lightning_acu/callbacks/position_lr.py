"""Positions learn at their own pace: own parameter group, warm-up, normalised gradient."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ..conv import ACUConv2d
from ._gradients import GradientGate, require_layers, transform_before_manual_step, unit_gradients
from ._param_groups import split_off_positions, tie_learning_rates

__all__ = ["PositionLRSchedule"]


class PositionLRSchedule(pl.Callback):
    """Trains positions as the paper does: a small learning rate, after a warm-up, along normalised gradients.

    Positions move into a parameter group of their own (named "acu_positions"), whose learning rate is ``multiplier``
    times that of the group they came from, at every step and under any torch scheduler. Weights are clipped as if
    the positions were not there.

    How far a tap can move in one step: with ``normalize`` and SGD, the learning rate in pixels (with momentum m up to
    1 / (1 - m) times that). Adam rescales every gradient by itself, so that a step is about the learning rate in each
    direction, with or without ``normalize``. A schedule of a few thousand steps needs a larger multiplier than the
    paper's 64,000: aim at a learning rate of positions such that it times the steps left is one or two pixels.

    Args:
        multiplier: learning rate of positions over that of the other parameters.
        warmup_steps: optimizer steps for which positions stay exactly where they are.
        normalize: scale each tap's gradient (g_y, g_x) to length 1.
        weight_decay: for positions; it pulls the taps back to the regular grid.

    Raises:
        ValueError: a negative argument.
        RuntimeError: at the start of training, if the model has no active convolution or no optimizer holds one's
            positions.

    Example::

        trainer = Trainer(max_steps=64_000, callbacks=[PositionLRSchedule(multiplier=0.01, warmup_steps=10_000)])

    Source: Jeon & Kim, CVPR 2017, sections 3.3 and 4.1.
    """

    def __init__(
        self,
        multiplier: float = 0.01,
        warmup_steps: int = 10_000,
        normalize: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("multiplier", multiplier), ("warmup_steps", warmup_steps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"`{name}` (={value}) must not be negative")
        self.multiplier = multiplier
        self.warmup_steps = warmup_steps
        self.normalize = normalize
        self.weight_decay = weight_decay
        self._step = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Split the parameter groups, before the optimizers' state is restored from a checkpoint."""
        layers = require_layers(self, pl_module)
        offsets = [layer.offsets for _, layer in layers if layer.offsets.requires_grad]
        if not offsets:
            raise RuntimeError("PositionLRSchedule: the positions of all layers have requires_grad=False; thaw some")
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        held: set[int] = set()
        for optimizer in trainer.optimizers:
            own = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
            found = split_off_positions(optimizer, own, offsets, self.multiplier, self.weight_decay)
            held |= {id(parameter) for parameter in found}
        lost = [name for name, layer in layers if layer.offsets.requires_grad and id(layer.offsets) not in held]
        if lost:
            raise RuntimeError(
                f"PositionLRSchedule: no optimizer holds the positions of {', '.join(lost[:3])}"
                f"{' and others' if len(lost) > 3 else ''}; convert the model before the optimizer is made"
            )
        GradientGate.add(pl_module, self._transform)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn where the warm-up never ends."""
        steps = trainer.estimated_stepping_batches
        if steps <= self.warmup_steps and self.multiplier > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"PositionLRSchedule: `warmup_steps` (={self.warmup_steps}) is no less than the {steps} steps of this "
                "training, so the positions will never move; choose fewer"
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the ratio of learning rates."""
        for optimizer in trainer.optimizers:
            tie_learning_rates(optimizer, self.multiplier)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the step; under manual optimisation, also change the gradients here."""
        tie_learning_rates(optimizer, self.multiplier)
        self._step = trainer.global_step
        transform_before_manual_step(pl_module, optimizer, self._transform)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning calls no teardown then."""
        GradientGate.remove(pl_module, self._transform)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        GradientGate.remove(pl_module, self._transform)

    def _transform(self, layer: ACUConv2d, grad: Tensor) -> Tensor | None:
        # No gradient at all during the warm-up: a zero one would let momentum and decay move the taps.
        if self._step < self.warmup_steps:
            return None
        return unit_gradients(layer, grad) if self.normalize else grad
