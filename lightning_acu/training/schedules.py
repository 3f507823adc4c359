"""Schedules of the learning rate of positions: pure functions of the step.

``step`` counts from the end of the warm-up; ``total`` is the number of steps from there until positions are rounded, or
until the training ends. To write your own, subclass :class:`Schedule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..choices import did_you_mean
from ..dilation import RoundTo

__all__ = ["Constant", "Cosine", "DilationDecay", "LatticeDecay", "Linear", "Schedule", "Step", "find_schedule"]


class Schedule:
    """The base class: a constant factor of 1, and taps that move freely."""

    #: Where taps are pulled: "pixels", each to its nearest whole one, or "dilation", all to the nearest dilated grid.
    pull_to: ClassVar[RoundTo] = "pixels"

    def rate(self, step: int, total: float) -> float:
        """The factor on the learning rate of positions at ``step``, 0 <= step <= total."""
        return 1.0

    def slack(self, step: int, total: float) -> float:
        """How far from where they are pulled taps may be at ``step``: from 1, anywhere, to 0, exactly there.

        Taps are pulled towards their nearest pixel (or grid, ``pull_to``) as it decreases, see :meth:`pull`.
        """
        return 1.0

    def pull(self, before: int, step: int, total: float) -> float:
        """The fraction of its way there, 0 to 1, by which a tap is moved from ``before`` to ``step``."""
        slack = self.slack(before, total)
        return 1 - self.slack(step, total) / slack if slack > 0 else 1.0

    @property
    def needs_total(self) -> bool:
        """Whether the schedule needs a training whose length is known."""
        return True


@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor, 1, at all steps: positions follow the schedule of the weights."""

    @property
    def needs_total(self) -> bool:
        """No: it does not depend on the length."""
        return False


@dataclass(frozen=True)
class Cosine(Schedule):
    """From 1 to ``floor`` along half a cosine: floor + (1 - floor) * (1 + cos(pi * step / total)) / 2."""

    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_share("floor", self.floor)

    def rate(self, step: int, total: float) -> float:
        """See the class."""
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * _progress(step, total))) / 2


@dataclass(frozen=True)
class Linear(Schedule):
    """From 1 to ``floor`` along a line."""

    floor: float = 0.0

    def __post_init__(self) -> None:
        _check_share("floor", self.floor)

    def rate(self, step: int, total: float) -> float:
        """See the class."""
        return 1 - (1 - self.floor) * _progress(step, total)


@dataclass(frozen=True)
class Step(Schedule):
    """Multiplied by ``factor`` at each of the ``milestones``, which are fractions of the total."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        for milestone in self.milestones:
            _check_share("milestones", milestone)
        if self.factor < 0:
            raise ValueError(f"`factor` (={self.factor}) must not be negative")

    def rate(self, step: int, total: float) -> float:
        """See the class."""
        progress = _progress(step, total)
        return self.factor ** sum(progress >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class LatticeDecay(Schedule):
    """Anneals the taps onto whole pixels, so that rounding at the end does not move them.

    Taps move freely for the fraction ``start`` of the steps. Then the learning rate decreases linearly to 0, and each
    tap is pulled towards its nearest pixel more and more strongly: without gradients its distance shrinks as
    ((1 - progress) / (1 - start)) ** power, to exactly 0 at the end. A strong gradient can still move a tap to the next
    pixel, but this becomes less and less likely.

    Args:
        start: the fraction of the steps at which annealing starts, from 0 to below 1.
        power: the exponent above; larger values pull earlier.
    """

    start: float = 0.5
    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ValueError(f"`start` (={self.start}) must be at least 0 and below 1")
        if self.power <= 0:
            raise ValueError(f"`power` (={self.power}) must be positive")

    def rate(self, step: int, total: float) -> float:
        """See the class."""
        return min(1.0, (1 - _progress(step, total)) / (1 - self.start))

    def slack(self, step: int, total: float) -> float:
        """See the class."""
        return min(1.0, (1 - _progress(step, total)) / (1 - self.start)) ** self.power


@dataclass(frozen=True)
class DilationDecay(LatticeDecay):
    """Anneals the taps of each layer onto the nearest plain dilated grid, so that rounding to it does not move them.

    As :class:`LatticeDecay`, with the grid in place of pixels: the dilations nearest to all taps of a position group
    are found anew at every step (:meth:`ACUConv2d.round_` with ``to="dilation"``), until the taps are on them.
    """

    pull_to: ClassVar[RoundTo] = "dilation"


_NAMES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "linear": Linear,
    "step": Step,
    "lattice": LatticeDecay,
    "dilation": DilationDecay,
}


def find_schedule(argument: str, schedule: str | Schedule) -> Schedule:
    """The schedule of that name, with its defaults; a :class:`Schedule` is returned as it is.

    Args:
        argument: the name of the caller's argument, for error messages.
        schedule: "constant", "cosine", "linear", "step", "lattice", "dilation", or a Schedule.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a Schedule.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if not isinstance(schedule, str):
        raise TypeError(f"`{argument}` (={schedule!r}) must be a Schedule or one of {', '.join(map(repr, _NAMES))}")
    if schedule not in _NAMES:
        known = ", ".join(map(repr, _NAMES))
        raise ValueError(
            f"`{argument}` (={schedule!r}) must be a Schedule or one of {known}{did_you_mean(schedule, _NAMES)}"
        )
    return _NAMES[schedule]()


def _progress(step: int, total: float) -> float:
    """The fraction of the steps that are done, 0 to 1; 1 if there are no steps."""
    return min(1.0, max(0.0, step / total)) if total > 0 else 1.0


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` (={value}) must be between 0 and 1")
