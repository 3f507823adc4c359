"""Round the learned positions to whole pixels, then let the weights adapt."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ..conv import ACUConv2d
from ..figures import plot_shapes
from ..metrics import LayerStatistics, model_statistics
from ..surgery import round_acu
from ._gradients import GradientGate, require_layers, transform_before_manual_step
from .directory import run_directory
from .position_lr import PositionLRSchedule

__all__ = ["RoundThenFinetune"]


class RoundThenFinetune(pl.Callback):
    """Rounds all positions to the lattice at one step, and trains on with positions frozen (the paper's ACU-Round).

    After rounding a layer is a plain convolution again, or a sparse one, and runs everywhere; the fine-tuning lets the
    weights make up for the taps that moved. Positions stay bit for bit from then on, also after a resume. The log
    directory keeps the model just before and just after (``before_rounding.ckpt``, ``rounded.ckpt``) and the learned
    shapes (``shapes_before_rounding.png``).

    Args:
        at_step: round before this optimizer step; or
        at_epoch: round at the start of this epoch, 1 or more (0 would be the first); or
        at_fraction: round after this share of all steps, between 0 and 1. Give exactly one of the three.
        collision: what to do when taps of one layer end on one pixel: "report" them (their weights add up, nothing is
            lost), or raise an "error".

    Raises:
        ValueError: not exactly one of the three moments, or one out of range.
        RuntimeError: at the start of training, if the model has no active convolution, or if the moment never comes
            or comes before the warm-up of a PositionLRSchedule ends; when rounding, for collisions under "error".

    Source: Jeon & Kim, CVPR 2017, section 4.1 (ACU rounded to integer positions, then fine-tuned).
    """

    def __init__(
        self,
        at_step: int | None = None,
        at_epoch: int | None = None,
        at_fraction: float | None = None,
        collision: Literal["report", "error"] = "report",
    ) -> None:
        given = {"at_step": at_step, "at_epoch": at_epoch, "at_fraction": at_fraction}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            raise ValueError(f"give exactly one of `at_step`, `at_epoch` and `at_fraction`, got {chosen or 'none'}")
        ((name, value),) = chosen.items()
        if value <= 0 or (name == "at_fraction" and value >= 1):
            raise ValueError(
                f"`{name}` (={value}) must be {'between 0 and 1' if name == 'at_fraction' else '1 or more'}"
            )
        if collision not in ("report", "error"):
            raise ValueError(f"`collision` (={collision!r}) must be 'report' or 'error'")
        self.at_step = at_step
        self.at_epoch = at_epoch
        self.at_fraction = at_fraction
        self.collision = collision
        #: The step at which positions were rounded, None before.
        self.rounded_at: int | None = None
        #: How far the taps of each layer had moved by then.
        self.learned: dict[str, LayerStatistics] = {}
        #: Where the model just before and just after rounding was saved.
        self.checkpoints: dict[str, str] = {}
        self._step: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier training; a checkpoint to resume from is read after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.rounded_at, self.learned, self.checkpoints = None, {}, {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stand between the gradients and the optimizers; a no-op until rounding."""
        require_layers(self, pl_module)
        GradientGate.add(pl_module, self._freeze)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the step, and whether it can work."""
        if self.rounded_at is not None:
            return
        steps = trainer.estimated_stepping_batches
        self._step = self._find_step(trainer, steps)
        if self._step is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._step >= steps:
            raise RuntimeError(
                f"RoundThenFinetune: {self._moment()} is step {self._step}, but this training has only {steps}"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PositionLRSchedule) and callback.warmup_steps >= self._step:
                raise RuntimeError(
                    f"RoundThenFinetune: {self._moment()} is step {self._step}, before the warm-up of "
                    f"PositionLRSchedule ends (`warmup_steps`={callback.warmup_steps}); nothing would have moved. "
                    "Train longer, round later or warm up for fewer steps"
                )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Round when the moment has come."""
        if self.at_epoch is not None:
            due = trainer.current_epoch >= self.at_epoch
        else:
            due = self._step is not None and trainer.global_step >= self._step
        if due and self.rounded_at is None:
            self._round(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Manual optimisation: freeze here."""
        transform_before_manual_step(pl_module, optimizer, self._freeze)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the step never came."""
        if self.rounded_at is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"RoundThenFinetune: training ended at step {trainer.global_step}, before {self._moment()}; "
                "the positions are not rounded"
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: Lightning calls no teardown then."""
        GradientGate.remove(pl_module, self._freeze)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        GradientGate.remove(pl_module, self._freeze)

    def state_dict(self) -> dict[str, Any]:
        """Whether and when positions were rounded, for a resume."""
        learned = {name: vars(row) for name, row in self.learned.items()}
        return {"rounded_at": self.rounded_at, "learned": learned, "checkpoints": dict(self.checkpoints)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint stopped."""
        self.rounded_at = state_dict["rounded_at"]
        self.learned = {name: LayerStatistics(**row) for name, row in state_dict["learned"].items()}
        self.checkpoints = dict(state_dict["checkpoints"])

    def _find_step(self, trainer: pl.Trainer, steps: float) -> int | None:
        """The optimizer step before which to round; None where epochs have no known length."""
        if self.at_step is not None:
            return self.at_step
        if self.at_epoch is not None:
            batches = trainer.num_training_batches
            return None if math.isinf(batches) else self.at_epoch * math.ceil(batches / trainer.accumulate_grad_batches)
        assert self.at_fraction is not None
        if math.isinf(steps):
            raise RuntimeError(
                f"RoundThenFinetune: `at_fraction` (={self.at_fraction}) of a training without end is no step; "
                "set the trainer's max_steps or max_epochs, or give `at_step`"
            )
        return math.ceil(self.at_fraction * steps)

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = require_layers(self, pl_module)
        learned = model_statistics(pl_module)
        self._keep(trainer, "before_rounding")
        self._draw(trainer, pl_module)
        before = [layer.offsets.detach().clone() for _, layer in layers]
        round_acu(pl_module)
        collisions = {name: row.collisions for name, row in model_statistics(pl_module).items() if row.collisions}
        text = ", ".join(f"{count} in {name}" for name, count in collisions.items())
        if collisions and self.collision == "error":
            with torch.no_grad():
                for (_, layer), old in zip(layers, before, strict=True):
                    layer.offsets.copy_(old)
            raise RuntimeError(f"RoundThenFinetune: taps fell on the pixel of another: {text} (`collision`='error')")
        self.learned, self.rounded_at = learned, trainer.global_step
        distances = [
            (layer.offsets.detach() - old).view(layer.position_groups, -1, 2).norm(dim=-1)[:, layer.movable].flatten()
            for (_, layer), old in zip(layers, before, strict=True)
        ]
        moved = torch.cat([distance.cpu() for distance in distances])
        rank_zero_info(
            f"RoundThenFinetune: rounded the positions at step {self.rounded_at}; {len(moved)} taps moved "
            f"{moved.mean():.2f} pixels on average, {moved.max():.2f} at most; "
            + (f"taps that fell on the pixel of another: {text}" if text else "no two taps fell on one pixel")
        )
        for optimizer in trainer.optimizers:  # momentum of positions means nothing any more
            for _, layer in layers:
                optimizer.state.pop(layer.offsets, None)
        self._keep(trainer, "rounded")

    def _keep(self, trainer: pl.Trainer, name: str) -> None:
        directory = run_directory(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = Path(directory, f"{name}.ckpt")
            trainer.save_checkpoint(path, weights_only=True)
            self.checkpoints[name] = str(path)

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "before_rounding" in self.checkpoints:
            path = Path(self.checkpoints["before_rounding"]).with_name("shapes_before_rounding.png")
            plot_shapes(pl_module, title=f"before rounding, iteration {trainer.global_step:,}").savefig(path)

    def _freeze(self, layer: ACUConv2d, grad: Tensor) -> Tensor | None:
        # None, not requires_grad=False: DDP waits for the gradient of every parameter it saw at the start.
        return grad if self.rounded_at is None else None

    def _moment(self) -> str:
        name = next(name for name in ("at_step", "at_epoch", "at_fraction") if getattr(self, name) is not None)
        return f"`{name}` (={getattr(self, name)})"
