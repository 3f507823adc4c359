"""Training of positions in a loop of one's own: one object that works from torch's hooks on the optimizer's steps.

It does what the callbacks do, in the same order and with the same numbers, and counts the steps of its optimizer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import at_least, whole_number
from ..conv import ACUConv2d, acu_layers, check_grids
from ..dilation import RoundTo, check_round_to
from ..statistics import layer_statistics
from .averages import averaged_models, trained_layers
from .copies import copied_positions, hold_copies_in_
from .counted_groups import CountedGroups
from .early_word import early_word, time_for_a_word
from .gradients import drop_gradients_
from .position_gradients import Normalize, PositionGradients, find_normalize, unused_positions
from .position_plan import PositionPlan, check_model, check_schedulers
from .position_rates import Multiplier, PositionRates
from .rounding import (
    Collision,
    RoundingReport,
    check_collision,
    check_fold_after_rounding,
    compute_as_plain,
    round_and_freeze,
)
from .schedules import Schedule
from .step_hooks import StepHooks, check_optimizer

__all__ = ["PositionTrainer"]


class PositionTrainer:
    """Trains the positions that ``optimizer`` holds: own learning rate, warm-up, unit gradients, rounding.

    Nothing has to be called in the loop. Before each step of the optimizer gradients of positions are made None (in the
    warm-up and after rounding, so that neither momentum nor decay moves them) or of length 1, once, when they are
    accumulated, clipped and unscaled; a tap whose gradient is not finite stays where it is. After the step taps are
    confined and pulled towards whole pixels, and rounded when it is time. A step is a call of ``optimizer.step``: two
    in a batch are two, and one that mixed precision skips is none.

    Positions get a parameter group of their own (for each group they were in). At every step its learning rate is that
    of the group they came from, as any scheduler left it, times ``multiplier`` times the factor of ``schedule``.

    Steps and rounding are in the optimizer's own ``state_dict``, so that a loop that saves model, optimizer and
    scheduler resumes exactly. Make the trainer first, then load. Use one trainer for each optimizer.

    Args:
        optimizer: any that runs torch's hooks. Positions of layers whose weights it holds are added to it.
        model: the model, converted; it may be wrapped (DDP, torch.compile).
        multiplier: learning rate of positions over that of the group they came from. "auto" finds it from the steps in
            which they learn, for SGD and the Adam family, see :class:`~lightning_acu.training.PositionRates`.
        warmup_steps: steps at the start in which positions do not move at all.
        normalize: "gradient", the paper: scale each tap's gradient (g_y, g_x) to length 1. "momentum": average the
            gradients over steps, scale that to length 1, and set the optimizer's own momentum of positions to 0, see
            :class:`~lightning_acu.training.PositionGradients`. None: neither.
        schedule: a further factor from the end of the warm-up until rounding or ``total_steps``: "constant", "cosine",
            "linear", "step", "lattice", "dilation", or a :class:`~lightning_acu.training.schedules.Schedule`.
        total_steps: the length of the training.
        round_at: round positions after this many steps (int), or after this fraction of ``total_steps`` (float, up to
            1.0); None: only by :meth:`round_and_freeze`.
        round_to: "pixels", each tap to its nearest; or "dilation": each layer, or position group, becomes the nearest
            plain dilated convolution (see :meth:`ACUConv2d.round_`), whose fold costs what the plain one did.
        fold_after_rounding: with "dilation", compute as those plain convolutions from then on, at their speed (see
            :meth:`ACUConv2d.compute_as_plain`). The layers, the optimizer and what is saved stay as they are;
            :func:`lightning_acu.fold_acu` at the end makes the model plain.
        max_displacement: maximum distance in pixels of a tap from where it started, while positions learn.
        target_displacement: with ``multiplier="auto"`` how far taps should end from where they started, on average, in
            pixels; 0.5 by default.
        weight_decay: for positions; it pulls the taps back to the regular grid.
        collision: what to do with taps that are rounded to one pixel, as in
            :func:`~lightning_acu.training.round_layers`.
        copies: averages and teachers (modules, dicts of tensors) that get the rounded positions too, see
            :meth:`hold_copies`. Averages inside ``model`` are found.
        schedulers: learning rate schedulers of ``optimizer`` that exist already, of torch or of timm. Those made later
            are not given here; one that takes a value for each group, as LambdaLR a list, counts the positions' too.

    Raises:
        TypeError: an argument of the wrong type, or LBFGS, which takes one parameter group only.
        ValueError: a number out of range, an unknown schedule, a model without active convolutions, or with a free
            shape where dilations are to be found, an optimizer that holds none of them, rounding before the warm-up
            ends, or ``total_steps`` missing where it is needed.
        RuntimeError: the optimizer has a PositionTrainer or a scheduler already, or does not run torch's hooks.

    Warns:
        UserWarning: at the first step in which positions learn, if some have no gradient although the weights of their
            layers do; after a tenth of these steps, if taps hardly move or run away; when rounding, if all taps are
            where they started; if an earlier PositionTrainer of ``optimizer`` has rounded.

    Example::

        PositionTrainer(optimizer, model, warmup_steps=10_000, total_steps=64_000, round_at=0.7)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        multiplier: Multiplier = 0.01,
        warmup_steps: int = 0,
        normalize: Normalize | bool | None = "gradient",
        schedule: str | Schedule = "constant",
        total_steps: int | None = None,
        round_at: int | float | None = None,
        round_to: RoundTo = "pixels",
        fold_after_rounding: bool = False,
        max_displacement: float | None = None,
        target_displacement: float | None = None,
        weight_decay: float = 0.0,
        collision: Collision = "report",
        copies: Sequence[Any] = (),
        schedulers: Sequence[Any] | None = None,
    ) -> None:
        check_optimizer(optimizer)
        check_model(model)
        check_schedulers(optimizer, schedulers)
        check_collision(collision)
        check_round_to("round_to", round_to)
        check_fold_after_rounding(fold_after_rounding, "round_to", round_to)
        if not isinstance(copies, (list, tuple)):
            raise TypeError(f"`copies` must be a list of models or dicts, got {type(copies).__name__}; write [copies]")
        self._copies = [*averaged_models(model.modules()), *averaged_models(vars(model).values()), *copies]
        for copy in copies:
            if not any(copied_positions(trained_layers(model), "copies", copy)):
                raise ValueError(
                    f"`copies`: {type(copy).__name__} has no positions of `model`; copy the model after its conversion"
                )
        self.optimizer = optimizer
        self.model = model
        self.normalize = find_normalize(normalize)
        rates = PositionRates(multiplier, target_displacement, self.normalize)
        self.multiplier = multiplier if rates.auto else at_least("multiplier", multiplier)
        self.max_displacement = None if max_displacement is None else at_least("max_displacement", max_displacement)
        self.weight_decay = at_least("weight_decay", weight_decay)
        self.collision = collision
        self.round_to = round_to
        self.fold_after_rounding = fold_after_rounding
        self.plan = PositionPlan.make(schedule, warmup_steps, total_steps, round_at)
        steps = self.plan.phase.length
        if rates.auto:
            if math.isinf(steps):
                raise ValueError(
                    "`multiplier`='auto' needs a training with a known end; give `total_steps` or `round_at`"
                )
            rates.pixels(optimizer, optimizer.param_groups[0], steps)  # an error before anything changes
        self._gradients = PositionGradients()
        if "dilation" in (round_to, self.plan.schedule.pull_to):
            check_grids(trained_layers(model))
        self._unused: list[str] | None = None  # layers without a gradient in the first step in which they should learn
        self._groups = CountedGroups(optimizer, model, list(schedulers or ()), rates, steps, self.weight_decay)
        if self.rounded:
            warnings.warn(
                f"the positions in `optimizer` ({type(optimizer).__name__}) were rounded by an earlier PositionTrainer "
                "and stay so; for them to learn again, call load_state_dict({'step': 0, 'rounded': False})",
                stacklevel=2,
            )
        self._hooks: StepHooks | None = None
        self._hook()

    def __getstate__(self) -> dict[str, Any]:
        """Whether there are hooks, in place of them: a copy of the optimizer has none."""
        return vars(self) | {"_hooks": self._hooks is not None, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For a copy (deepcopy, pickle): hooks on its own optimizer, unless they were removed."""
        hooked = state["_hooks"]
        vars(self).update(state | {"_hooks": None})
        if hooked:
            self._hook()

    def _hook(self) -> None:
        self._handles = []
        if self.fold_after_rounding:
            self._handles.append(self.optimizer.register_load_state_dict_post_hook(lambda _: self._fold()))
        self._hooks = StepHooks(self.optimizer, self._tie, self._transform, self._end_step, self._offsets)

    @property
    def step(self) -> int:
        """How many steps the optimizer has taken."""
        return self._groups.step

    @property
    def rounded(self) -> bool:
        """Whether positions were rounded, and are still from then on."""
        return self._groups.rounded

    @property
    def learning(self) -> bool:
        """Whether positions may move in the next step."""
        return self.step >= self.plan.phase.start and not self.rounded

    @property
    def not_finite(self) -> int:
        """How many gradients of taps were not finite (nan or inf) in the steps that this object has seen."""
        return self._gradients.guard.count

    def weights(self) -> Iterator[nn.Parameter]:
        """The parameters of the model without positions, to clip their gradients.

        ``clip_grad_norm_(model.parameters(), ...)`` counts the raw gradients of positions in the norm, so that it
        shrinks those of the weights more than it would in a plain model.
        """
        positions = {id(layer.offsets) for _, layer in acu_layers(self.model)}
        return (parameter for parameter in self.model.parameters() if id(parameter) not in positions)

    def round_and_freeze(self) -> RoundingReport:
        """Round all positions now, keep them still from now on, and delete their gradients and momentum.

        ``requires_grad_(False)`` alone would not do: a gradient from before would still be stepped along.

        Raises:
            ValueError, RuntimeError: see :func:`~lightning_acu.training.round_layers`; no position is changed then.
        """
        report = round_and_freeze(self._groups.layers, [self.optimizer], self.collision, self.round_to)
        self._groups.write(self.step, True)
        self._fold()
        self.hold_copies()
        if report.nothing_learned:
            warnings.warn(
                f"after rounding all taps are where they started, {report.why_nothing}; raise `multiplier` "
                f"(={self.multiplier}), or round later",
                stacklevel=2,
            )
        return report

    def hold_copies(self) -> None:
        """Set the positions of ``copies`` to the rounded ones, exactly; nothing is done before rounding.

        Done when rounding. Call it before you evaluate or save an average: averaging equal numbers is not always exact.
        """
        if self.rounded:
            for copy in self._copies:
                hold_copies_in_(self._groups.layers, "copies", copy)

    def report(self) -> dict[str, dict[str, Any]]:
        """For each layer: mean_displacement, max_displacement (pixels), learning_rate, step, learns and why_not.

        In the warm-up and after rounding ``learns`` is False, and ``why_not`` says so; else it is an empty str.
        """
        self._tie()
        rows = {}
        for name, layer in self._groups.layers:
            statistics, why_not = layer_statistics(layer), self._why_not(name, layer)
            rows[name] = {
                "mean_displacement": statistics.mean_displacement,
                "max_displacement": statistics.max_displacement,
                "learning_rate": self._groups.rate(layer),
                "step": self.step,
                "learns": not why_not,
                "why_not": why_not,
            }
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The step, and whether positions were rounded. ``optimizer.state_dict()`` has both, too."""
        return {"step": self.step, "rounded": self.rounded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there. Load the optimizer before, as its state has these numbers, too."""
        self._groups.write(whole_number("step", state_dict["step"]), bool(state_dict["rounded"]))
        self._fold()

    def remove(self) -> None:
        """Remove the hooks. Rounded positions get requires_grad=False, to stay so; the parameter groups are kept."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.rounded:
            for _, layer in self._groups.layers:
                layer.offsets.requires_grad_(False).grad = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _fold(self) -> None:
        # Also when a state is loaded; positions that are loaded later are noticed by the layers.
        if self.fold_after_rounding and self._groups.rounded:
            compute_as_plain(self._groups.layers)

    def _offsets(self) -> Iterator[Tensor]:
        return (layer.offsets for _, layer in self._groups.layers)

    def _tie(self) -> None:
        self._groups.tie(self.plan.factor(self.step))

    def _why_not(self, name: str, layer: ACUConv2d) -> str:
        if self.rounded:
            return "rounded"
        if not self.learning:
            return f"warm-up until step {self.plan.phase.start}"
        if not layer.offsets.requires_grad:
            return "requires_grad is False"
        return "no gradient in the first step" if name in (self._unused or ()) else ""

    def _transform(self) -> None:
        layers = [layer for _, layer in self._groups.layers]
        if not self.learning:
            drop_gradients_(layers)
        elif self._unused is None:
            self._say_unused()
        # Fused optimizers unscale gradients of mixed precision themselves, in the step.
        scale = getattr(self.optimizer, "grad_scale", None)
        self._gradients.before_step(self.optimizer, layers, self.normalize, scale)

    def _end_step(self, found_inf: Tensor | None) -> None:
        self._gradients.after_step(self.optimizer)
        if found_inf is not None and found_inf.item():
            return
        step, learned = self.step, self.learning
        self._groups.write(step + 1, self.rounded)
        if learned:
            layers = [layer for _, layer in self._groups.layers]
            self.plan.confine(layers, step, step + 1, self.max_displacement)
            if time_for_a_word(self.plan.phase, step, step + 1):
                text = early_word(layers, [self.optimizer], self.plan.phase, self.multiplier, self.normalize)
                if text is not None:
                    warnings.warn(text, stacklevel=3)
        if not self.rounded and self.plan.round_at is not None and step + 1 >= self.plan.round_at:
            self.round_and_freeze()

    def _say_unused(self) -> None:
        self._unused = [
            name for name, layer in self._groups.layers if layer.offsets.requires_grad and layer.offsets.grad is None
        ]
        if text := unused_positions(self._groups.layers):
            warnings.warn(text, stacklevel=3)
