"""Turn the convolutions of somebody else's LightningModule into active ones, in time for its optimizer."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric

from ..conv import acu_layers
from ..folded import FoldedConv2d
from ..surgery import ConvertConfig, NoEffectWarning, report_acu, was_folded
from ..training import add_late_positions, trained_layers
from ._layers import averages_of, callbacks_of, require_lightning

__all__ = ["ConvertToACU"]

#: The hooks of a module that may build its layers, in Lightning's order.
_BUILDING = ("setup", "configure_model")

#: Where a stand-in for a hook keeps what the instance had in its place.
_BEFORE = "acu_before"


class ConvertToACU(pl.Callback):
    """Calls :func:`lightning_acu.convert_to_acu` on the LightningModule, early enough for everything that follows.

    For modules whose code is not yours; in your own, call ``convert_to_acu`` in ``__init__`` or ``configure_model``,
    so that ``load_from_checkpoint``, which runs no callback, knows the active layers too. It is done before weights
    are restored from a checkpoint, also where the module builds its layers in ``setup`` or ``configure_model``, and
    for testing and predicting as well. An optimizer made before, as LightningCLI does for ``--optimizer``, is given
    the positions. Convolutions inside torchmetrics Metrics (FID and the like) stay as they are, and so do those that
    fold_acu made.

    Stands before callbacks that copy the module, such as WeightAveraging.

    Args:
        target_modules: which modules to convert; names count from the LightningModule: "model.layer1.0.conv1".
        filter_fn: only modules for which ``filter_fn(module, qualified_name)`` is true.
        **arguments: the others of :func:`lightning_acu.convert_to_acu`.

    Raises:
        TypeError: an unknown argument; while setting up, a model that FSDP2 has sharded already (in its
            ``configure_model``: convert there, before ``fully_shard``).
        RuntimeError: before training starts, if no convolution was converted or an averaging callback stands before.

    Example::

        trainer = Trainer(callbacks=[ConvertToACU(kernel_sizes=[3], exclude_modules=r".*stem.*"), PositionLRSchedule()])
    """

    def __init__(
        self,
        target_modules: str | list[str] | None = None,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        **arguments: Any,
    ) -> None:
        known = [field.name for field in fields(ConvertConfig)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)} and filter_fn"
                raise TypeError(f"ConvertToACU has no argument {name!r}; {hint}")
        self.config = ConvertConfig(target_modules=target_modules, **arguments)
        self.filter_fn = filter_fn

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert what is there, and what the module's ``setup`` and ``configure_model`` will have built."""
        require_lightning(self, pl_module)
        later = [name for name in _BUILDING if is_overridden(name, pl_module)]
        for name in later:
            _follow(pl_module, name, functools.partial(self._convert, pl_module, final=name == later[-1]))
        self._convert(pl_module, final=not later)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the positions to an optimizer that was made before."""
        layers = trained_layers(pl_module)
        if not layers:
            reasons = sorted({row.reason for row in report_acu(pl_module).rows})
            if any(map(was_folded, pl_module.modules())):
                reasons = ["it was folded into plain ones; call convert_to_acu to make those active again"]
            raise RuntimeError(
                f"ConvertToACU converted no convolution of {type(pl_module).__name__}: "
                f"{'; '.join(reasons) or 'it has none'}"
            )
        for copied in averages_of(trainer):  # in `setup`, with what was there
            _unfollow(copied)
        callbacks = callbacks_of(trainer)
        for place, callback in enumerate(callbacks):
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module) and not any(acu_layers(average)):
                raise RuntimeError(
                    f"ConvertToACU: {type(callback).__name__} "
                    + (
                        "stands before it in the trainer's callbacks and has copied the plain model; put ConvertToACU "
                        "first"
                        if place < callbacks.index(self)
                        else f"has copied {type(pl_module).__name__} before its `setup` or `configure_model` built the "
                        "layers; build them in __init__"
                    )
                )
        if added := add_late_positions(trainer.optimizers, layers):
            rank_zero_info(f"ConvertToACU: gave the positions of {len(added)} layers to an optimizer made before")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module's hooks as they were, where it came before they were called."""
        _unfollow(pl_module)

    def _convert(self, module: pl.LightningModule, final: bool) -> None:
        left = tuple(f"{n}." for n, child in module.named_modules() if isinstance(child, Metric | FoldedConv2d))

        def chosen(conv: nn.Module, name: str) -> bool:
            if name.startswith(left) or was_folded(conv):
                return False
            return self.filter_fn is None or self.filter_fn(conv, name)

        before = sum(1 for _ in acu_layers(module))
        with warnings.catch_warnings():
            # What matches nothing yet may match later; and a folded model is to stay plain.
            if not final or any(map(was_folded, module.modules())):
                warnings.simplefilter("ignore", NoEffectWarning)
            try:
                self.config.apply(module, filter_fn=chosen)
            except TypeError as error:
                raise TypeError(
                    f"ConvertToACU: {error} (with FSDP2: in configure_model, before fully_shard)"
                ) from error
        report = report_acu(module)
        if len(report.converted) > before:
            rank_zero_info(
                f"ConvertToACU: {len(report.converted)} of {len(report.rows)} convolutions of {type(module).__name__} "
                "are active"
            )


def _follow(module: nn.Module, name: str, then: Callable[[], None]) -> None:
    """Have ``then`` called after the next call of a module's hook, by a stand-in that is gone as soon as it is called.

    Lightning itself has no hook between these and the optimizer.
    """
    hook = getattr(module, name)

    @functools.wraps(hook)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        _put_back(module, name)
        result = hook(*args, **kwargs)
        then()
        return result

    setattr(stand_in, _BEFORE, vars(module).get(name))
    setattr(module, name, stand_in)


def _unfollow(module: nn.Module) -> None:
    """Take away the stand-ins that were not called; several of these callbacks stand in one another's place."""
    for name in _BUILDING:
        while _put_back(module, name):
            pass


def _put_back(module: nn.Module, name: str) -> bool:
    """Whether there was a stand-in to take away."""
    stand_in = vars(module).get(name)
    if not hasattr(stand_in, _BEFORE):
        return False
    delattr(module, name)
    if (before := getattr(stand_in, _BEFORE)) is not None:  # the user's own, on the instance, or another stand-in
        setattr(module, name, before)
    return True
