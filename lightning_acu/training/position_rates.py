"""The learning rates of positions: those of the weights times ``multiplier``, a number or "auto".

"auto" finds the number from the steps in which positions learn and from how far taps should move. Gradients of single
batches rarely point the same way for long, so that taps walk at random: with n steps of s pixels, an optimizer that
multiplies a step by ``gain``, and independent directions, a tap would end

    W = gain * s * sqrt(n)        gain = 1 / (1 - m) for SGD with momentum m, 1 for Adam

pixels away. With ``normalize="momentum"`` steps have their full length and directions change slowly, with a correlation
of m from one step to the next: gain = sqrt((1 + m) / (1 - m)). The loss holds taps back: the measured mean
displacement D grows as the root of W, and less in long trainings (``benchmarks/displacement.py``, 300 to 30,000 steps
of SGD and AdamW). The rule solves W = 8 D^2 for s.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from torch.optim import SGD, Adam, NAdam, Optimizer, RAdam

from ..checks import at_least
from .param_groups import is_position_group, set_learning_rate, source_group, tie_learning_rates
from .position_gradients import Normalize, averaging_coefficient

__all__ = ["Multiplier", "PositionRates"]

#: Learning rate of positions over that of the parameter group they came from; "auto" finds one.
Multiplier = float | Literal["auto"]

#: Pixels.
_TARGET = 0.5

#: W / D^2, in 1 / pixels.
_WALK = 8.0

#: Their steps are about the learning rate, whatever the size of the gradient. (AdamW is an Adam.)
_ADAMS = (Adam, NAdam, RAdam)

#: A key of a group of positions: the target displacement, and the multiplier that was found for it.
_FOUND = "acu_auto_multiplier"


class PositionRates:
    """Ties the learning rates of positions to those of the groups they came from.

    Args:
        multiplier: learning rate of positions over that of the group they came from; "auto" finds it.
        target_displacement: with "auto" the mean displacement of taps at the end, in pixels; None for 0.5.
        normalize: how gradients of positions are normalised.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one is negative or zero, ``target_displacement`` without "auto", or "auto" with raw gradients.
    """

    def __init__(self, multiplier: Multiplier, target_displacement: float | None, normalize: Normalize | None) -> None:
        self.auto = multiplier == "auto"
        if isinstance(multiplier, str) and not self.auto:
            raise TypeError(f"`multiplier` (={multiplier!r}) must be a number or 'auto'")
        if target_displacement is not None:
            if not self.auto:
                raise ValueError(
                    f"`target_displacement` (={target_displacement}) has no effect with `multiplier`={multiplier}; "
                    "use it with 'auto'"
                )
            if at_least("target_displacement", target_displacement) == 0:
                raise ValueError(f"`target_displacement` (={target_displacement}) must be positive, in pixels")
        if self.auto and normalize is None:
            raise ValueError(
                "`multiplier`='auto' needs `normalize`='gradient' or 'momentum': how far a raw gradient moves a tap "
                "depends on the loss"
            )
        #: The number, 0 until one is found.
        self.multiplier = 0.0 if isinstance(multiplier, str) else at_least("multiplier", multiplier)
        self.target = _TARGET if target_displacement is None else target_displacement
        self.normalize = normalize

    def find(self, optimizer: Optimizer, steps: float) -> None:
        """With "auto" find the multiplier of each group of positions that has none yet.

        It is kept in the group, and so in the optimizer's ``state_dict``: a resumed training goes on with the same.
        Positions have the learning rate that is found while the group they came from has its highest known one:
        ``max_lr`` of OneCycleLR, ``initial_lr`` of other schedulers, or the present one. Schedulers scale both.

        Args:
            optimizer: its groups are split already.
            steps: in which positions will learn.

        Raises:
            ValueError: see :meth:`pixels`; or a learning rate of the weights is 0.
        """
        for group in filter(is_position_group, optimizer.param_groups if self.auto else ()):
            if group.get(_FOUND, (None,))[0] == self.target:
                continue
            source = source_group(optimizer, group)
            highest = max(float(source[key]) for key in ("lr", "initial_lr", "max_lr") if key in source)
            if highest == 0:
                raise ValueError("`multiplier`='auto' needs a learning rate of the weights that is not 0")
            group[_FOUND] = (self.target, self.pixels(optimizer, source, steps) / highest)

    def tie(self, optimizer: Optimizer, factor: float) -> None:
        """Set the learning rates of positions: rate of the weights x multiplier x ``factor``; before each step."""
        if not self.auto:
            tie_learning_rates(optimizer, self.multiplier * factor)
            return
        for group in filter(is_position_group, optimizer.param_groups):
            set_learning_rate(group, source_group(optimizer, group)["lr"] * (group[_FOUND][1] * factor))

    def pixels(self, optimizer: Optimizer, source: dict[str, Any], steps: float) -> float:
        """The learning rate, in pixels per step, with which taps end at the target, on average.

        Args:
            optimizer: SGD, or one of the Adam family.
            source: a group of it.
            steps: in which positions learn; fewer than 1 count as 1.

        Raises:
            ValueError: another optimizer.
        """
        if not isinstance(optimizer, (SGD, *_ADAMS)):
            raise ValueError(
                "`multiplier`='auto' knows the steps of SGD, Adam, AdamW, NAdam and RAdam, not those of "
                f"{type(optimizer).__name__}; give a number"
            )
        gain = 1.0
        if self.normalize == "momentum":
            m = averaging_coefficient(source)
            gain = math.sqrt((1 + m) / (1 - m))
        elif isinstance(optimizer, SGD):
            gain = 1 / (1 - source.get("base_momentum", source["momentum"]))  # of OneCycleLR, at its highest rate
        return _WALK * self.target**2 / (gain * math.sqrt(max(1.0, steps)))
