"""Train positions with a learning rate of their own: parameter group, warm-up, schedule, normalised gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ..checks import at_least, few, whole_number
from ..conv import ACUConv2d
from ..sharded import whole
from ..training import (
    LearningPhase,
    Multiplier,
    Normalize,
    PositionPlan,
    PositionRates,
    Schedule,
    drop_gradients_,
    early_word,
    find_normalize,
    find_schedule,
    time_for_a_word,
    trained_layers,
    unused_positions,
)
from ._clock import PositionClock, Warmup
from ._gate import GradientGate
from ._position_groups import PositionGroups
from ._promises import PositionCallback, offsets_of
from ._trainer import (
    callbacks_of,
    require_full_precision,
    require_grids,
    require_layers,
    require_lightning,
    require_whole_positions,
)

__all__ = ["PositionLRSchedule"]

_PAPERS_WARMUP = 10_000

#: In pixels (units of the dilation): taps that have moved further have most likely diverged.
_FAR = 25


class PositionLRSchedule(PositionCallback):
    """Trains positions as the paper does: a small learning rate, after a warm-up, along normalised gradients.

    Positions move into a parameter group of their own (named "acu_positions"). Its learning rate is, at every step and
    under any scheduler, that of the group they came from times ``multiplier`` times the factor of ``schedule``.
    Gradients are normalised when they are complete (accumulated, averaged over processes, unscaled). Gradient clipping
    of the weights does not see the positions.

    How far a tap can move in one step: with ``normalize`` and SGD, the learning rate in pixels (with momentum m up to
    1 / (1 - m) times that). Adam rescales every gradient itself, so that a step is about the learning rate in each
    direction, with or without ``normalize``. Taps do not move straight: to end up half a pixel away they travel some
    tens of pixels, so that a training of a few thousand steps needs a larger multiplier than the paper's training of
    64,000 (examples in docs/training.md).

    Steps are the trainer's ``global_step``, as ``Trainer(max_steps=...)`` counts them.

    Args:
        multiplier: learning rate of positions over that of the group they came from. "auto" finds it from the steps in
            which they learn, for SGD and the Adam family, see :class:`~lightning_acu.training.PositionRates`.
        warmup_steps: optimizer steps at the start in which positions do not move at all.
        normalize: "gradient", the paper: scale each tap's gradient (g_y, g_x) to length 1. "momentum": average the
            gradients over steps, scale that to length 1, and set the optimizer's own momentum of positions to 0, see
            :class:`~lightning_acu.training.PositionGradients`. None: neither.
        weight_decay: for positions; it pulls the taps back to the regular grid.
        schedule: a further factor on the learning rate, from the end of the warm-up until positions are rounded (see
            RoundThenFinetune) or the training ends: "constant", "cosine", "linear", "step", "lattice" (anneals the taps
            onto whole pixels), "dilation" (onto plain dilated grids), or a
            :class:`~lightning_acu.training.schedules.Schedule`.
        warmup_epochs: epochs of warm-up, instead of ``warmup_steps``.
        max_displacement: maximum distance in pixels of a tap from where it started, while positions learn; None for no
            limit. Rounding moves taps to the nearest pixel, which may be slightly further away.
        optimizer_idx: the index of the optimizer whose positions to train, in the order of ``configure_optimizers``;
            None for all optimizers that hold positions. Use one callback for each optimizer to train them differently.
        target_displacement: with ``multiplier="auto"`` how far taps should end from where they started, on average, in
            pixels; 0.5 by default.

    Raises:
        ValueError: a negative argument, both kinds of warm-up, or an unknown schedule.
        RuntimeError: before training starts, if the model has no active convolution, no optimizer holds its positions,
            ``optimizer_idx`` does not exist, positions would be rounded before the warm-up ends, the schedule needs
            the length of a training whose end is not known, the schedule "dilation" meets a free shape, or the strategy
            or optimizer is not supported.

    Example::

        trainer = Trainer(max_steps=64_000, callbacks=[PositionLRSchedule(multiplier=0.01, warmup_steps=10_000)])

    Source: Jeon & Kim, CVPR 2017, sections 3.3 and 4.1.
    """

    def __init__(
        self,
        multiplier: Multiplier = 0.01,
        warmup_steps: int = _PAPERS_WARMUP,
        normalize: Normalize | bool | None = "gradient",
        weight_decay: float = 0.0,
        schedule: str | Schedule = "constant",
        warmup_epochs: int | None = None,
        max_displacement: float | None = None,
        optimizer_idx: int | None = None,
        target_displacement: float | None = None,
    ) -> None:
        if warmup_epochs is not None and warmup_steps != _PAPERS_WARMUP:
            raise ValueError(
                f"give either `warmup_steps` (={warmup_steps}) or `warmup_epochs` (={warmup_epochs}), not both"
            )
        self.multiplier = multiplier
        self.warmup_steps = whole_number("warmup_steps", warmup_steps) if warmup_epochs is None else 0
        self.normalize = find_normalize(normalize)
        self.weight_decay = at_least("weight_decay", weight_decay)
        self.schedule = find_schedule("schedule", schedule)
        self.warmup_epochs = None if warmup_epochs is None else whole_number("warmup_epochs", warmup_epochs)
        self.max_displacement = None if max_displacement is None else at_least("max_displacement", max_displacement)
        self.optimizer_idx = None if optimizer_idx is None else whole_number("optimizer_idx", optimizer_idx)
        self._warmup = Warmup(self.warmup_steps, self.warmup_epochs or 0)
        self._clock = PositionClock()
        self._plan = PositionPlan(LearningPhase(self.warmup_steps, math.inf), None, self.schedule)
        self._step = 0
        rates = PositionRates(multiplier, target_displacement, self.normalize)
        self._groups = PositionGroups(rates, self.weight_decay, self.optimizer_idx)
        self._forget()

    def _forget(self) -> None:
        self._warned_far = False
        self._still: dict[str, Tensor] = {}  # where positions started, while the warm-up lasts
        self._moved: list[str] = []  # the layers whose positions moved in the warm-up
        self._looked_at: set[int] = set()  # the ids of optimizers whose gradients were looked at

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the gate between gradients and optimizers, before LearningRateFinder takes its first steps."""
        require_lightning(self, pl_module)
        if stage == "fit":
            self._forget()
            self._clock = GradientGate.add(pl_module, self._transform).clock
            self._clock.begin(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Split the parameter groups, before the optimizers' state is restored from a checkpoint."""
        layers = require_layers(self, pl_module)
        require_whole_positions(self, trainer)
        require_full_precision(self, pl_module)
        if self.schedule.pull_to == "dilation":
            require_grids(self, layers)
        for other in callbacks_of(trainer):
            indices = (getattr(other, "optimizer_idx", None), self.optimizer_idx)
            overlap = None in indices or indices[0] == indices[1]
            if isinstance(other, PositionLRSchedule) and other is not self and overlap:
                raise RuntimeError(
                    f"PositionLRSchedule: two of these callbacks train the positions of one optimizer (`optimizer_idx` "
                    f"{indices[0]} and {indices[1]}); keep one, or give each an `optimizer_idx` of its own"
                )
        self._groups.split(trainer, layers)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the steps in which positions learn, and check them."""
        phase = self._clock.phase(trainer, self._warmup)
        self._plan = PositionPlan(phase, None, self.schedule)
        auto = self.multiplier == "auto"
        if math.isinf(phase.length) and (self.schedule.needs_total or auto):
            needs = "`multiplier` (='auto')" if auto else f"`schedule` (={self.schedule})"
            raise RuntimeError(
                f"PositionLRSchedule: {needs} needs a training with a known end; "
                + (
                    "the loader has no length, so give `warmup_steps` instead of `warmup_epochs`"
                    if math.isinf(phase.start)
                    else "set the trainer's max_steps, or round at a given step"
                )
            )
        self._step = trainer.global_step
        self._find_rates(trainer)
        self._tie(trainer)
        if self._warmup.lasts(trainer, trainer.global_step):
            held = {id(layer) for layer in self._layers(trainer)}
            mine = {name for name, layer in require_layers(self, pl_module) if id(layer) in held}
            self._still = {name: offsets for name, offsets in offsets_of(pl_module).items() if name in mine}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the ratio after a scheduler that steps between epochs: LearningRateMonitor reads the rates now."""
        self._tie(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the ratio of learning rates."""
        if self._groups.have_changed(trainer):
            self._groups.update(trainer, require_layers(self, pl_module))
            self._find_rates(trainer)
        self._tie(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep the ratio if the module steps its schedulers itself."""
        self._tie(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move taps back inside their limit and towards whole pixels; keep the ratio after a scheduler's step."""
        before, self._step = self._step, trainer.global_step
        if self._step > before and self._clock.may_learn(trainer, self._warmup, self._step - 1):
            self._plan.confine(self._layers(trainer), before, self._step, self.max_displacement)
            if time_for_a_word(self._plan.phase, before, self._step):
                optimizers = self._groups.optimizers(trainer)
                arguments = (optimizers, self._plan.phase, self.multiplier, self.normalize)
                if text := early_word(self._layers(trainer), *arguments):
                    rank_zero_warn(f"PositionLRSchedule: {text}")
        self._tie(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of taps that have diverged, and of gradients that are not finite; each once."""
        layers = require_layers(self, pl_module)
        if not self._warned_far:
            furthest = torch.stack(
                [layer.displacement.abs().max().cpu() / max(layer.dilation[0], 1) for _, layer in layers]
            ).max()  # nan where any is
            if furthest > _FAR:
                self._warned_far = True
                rank_zero_warn(
                    f"PositionLRSchedule: taps are up to {furthest:.0f} pixels (in units of the dilation) from where "
                    f"they started; lower `multiplier` (={self.multiplier}) or set `max_displacement`"
                )
        gate = GradientGate.of(pl_module)
        if gate is not None and not gate.said and (text := gate.say_not_finite()):
            rank_zero_warn(f"PositionLRSchedule: {text}")

    def broken_promises(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Positions that are not finite, or moved in the warm-up."""
        broken = []
        layers = trained_layers(pl_module)
        self._look_at_still(pl_module, [layer for _, layer in layers])
        if names := [name for name, layer in layers if not layer.active_offsets().isfinite().all()]:
            broken.append(
                f"the positions of {few(names)} are not finite (nan or inf), although gradients that are not finite "
                "are left out: something other than the optimizer changed them"
            )
        if self._moved:
            broken.append(
                f"the positions of {few(sorted(self._moved))} moved in the warm-up ({self._warmup}): something other "
                "than a step of the optimizer changed them, such as weights that were loaded or averaged"
            )
        return broken

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the module's methods: Lightning does not call teardown after an exception."""
        GradientGate.remove(pl_module, self._transform)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the module's methods."""
        if stage == "fit":
            GradientGate.remove(pl_module, self._transform)

    def _look_at_still(self, pl_module: pl.LightningModule, layers: Sequence[ACUConv2d]) -> None:
        """Compare the positions of ``layers`` with those at the start: before their first step, or at the end."""
        ids = {id(layer) for layer in layers}
        now = {name: layer.offsets for name, layer in trained_layers(pl_module) if id(layer) in ids}
        for name in self._still.keys() & now.keys():
            if not torch.equal(whole(now[name].detach()).cpu(), self._still.pop(name)):
                self._moved.append(name)

    def _find_rates(self, trainer: pl.Trainer) -> None:
        phase = self._plan.phase
        self._groups.find_rates(trainer, phase.length - phase.time(trainer.global_step))

    def _tie(self, trainer: pl.Trainer) -> None:
        self._groups.tie(trainer, self._plan.factor(trainer.global_step))

    def _layers(self, trainer: pl.Trainer) -> list[ACUConv2d]:
        """The layers whose positions are in this callback's optimizers."""
        gate = GradientGate.of(trainer.lightning_module)
        assert gate is not None
        return [layer for optimizer in self._groups.optimizers(trainer) for layer in gate.layers_of(optimizer)]

    def _transform(self, trainer: pl.Trainer, optimizer: Optimizer, layers: Sequence[ACUConv2d]) -> Normalize | None:
        if self.optimizer_idx is not None:
            mine = {id(layer) for layer in self._layers(trainer)}
            layers = [layer for layer in layers if id(layer) in mine]
        if not layers:
            return None
        # LearningRateFinder and BatchSizeFinder remove all callbacks and give all groups the same learning rate.
        attached = self in callbacks_of(trainer)
        if attached and id(optimizer) not in self._looked_at:
            self._looked_at.add(id(optimizer))
            mine = {id(layer) for layer in layers}
            named = [pair for pair in trained_layers(trainer.lightning_module) if id(pair[1]) in mine]
            # Rounded positions need no gradient.
            if self._clock.may_learn(trainer) and (text := unused_positions(named)):
                rank_zero_warn(f"PositionLRSchedule: {text}")
        if not attached or not self._clock.may_learn(trainer, self._warmup):
            drop_gradients_(layers)
        elif self._still:
            self._look_at_still(trainer.lightning_module, layers)
        return self.normalize
