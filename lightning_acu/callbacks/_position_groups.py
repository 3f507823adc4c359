"""The parameter groups of positions in a trainer's optimizers, also when other callbacks add groups during training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import LBFGS, Optimizer

from ..conv import ACUConv2d
from ..training import PositionRates, add_late_positions, split_off_positions
from ._trainer import callbacks_of

__all__ = ["PositionGroups"]


class PositionGroups:
    """The positions that PositionLRSchedule trains: those of all optimizers, or of optimizer ``optimizer_idx``."""

    def __init__(self, rates: PositionRates, weight_decay: float, optimizer_idx: int | None) -> None:
        self.rates = rates
        self.weight_decay = weight_decay
        self.optimizer_idx = optimizer_idx
        self._count = 0

    def optimizers(self, trainer: pl.Trainer) -> list[Optimizer]:
        """The optimizers whose positions these are."""
        return trainer.optimizers if self.optimizer_idx is None else [trainer.optimizers[self.optimizer_idx]]

    def split(self, trainer: pl.Trainer, layers: Sequence[tuple[str, ACUConv2d]]) -> None:
        """Move the positions of ``layers`` into groups of their own, before training starts.

        Raises:
            RuntimeError: there are no positions to train, or the optimizer cannot; see PositionLRSchedule.
        """
        if self.optimizer_idx is not None and self.optimizer_idx >= len(trainer.optimizers):
            raise RuntimeError(
                f"PositionLRSchedule: `optimizer_idx` (={self.optimizer_idx}) does not exist; "
                f"the number of optimizers is {len(trainer.optimizers)}"
            )
        finetuning = self._finetuning(trainer)
        for callback in finetuning:  # in a resumed training its on_fit_start restores its groups: they have to be first
            BaseFinetuning.on_fit_start(callback, trainer, trainer.lightning_module)
        if not finetuning and not any(layer.offsets.requires_grad for _, layer in layers):
            raise RuntimeError(
                "PositionLRSchedule: the positions of all layers have requires_grad=False; unfreeze some with "
                "layer.offsets.requires_grad_(True), see lightning_acu.acu_layers"
            )
        if added := add_late_positions(self.optimizers(trainer), layers):
            rank_zero_info(f"PositionLRSchedule: added the positions of {len(added)} layers to an existing optimizer")
        held = self._split(trainer, layers)
        missing = [name for name, layer in layers if layer.offsets.requires_grad and id(layer.offsets) not in held]
        if missing and self.optimizer_idx is None:
            raise RuntimeError(
                f"PositionLRSchedule: no optimizer holds the positions of {', '.join(missing[:3])}"
                f"{' and others' if len(missing) > 3 else ''}, nor their weights; give them to one in "
                "configure_optimizers, or freeze them with requires_grad_(False)"
            )
        if not held and not finetuning:
            raise RuntimeError(f"PositionLRSchedule: optimizer {self.optimizer_idx} holds no positions")

    def find_rates(self, trainer: pl.Trainer, steps: float) -> None:
        """Find the multiplier where it is "auto", for positions that learn in ``steps`` steps."""
        for optimizer in self.optimizers(trainer):
            self.rates.find(optimizer, steps)

    def tie(self, trainer: pl.Trainer, factor: float) -> None:
        """Set the learning rates of positions."""
        for optimizer in self.optimizers(trainer):
            self.rates.tie(optimizer, factor)

    def have_changed(self, trainer: pl.Trainer) -> bool:
        """Whether a parameter group was added, as BackboneFinetuning does when it unfreezes the backbone."""
        return self._count != self._groups_of(trainer)

    def update(self, trainer: pl.Trainer, layers: Sequence[tuple[str, ACUConv2d]]) -> None:
        """Split off the positions that came with new groups."""
        # BackboneFinetuning skips parameters equal to one that the optimizer holds, such as positions that never moved.
        add_late_positions(self.optimizers(trainer), layers)
        self._split(trainer, layers)

    def _split(self, trainer: pl.Trainer, layers: Sequence[tuple[str, ACUConv2d]]) -> set[int]:
        """Move positions into groups of their own; returns the ids of all that the optimizers hold."""
        offsets = [layer.offsets for _, layer in layers]  # frozen ones too: they may be unfrozen later
        # BackboneFinetuning sets the learning rates of the first and of the last group.
        keep_last = bool(self._finetuning(trainer))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        held: set[int] = set()
        for optimizer in self.optimizers(trainer):
            if isinstance(optimizer, LBFGS):
                raise RuntimeError("PositionLRSchedule: LBFGS takes one parameter group only; choose another optimizer")
            own = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
            positions = split_off_positions(
                optimizer, own, offsets, self.rates.multiplier, self.weight_decay, keep_last
            )
            held |= {id(parameter) for parameter in positions}
        self._count = self._groups_of(trainer)
        return held

    def _groups_of(self, trainer: pl.Trainer) -> int:
        return sum(len(optimizer.param_groups) for optimizer in self.optimizers(trainer))

    @staticmethod
    def _finetuning(trainer: pl.Trainer) -> list[BaseFinetuning]:
        return [callback for callback in callbacks_of(trainer) if isinstance(callback, BaseFinetuning)]
