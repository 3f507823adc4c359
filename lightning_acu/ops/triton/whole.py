"""Positions on whole pixels that stay where they are: one plain convolution, for which torch has the fastest kernel.

Whether positions form one is known on the host only, and asking waits for the GPU. So it is asked once for each
version of a tensor, when it comes back unchanged for the third time without asking for a gradient: in evaluation, or
frozen with ``requires_grad=False``. Never while positions learn, never while a CUDA graph is captured, which may be
replayed with other positions, and never again for positions that learn in one.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...expansion import Plan, plan_windows
from ...geometry import ConvGeometry

__all__ = ["Known", "known_plan"]

_ASK_AT = 3  # times that positions came unchanged: reentrant checkpoints bring learning ones without gradient too


class Known(NamedTuple):
    """The one plain convolution of at most K cells that positions formed, and those positions; all on the device."""

    plan: Plan
    offsets: Tensor

    def checked(self, weight: Tensor, offsets: Tensor) -> Tensor:
        """``weight``, or NaN where positions have changed all the same: torch counts no version for ``.data``."""
        return weight * torch.where((offsets == self.offsets).all(), 1.0, torch.nan).to(weight.dtype)


#: Of a tensor of positions: what it was, how often it came so, and what is known of it.
_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
#: Positions that learned inside a CUDA graph: never asked.
_moved_by_graphs: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _capturing(offsets: Tensor) -> bool:
    return offsets.is_cuda and torch.cuda.is_current_stream_capturing()


def known_plan(offsets: Tensor, geometry: ConvGeometry) -> Known | None:
    """What is known of ``offsets`` without asking too often, or None."""
    # A layer's offsets are made anew for each call; their parameter stays, and has a version.
    source: Tensor = getattr(offsets, "source", offsets if offsets._base is None else offsets._base)
    capturing = _capturing(offsets)
    if offsets.requires_grad:
        _entries.pop(source, None)
        if capturing:  # an optimizer in the graph moves them, and no version tells
            _moved_by_graphs[source] = True
        return None
    if source.is_inference() or capturing or source in _moved_by_graphs:
        return None
    # (views of one tensor are different positions)
    place = None if hasattr(offsets, "source") else (offsets.data_ptr(), offsets.stride())
    state = source._version, source.data_ptr(), place, offsets.shape, geometry
    before, times, known = _entries.get(source, (None, 0, None))
    if before != state:
        times, known = 0, None
    if times + 1 == _ASK_AT and not offsets.isnan().any():
        plan = plan_windows(offsets, geometry)
        if len(plan.windows) == 1 and plan.windows[0].area <= geometry.taps:
            there = dataclasses.replace(plan, index=plan.index.to(offsets.device))
            known = Known(there, offsets.detach().clone())
    _entries[source] = state, min(times + 1, _ASK_AT), known
    return known  # type: ignore[no-any-return]
