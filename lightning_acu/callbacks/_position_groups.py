"""The parameter groups of positions in a trainer's optimizers, as callbacks thaw and freeze what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import LBFGS, Optimizer

from ..conv import ACUConv2d
from ..training import add_late_positions, split_off_positions
from ._layers import callbacks_of

__all__ = ["PositionGroups"]


class PositionGroups:
    """What PositionLRSchedule serves: the positions in all optimizers, or in that of ``optimizer_idx``."""

    def __init__(self, multiplier: float, weight_decay: float, optimizer_idx: int | None) -> None:
        self.multiplier = multiplier
        self.weight_decay = weight_decay
        self.optimizer_idx = optimizer_idx
        self._count = 0

    def optimizers(self, trainer: pl.Trainer) -> list[Optimizer]:
        """The optimizers that are served."""
        return trainer.optimizers if self.optimizer_idx is None else [trainer.optimizers[self.optimizer_idx]]

    def claim(self, trainer: pl.Trainer, layers: Sequence[tuple[str, ACUConv2d]]) -> None:
        """Put the positions of ``layers`` into groups of their own, before any training.

        Raises:
            RuntimeError: there is nothing to serve, or something that cannot be; see PositionLRSchedule.
        """
        if self.optimizer_idx is not None and self.optimizer_idx >= len(trainer.optimizers):
            raise RuntimeError(
                f"PositionLRSchedule: `optimizer_idx` (={self.optimizer_idx}) does not exist, "
                f"configure_optimizers made {len(trainer.optimizers)}"
            )
        late = self._finetuning(trainer)
        for callback in late:  # after a resume it puts groups back that it had made, here: have that first
            BaseFinetuning.on_fit_start(callback, trainer, trainer.lightning_module)
        if not late and not any(layer.offsets.requires_grad for _, layer in layers):
            raise RuntimeError(
                "PositionLRSchedule: the positions of all layers have requires_grad=False; thaw some with "
                "layer.offsets.requires_grad_(True), see lightning_acu.acu_layers"
            )
        if added := add_late_positions(self.optimizers(trainer), layers):
            rank_zero_info(f"PositionLRSchedule: gave the positions of {len(added)} layers to an optimizer made before")
        split = self._split(trainer, layers)
        lost = [name for name, layer in layers if layer.offsets.requires_grad and id(layer.offsets) not in split]
        if lost and self.optimizer_idx is None:
            raise RuntimeError(
                f"PositionLRSchedule: no optimizer holds the positions of {', '.join(lost[:3])}"
                f"{' and others' if len(lost) > 3 else ''}, nor their weights; give them to one in "
                "configure_optimizers, or freeze them with requires_grad_(False)"
            )
        if not split and not late:
            raise RuntimeError(f"PositionLRSchedule: optimizer {self.optimizer_idx} holds no positions")

    def have_changed(self, trainer: pl.Trainer) -> bool:
        """Whether somebody has added a parameter group, as BackboneFinetuning does when it thaws."""
        return self._count != self._groups_of(trainer)

    def follow(self, trainer: pl.Trainer, layers: Sequence[tuple[str, ACUConv2d]]) -> None:
        """Split off the positions that came with new groups."""
        # BackboneFinetuning leaves out what equals a parameter that the optimizer holds: positions that never moved.
        add_late_positions(self.optimizers(trainer), layers)
        self._split(trainer, layers)

    def _split(self, trainer: pl.Trainer, layers: Sequence[tuple[str, ACUConv2d]]) -> set[int]:
        """Positions into groups of their own; the ids of all that our optimizers hold."""
        # Frozen ones too: who thaws them later need not know of us.
        offsets = [layer.offsets for _, layer in layers]
        # BackboneFinetuning sets the learning rates of the first and of the last group.
        keep_last = bool(self._finetuning(trainer))
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        held: set[int] = set()
        for optimizer in self.optimizers(trainer):
            if isinstance(optimizer, LBFGS):
                raise RuntimeError("PositionLRSchedule: LBFGS has no parameter groups; choose another optimizer")
            own = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
            found = split_off_positions(optimizer, own, offsets, self.multiplier, self.weight_decay, keep_last)
            held |= {id(parameter) for parameter in found}
        self._count = self._groups_of(trainer)
        return held

    def _groups_of(self, trainer: pl.Trainer) -> int:
        return sum(len(optimizer.param_groups) for optimizer in self.optimizers(trainer))

    @staticmethod
    def _finetuning(trainer: pl.Trainer) -> list[BaseFinetuning]:
        return [callback for callback in callbacks_of(trainer) if isinstance(callback, BaseFinetuning)]
