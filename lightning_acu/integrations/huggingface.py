"""Training of positions under Hugging Face's Trainer."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from ..checks import require_package
from ..training import PositionTrainer, on_whole_pixels, trained_layers

require_package("transformers", "lightning_acu.integrations.huggingface")

from transformers import Trainer, TrainerCallback  # noqa: E402

__all__ = ["PositionCallback"]


class PositionCallback(TrainerCallback):
    """Trains the positions of the model of a ``transformers.Trainer`` by a PositionTrainer.

    Trainer makes its optimizer when training starts, and loads a checkpoint into it before it calls any callback.
    So this one is given the trainer, and replaces its ``create_optimizer`` by one that adds the PositionTrainer. Steps
    and rounding are in the optimizer's state: ``train(resume_from_checkpoint=...)`` goes on exactly.

    Args:
        trainer: the trainer; its model is converted.
        **positions: arguments of :class:`~lightning_acu.training.PositionTrainer`; ``total_steps`` is Trainer's.

    Attributes:
        positions: the :class:`~lightning_acu.training.PositionTrainer`; None before training.

    Raises:
        TypeError: an argument that PositionTrainer does not have.
        RuntimeError: when training starts, if Trainer uses another optimizer (DeepSpeed's).

    Warns:
        UserWarning: the checkpoint to resume from has no state of the optimizer; the model at the end is not on whole
            pixels though positions were rounded, since its best checkpoint is from before that.

    Example::

        trainer = Trainer(model, args, train_dataset=images)
        trainer.add_callback(PositionCallback(trainer, multiplier=10.0, warmup_steps=100, round_at=0.7))
        trainer.train()
    """

    def __init__(self, trainer: Trainer, **positions: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"`trainer` must be a transformers.Trainer, got {type(trainer).__name__}")
        inspect.signature(PositionTrainer).bind(None, None, **positions)
        self.positions: PositionTrainer | None = None
        create = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            optimizer = create(*args, **kwargs)
            if self.positions is None or self.positions.optimizer is not _inner(optimizer):
                schedulers = [trainer.lr_scheduler] if trainer.lr_scheduler is not None else None
                total = trainer.state.max_steps or None  # 0 in versions that make the optimizer before they know it
                arguments: dict[str, Any] = {"total_steps": total, "schedulers": schedulers} | positions
                self.positions = PositionTrainer(_inner(optimizer), trainer.model, **arguments)
            return optimizer

        trainer.create_optimizer = create_optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the optimizer that trains is the one with the positions."""
        optimizer = kwargs["optimizer"]
        if self.positions is None or self.positions.optimizer is not _inner(optimizer):
            raise RuntimeError(
                f"Trainer uses an optimizer ({type(optimizer).__name__}) that its create_optimizer did not make, so no "
                "positions would be trained; train without DeepSpeed, and give the callback this Trainer"
            )
        if state.global_step and not self.positions.step:
            warnings.warn(
                f"the checkpoint of step {state.global_step} has no state of the optimizer (save_only_model?), which "
                "holds the steps of positions: their warm-up starts now",
                stacklevel=2,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that rounded positions are on whole pixels; Trainer has loaded its best checkpoint."""
        if self.positions is not None and self.positions.rounded:
            layers = trained_layers(kwargs["model"])
            if not all(on_whole_pixels(layer.offsets.detach()) for _, layer in layers):
                warnings.warn(
                    f"the best checkpoint ({state.best_model_checkpoint}) is from before positions were rounded, so "
                    "they are not on whole pixels; set load_best_model_at_end=False, or call "
                    f"lightning_acu.round_acu(model, to={self.positions.round_to!r})",
                    stacklevel=2,
                )


def _inner(optimizer: Any) -> Any:
    """The optimizer that Accelerate wrapped, which runs torch's hooks."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer
