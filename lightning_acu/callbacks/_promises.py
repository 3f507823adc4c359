"""What callbacks promise of positions (still, on whole pixels, in the model and its copies), checked when fit ends.

Nothing else sees all that may change a position: other callbacks swap, load and average weights.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..checks import few
from ..conv import acu_layers
from ..dilation import RoundTo
from ..sharded import whole
from ..statistics import layer_statistics
from ..training import PositionCopy, copied_positions, hold_copies_in_, on_whole_pixels, trained_layers
from ._gate import GradientGate
from ._trainer import callbacks_of, is_fast_dev_run

__all__ = [
    "PositionCallback",
    "RoundedPositions",
    "fractional_layers",
    "hold_named_copies",
    "offsets_of",
    "require_attributes",
]

#: Objects of these classes hold no copies, or many other things.
_NOT_SEARCHED = (pl.Trainer, pl.LightningDataModule, Logger, DataLoader, Optimizer)


class PositionCallback(pl.Callback):
    """The base of this package's callbacks: they check what they promised, and refuse to be called by Fabric."""

    _ended = False  # whether on_train_end was called in this fit

    def broken_promises(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Sentences on what this callback promised and does not hold at the end, with the likely reason.

        Under FSDP2 a collective operation.
        """
        return []

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that training ended; subclasses call it when they override it."""
        self._ended = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say in one warning what the callbacks of this package promised and does not hold.

        Not in ``on_train_end``: other callbacks may change the model there, after this one. That hook is made up for
        here: Lightning leaves it out where a training that was killed after its last step is resumed.
        """
        if not self._ended and trainer.global_step:
            self.on_train_end(trainer, pl_module)
        self._ended = False
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, PositionCallback)]
        if ours[-1:] == [self] and not is_fast_dev_run(trainer):
            promises = [
                f"{type(callback).__name__}: {promise}"
                for callback in ours
                for promise in callback.broken_promises(trainer, pl_module)
            ]
            gate = GradientGate.of(pl_module)
            if gate is not None and (text := gate.say_not_finite()):
                promises.append(text)
            if promises:
                rank_zero_warn("After this training:\n" + "\n".join(f"* {promise}" for promise in promises))

    def on_after_setup(self, *arguments: Any, **keywords: Any) -> NoReturn:
        """Raise an error: Fabric calls this hook where it sets up a module and its optimizers, and none of ours.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} is a callback of lightning.pytorch.Trainer, whose hooks Fabric does not call; "
            "use lightning_acu.training.PositionTrainer there (see docs/recipes/fabric.md)"
        )

    #: Fabric calls this one in each step, also of an optimizer that was set up by itself.
    on_after_optimizer_step = on_after_setup


class RoundedPositions:
    """What RoundThenFinetune remembers of the moment of rounding, to check at the end that it still holds."""

    def __init__(self) -> None:
        #: By ModelCheckpoint, its best checkpoint and its score when positions were rounded.
        self.best: dict[str, tuple[str, float]] = {}
        self._offsets: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the copies that exist when training starts."""
        self._copies = {copy.path: _cpu(copy.offsets) for copy in _found_copies(trainer, pl_module)}

    def rounded(self, trainer: pl.Trainer, pl_module: pl.LightningModule, resumed: bool = False) -> None:
        """Remember the rounded positions; and the best checkpoints, unless the state of a checkpoint had them."""
        self._offsets = offsets_of(pl_module)
        if not resumed:
            self.best = _best_checkpoints(trainer)

    def broken(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, to: RoundTo = "pixels"
    ) -> list[str]:
        """Sentences on what does not hold; positions were rounded at ``step``, ``to`` pixels or dilations."""
        broken = []
        fractional = fractional_layers(pl_module)
        if fractional:
            broken.append(
                f"positions of {few(fractional)} are not on whole pixels, although they were rounded at step {step}: "
                "something other than a step of the optimizer changed them, such as an average that was put in place "
                "of the weights; give its attribute to `copies`"
            )
        if to == "dilation":
            layers = [(name, layer) for name, layer in acu_layers(pl_module) if name not in fractional]
            if off := [name for name, layer in layers if layer.grid_dilations is None]:
                broken.append(
                    f"positions of {few(off)} are not on the grid of a dilation, although they were rounded to one at "
                    f"step {step}: something other than a step of the optimizer changed them"
                )
                fractional += off
        now = offsets_of(pl_module)
        moved = [
            name
            for name, before in self._offsets.items()
            if name in now and name not in fractional and not torch.equal(now[name], before)
        ]
        if moved:
            broken.append(
                f"positions of {few(moved)} are on other pixels than those they were rounded to at step {step}: "
                "something other than a step of the optimizer changed them"
            )
        copies = [
            copy.path
            for copy in _found_copies(trainer, pl_module)
            if not on_whole_pixels(offsets := _cpu(copy.offsets))
            and not (copy.path in self._copies and torch.equal(self._copies[copy.path], offsets))  # one that rests
        ]
        if copies:
            broken.append(
                f"copies of the model have positions that are not on whole pixels: {few(copies)}. They were made "
                "before rounding, or average with positions from before; to have them rounded too, give the attribute "
                "to `copies`"
            )
        for key, best in _best_checkpoints(trainer).items():
            if self.best.get(key) == best:
                broken.append(
                    f"the best checkpoint {best[0]!r} is from before rounding, so that ckpt_path='best' gives a model "
                    "with fractional positions; use CheckpointAfterRounding, or evaluate the model as it is now"
                )
        return broken


def fractional_layers(module: nn.Module) -> list[str]:
    """The names of active convolutions that have taps off whole pixels (or nan), in averages inside ``module`` too."""
    return [name for name, layer in acu_layers(module) if layer_statistics(layer).off_lattice]


def offsets_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the offsets that are trained, by the name of the layer, on the CPU."""
    return {name: _cpu(layer.offsets) for name, layer in trained_layers(module)}


def require_attributes(trainer: pl.Trainer, pl_module: pl.LightningModule, paths: Sequence[str]) -> None:
    """Check that the attributes that ``copies`` of RoundThenFinetune names exist.

    Raises:
        RuntimeError: neither the module nor a callback has one of them.
    """
    for path in paths:
        if not _attributes(trainer, pl_module, path):
            raise RuntimeError(
                f"RoundThenFinetune: neither {type(pl_module).__name__} nor a callback has the attribute {path!r} of "
                "`copies`; if it is made later, let it be None at first"
            )


def hold_named_copies(trainer: pl.Trainer, pl_module: pl.LightningModule, paths: Sequence[str]) -> None:
    """Give the copies in these attributes the rounded positions of the model."""
    for path in paths:
        for value in _attributes(trainer, pl_module, path):
            hold_copies_in_(trained_layers(pl_module), path, value)


def _attributes(trainer: pl.Trainer, pl_module: pl.LightningModule, path: str) -> list[Any]:
    """What the attribute is in the module and in those callbacks that have it."""
    values = []
    for owner in (pl_module, *callbacks_of(trainer)):
        with suppress(AttributeError):
            values.append(operator.attrgetter(path)(owner))
    return values


def _found_copies(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[PositionCopy]:
    """The copies in other callbacks, and in the module where they are none of its layers."""
    layers = list(acu_layers(pl_module))
    found: dict[int, PositionCopy] = {}
    roots = [
        (type(callback).__name__, vars(callback))
        for callback in callbacks_of(trainer)
        if not isinstance(callback, PositionCallback)
    ]
    name = type(pl_module).__name__
    roots += [(name, {key: v for key, v in vars(pl_module).items() if key not in _OF_MODULES})]
    roots += [(name, dict(pl_module.named_children())), (name, dict(pl_module.named_buffers()))]
    for where, value in roots:
        for copy in copied_positions(layers, where, value, _NOT_SEARCHED):
            found.setdefault(id(copy.offsets), copy)
    return list(found.values())


#: Attributes of every module that hold its parts.
_OF_MODULES = ("_modules", "_parameters", "_buffers")


def _best_checkpoints(trainer: pl.Trainer) -> dict[str, tuple[str, float]]:
    """By ModelCheckpoint that monitors something, its best checkpoint so far and the score of that."""
    return {
        callback.state_key: (callback.best_model_path, float(callback.best_model_score))
        for callback in callbacks_of(trainer)
        if isinstance(callback, ModelCheckpoint)
        and callback.monitor is not None
        and callback.best_model_path
        and callback.best_model_score is not None
    }


def _cpu(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().clone()
