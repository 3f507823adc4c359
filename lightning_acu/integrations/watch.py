"""Convert the models that a script makes, and train their positions in the optimizers that it makes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..conv import acu_layers
from ..surgery import convert_to_acu, report_acu
from ..training import (
    PositionTrainer,
    averaged_models,
    copied_positions,
    hold_copies_,
    on_whole_pixels,
    parameter_ids,
    trained_layers,
)
from .construction import constructed

__all__ = ["FACTORIES", "ScriptWatch", "say"]

#: The functions whose models are converted: all names by which a script finds them.
FACTORIES = {
    "timm": ("timm.create_model", "timm.models.create_model"),
    "torchvision": ("torchvision.models.get_model",),
}


def say(text: str) -> None:
    """Print a line about what was done, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"lightning_acu: {text}", file=sys.stderr, flush=True)


class ScriptWatch:
    """Inside ``with ScriptWatch(...)`` models are converted and positions are trained, whatever code makes them.

    Models: what timm's ``create_model`` and torchvision's ``get_model`` return is converted, before timm loads a
    checkpoint into it. Optimizers: each one that holds weights of such a model gets a
    :class:`~lightning_acu.training.PositionTrainer` as soon as it is made, so before schedulers and before its state is
    loaded. Averages (EMA) get the rounded positions whenever they are used or saved.

    Args:
        convert: arguments of :func:`~lightning_acu.convert_to_acu`.
        positions: arguments of :class:`~lightning_acu.training.PositionTrainer`.
    """

    def __init__(self, convert: Mapping[str, Any] | None = None, positions: Mapping[str, Any] | None = None) -> None:
        self._convert, self._positions = dict(convert or {}), dict(positions or {})
        self._models: list[nn.Module] = []
        self._averages: list[nn.Module] = []
        #: One for each optimizer that holds weights of converted models.
        self.trainers: list[PositionTrainer] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for name in _factories():
                stack.enter_context(_replaced(name, self._converting))
            stack.enter_context(constructed(Optimizer, self._train))
            for kind in _average_classes():
                stack.enter_context(constructed(kind, self._hold))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def check_and_report(self) -> None:
        """Say what became of the positions; call it when the script has ended.

        Raises:
            RuntimeError: nothing was converted.
        """
        self._check_converted("the script ended")
        if not self.trainers:
            say("no optimizer held weights of a converted model, so no positions were trained")
        for trainer in self.trainers:
            rows = trainer.report().values()
            mean = sum(row["mean_displacement"] for row in rows) / len(rows)
            largest = max(row["max_displacement"] for row in rows)
            start, round_at = trainer.plan.phase.start, trainer.plan.round_at
            if trainer.step == 0:
                state = "it took no step"
            elif trainer.step <= start:
                state = f"they did not learn: their warm-up lasts until step {start:.0f}"
            elif trainer.rounded:
                layers = trained_layers(trainer.model)
                if trainer.round_to == "dilation":
                    there, where = all(layer.grid_dilations for _, layer in layers), "on the grids of dilations"
                else:
                    there = all(on_whole_pixels(layer.offsets.detach()) for _, layer in layers)
                    where = "on whole pixels"
                state = f"they are {where}" if there else "they were rounded, but something has MOVED them since"
            elif round_at is not None:
                state = f"they are NOT rounded: that would have been after step {round_at}"
            else:
                state = "they are not rounded"
            say(
                f"after step {trainer.step} of {type(trainer.optimizer).__name__} taps of {len(rows)} layers are "
                f"{mean:.2f} pixels from where they started on average, {largest:.2f} at most; {state}"
            )

    def _check_converted(self, what: str) -> None:
        if not self._models:
            raise RuntimeError(
                f"{what} and no model has been converted: none was made by "
                f"{', '.join(name for names in FACTORIES.values() for name in names)}, or none of those had "
                "convolutions to convert; make yours by one of them, or use convert_to_acu and PositionTrainer in the "
                "script (docs/recipes/pytorch.md)"
            )

    def _converting(self, make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        @functools.wraps(make)
        def make_converted(*args: Any, **kwargs: Any) -> nn.Module:
            checkpoint = kwargs.pop("checkpoint_path", None)  # timm's: one of a converted model needs its positions
            model = make(*args, **kwargs)
            convert_to_acu(model, **self._convert)
            rows = report_acu(model)
            say(
                f"{make.__name__} made a {type(model).__name__}: {len(rows.converted)} of {len(rows.rows)} 2-D "
                "convolutions are active"
            )
            if rows.converted:
                self._models.append(model)
            if checkpoint:
                import_module("timm.models").load_checkpoint(model, checkpoint)
            return model

        return make_converted

    def _train(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        self._check_converted(f"{name} was made")
        ids = parameter_ids([optimizer])
        models = [m for m in self._models if any(id(layer.weight) in ids for _, layer in acu_layers(m))]
        if not models:
            say(f"{name} holds no weights of converted models; it trains no positions")
            return
        inside = {id(value) for value in vars(optimizer).values()}
        if any(id(trainer.optimizer) in inside for trainer in self.trainers):
            return  # it wraps one that trains them (Accelerate's, timm's Lookahead)
        model = models[0] if len(models) == 1 else nn.ModuleList(models)
        trainer = PositionTrainer(optimizer, model, **self._positions)
        self.trainers.append(trainer)
        plan = trainer.plan
        end = "not rounded" if plan.round_at is None else f"rounded after step {plan.round_at}"
        count, start = len(trainer.report()), f"{plan.phase.start:.0f}"
        say(f"{name} trains positions of {count} layers: still until step {start}, {end}")
        for average in self._averages:
            _hold_when_used(trainer, average)

    def _hold(self, average: nn.Module) -> None:
        self._averages.append(average)
        for trainer in self.trainers:
            _hold_when_used(trainer, average)


def _hold_when_used(trainer: PositionTrainer, average: nn.Module) -> None:
    """Give ``average`` the rounded positions before each forward pass and before it is saved.

    Not only once: averaging equal numbers is not always exact, and positions were averages before.
    """
    layers = trained_layers(trainer.model)
    for model in averaged_models([average]):
        copies = list(copied_positions(layers, "average", model))

        def hold(*_: Any, copies: Any = copies) -> None:
            if trainer.rounded:
                hold_copies_(layers, copies)

        model.register_forward_pre_hook(hold)
        model.register_state_dict_pre_hook(hold)


def _factories() -> Iterator[str]:
    """Those of installed packages."""
    for package, names in FACTORIES.items():
        if find_spec(package):
            yield from names
    # timm makes teachers for distillation by a name that is bound when this is imported: they are to stay plain.
    if find_spec("timm") and find_spec("timm.task"):
        import_module("timm.task")


@contextmanager
def _replaced(name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    module_name, _, attribute = name.rpartition(".")
    module = import_module(module_name)
    original = getattr(module, attribute)
    setattr(module, attribute, change(original))
    try:
        yield
    finally:
        setattr(module, attribute, original)


def _average_classes() -> Iterator[type]:
    yield AveragedModel
    if find_spec("timm"):
        utils = import_module("timm.utils")
        yield from (getattr(utils, name) for name in ("ModelEma", "ModelEmaV2", "ModelEmaV3") if hasattr(utils, name))
