"""Convert the convolutions of a LightningModule into active ones, before its optimizer is made."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torchmetrics import Metric

from ..choices import did_you_mean
from ..conv import acu_layers
from ..folded import FoldedConv2d
from ..surgery import ConvertConfig, NoEffectWarning, report_acu, was_folded
from ..training import add_late_positions, trained_layers
from ._promises import PositionCallback
from ._trainer import averages_of, callbacks_of, require_lightning

__all__ = ["ConvertToACU"]

#: The hooks in which a module may build its layers, in Lightning's order.
_BUILDING = ("setup", "configure_model")

#: The attribute of a wrapped hook that keeps what the instance had in its place.
_BEFORE = "acu_before"


class ConvertToACU(PositionCallback):
    """Calls :func:`lightning_acu.convert_to_acu` on the LightningModule, early enough for everything that follows.

    For modules whose code you cannot edit; in your own, call ``convert_to_acu`` in ``__init__`` or ``configure_model``,
    so that ``load_from_checkpoint``, which runs no callback, builds the active layers too. The conversion happens
    before weights are restored from a checkpoint, also if the module builds its layers in ``setup`` or
    ``configure_model``, and for testing and predicting as well. The positions are added to an optimizer that exists
    already, as with LightningCLI's ``--optimizer``. Convolutions inside torchmetrics Metrics (FID and the like) are not
    converted, and neither are those made by fold_acu.

    It must be listed before callbacks that copy the module, such as WeightAveraging.

    If the module overrides ``setup`` or ``configure_model``, the method is wrapped on the instance until it is called;
    nothing stays patched.

    Args:
        target_modules: which modules to convert, by their name in the LightningModule: "model.layer1.0.conv1".
        filter_fn: convert only modules for which ``filter_fn(module, qualified_name)`` is true.
        **arguments: the other arguments of :func:`lightning_acu.convert_to_acu`.

    Raises:
        TypeError: an unknown argument; during setup, a model that FSDP2 has already sharded in its ``configure_model``
            (convert there, before ``fully_shard``).
        RuntimeError: before training starts, if no convolution was converted, an averaging callback is listed first,
            or the strategy trains copies of the module in processes of its own ("ddp_spawn", "ddp_notebook").

    Example::

        trainer = Trainer(callbacks=[ConvertToACU(kernel_sizes=[3], exclude_modules=r".*stem.*"), PositionLRSchedule()])
    """

    def __init__(
        self,
        target_modules: str | list[str] | None = None,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        **arguments: Any,
    ) -> None:
        valid = [field.name for field in fields(ConvertConfig)]
        for name in arguments:
            if name not in valid:
                hint = did_you_mean(name, valid) or f"; choose from {', '.join(valid)} and filter_fn"
                raise TypeError(f"ConvertToACU has no argument {name!r}{hint}")
        self.config = ConvertConfig(target_modules=target_modules, **arguments)
        self.filter_fn = filter_fn
        self._spawned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the layers that exist, and those that the module's ``setup`` and ``configure_model`` will build."""
        require_lightning(self, pl_module)
        self._spawned = stage == "fit" and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
        later = [name for name in _BUILDING if is_overridden(name, pl_module)]
        for name in later:
            _wrap(pl_module, name, functools.partial(self._convert, pl_module, final=name == later[-1]))
        self._convert(pl_module, final=not later)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the conversion, and add the positions to an optimizer that exists already."""
        layers = trained_layers(pl_module)
        if not layers:
            reasons = sorted({row.reason for row in report_acu(pl_module).rows})
            if any(map(was_folded, pl_module.modules())):
                reasons = ["it was folded into plain ones; call convert_to_acu to make them active again"]
            raise RuntimeError(
                f"ConvertToACU converted no convolution of {type(pl_module).__name__}: "
                f"{'; '.join(reasons) or 'it has none'}"
            )
        for average in averages_of(trainer):  # copied in `setup`, with the wrappers of that moment
            _unwrap(average)
        callbacks = callbacks_of(trainer)
        for index, callback in enumerate(callbacks):
            average_model = getattr(callback, "_average_model", None)
            if isinstance(average_model, nn.Module) and not any(acu_layers(average_model)):
                copied = f"{type(callback).__name__} has copied {type(pl_module).__name__}"
                if index < callbacks.index(self):
                    raise RuntimeError(
                        f"ConvertToACU: {copied} before the conversion; ConvertToACU must be listed before "
                        f"{type(callback).__name__} in the trainer's callbacks"
                    )
                raise RuntimeError(
                    f"ConvertToACU: {copied} before its `setup` or `configure_model` built the layers; build them in "
                    "__init__"
                )
        if added := add_late_positions(trainer.optimizers, layers):
            rank_zero_info(f"ConvertToACU: added the positions of {len(added)} layers to an existing optimizer")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove wrappers that were not called because of the exception."""
        _unwrap(pl_module)

    def _convert(self, module: pl.LightningModule, final: bool) -> None:
        excluded = tuple(f"{n}." for n, child in module.named_modules() if isinstance(child, Metric | FoldedConv2d))

        def selected(conv: nn.Module, name: str) -> bool:
            if name.startswith(excluded) or was_folded(conv):
                return False
            return self.filter_fn is None or self.filter_fn(conv, name)

        before = sum(1 for _ in acu_layers(module))
        with warnings.catch_warnings():
            # A pattern without a match may match layers that are built later; and a folded model has to stay plain.
            if not final or any(map(was_folded, module.modules())):
                warnings.simplefilter("ignore", NoEffectWarning)
            try:
                self.config.apply(module, filter_fn=selected)
            except TypeError as error:
                raise TypeError(
                    f"ConvertToACU: {error} (with FSDP2: in configure_model, before fully_shard)"
                ) from error
        report = report_acu(module)
        if len(report.converted) > before:
            if self._spawned:
                # Lightning loads what the processes learned into the module that they were started with, which has
                # no layer for the positions, and says nothing about those that are left over.
                raise RuntimeError(
                    f"ConvertToACU: this strategy starts processes that convert copies of {type(module).__name__}, and "
                    "the learned positions would be lost when they end; call convert_to_acu in its __init__, or use "
                    "strategy='ddp'"
                )
            rank_zero_info(
                f"ConvertToACU: {len(report.converted)} of {len(report.rows)} convolutions of {type(module).__name__} "
                "are active"
            )


def _wrap(module: nn.Module, name: str, then: Callable[[], None]) -> None:
    """Call ``then`` after the next call of the module's hook ``name``; the wrapper removes itself when it is called.

    A callback's ``setup`` runs before both hooks, and its next hook only after weights have been restored.
    """
    hook = getattr(module, name)

    @functools.wraps(hook)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _remove_wrapper(module, name)
        result = hook(*args, **kwargs)
        then()
        return result

    setattr(wrapper, _BEFORE, vars(module).get(name))
    setattr(module, name, wrapper)


def _unwrap(module: nn.Module) -> None:
    """Remove wrappers that were not called; with several ConvertToACU one wraps the other's."""
    for name in _BUILDING:
        while _remove_wrapper(module, name):
            pass


def _remove_wrapper(module: nn.Module, name: str) -> bool:
    """Remove the outermost wrapper of a hook; whether there was one."""
    wrapper = vars(module).get(name)
    if not hasattr(wrapper, _BEFORE):
        return False
    delattr(module, name)
    if (before := getattr(wrapper, _BEFORE)) is not None:  # a method the user set on the instance, or another wrapper
        setattr(module, name, before)
    return True
