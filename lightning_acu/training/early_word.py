"""A word early in a training about taps that hardly move or run away, while there is time to change it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..conv import ACUConv2d
from .param_groups import is_position_group, source_group
from .position_gradients import Normalize
from .position_plan import LearningPhase
from .position_rates import Multiplier, PositionRates

__all__ = ["early_word", "time_for_a_word"]

#: The part of the steps in which positions learn after which they are looked at; and the fewest steps that have such
#: a part worth looking at.
_PART, _FEWEST = 0.1, 200

#: Mean displacement, in units of the dilation, then: taps that hardly move, and that run away. Displacement grows with
#: about the fourth root of the number of steps (see position_rates.py), so that at the end it is about 1.8 times that.
_STILL, _AWAY = 0.02, 2.0


def time_for_a_word(phase: LearningPhase, before: int, after: int) -> bool:
    """Whether the steps from ``before`` to ``after`` pass a tenth of ``phase``."""
    if math.isinf(phase.length) or phase.length < _FEWEST:
        return False
    mark = phase.start + math.ceil(_PART * phase.length)
    return before < mark <= after


@torch.no_grad()
def early_word(
    layers: Sequence[ACUConv2d],
    optimizers: Iterable[Optimizer],
    phase: LearningPhase,
    multiplier: Multiplier,
    normalize: Normalize | None,
) -> str | None:
    """What to say if taps hardly move or run away after a tenth of their steps; None if neither.

    Under FSDP2 a collective operation: it reads positions.
    """
    learning = [layer for layer in layers if layer.offsets.requires_grad]
    distances = [
        layer.displacement.norm(dim=-1)[:, layer.movable].flatten().cpu() / max(1, *layer.geometry.dilation)
        for layer in learning
    ]
    moved = torch.cat(distances).nanmean().item() if distances else math.nan
    if math.isnan(moved) or _STILL <= moved <= _AWAY:
        return None
    steps = f"after {math.ceil(_PART * phase.length):,} of the {phase.length:,.0f} steps in which positions learn"
    what = "hardly move" if moved < _STILL else "run away"
    better = next((number for optimizer in optimizers if (number := _better(optimizer, phase, normalize))), None)
    advice = "change it"
    if multiplier != "auto" and better is not None:
        advice = f"about {better:.2g}, or 'auto', would take them half a pixel"
    elif multiplier == "auto":
        advice = "give a larger `target_displacement`" if moved < _STILL else "give a number, or `max_displacement`"
    return (
        f"{steps} taps are {moved:.2g} pixels from where they started on average, and {what}; "
        f"`multiplier` (={multiplier}): {advice}"
    )


def _better(optimizer: Optimizer, phase: LearningPhase, normalize: Normalize | None) -> float | None:
    """The multiplier that "auto" would find for 0.5 pixels, if it knows this optimizer."""
    if normalize is None:
        return None
    group: dict[str, Any] | None = next(filter(is_position_group, optimizer.param_groups), None)
    if group is None:
        return None
    source = source_group(optimizer, group)
    highest = max(float(source[key]) for key in ("lr", "initial_lr", "max_lr") if key in source)
    try:
        pixels = PositionRates("auto", None, normalize).pixels(optimizer, source, phase.length)
    except ValueError:
        return None
    return pixels / highest if highest > 0 else None
