"""Positions on whole pixels that stay where they are: one plain convolution, for which torch has the fastest kernel.

Whether positions form one is known on the host only, and asking waits for the GPU. So it is asked once for each version
of a tensor, when it comes back unchanged for the third time without asking for a gradient: in evaluation, or frozen
with ``requires_grad=False``. Never while positions learn, and never while a CUDA graph is captured, which may be
replayed with other positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..geometry import ConvGeometry
from ..positions import Plan, plan_windows

__all__ = ["plain_plan"]

_ASK_AT = 3  # times that positions came unchanged: reentrant checkpoints bring learning ones without gradient too

#: Of a tensor of positions: [what it was, how often it came so, the plan found].
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def plain_plan(offsets: Tensor, geometry: ConvGeometry) -> Plan | None:
    """The one plain convolution of at most K cells that ``offsets`` are known to form, or None.

    Writing to positions through ``.data`` goes unnoticed, as torch counts no version then, until they are used with a
    gradient again.
    """
    # A layer's offsets are made anew for each call; their parameter stays, and has a version.
    source: Tensor = getattr(offsets, "source", offsets if offsets._base is None else offsets._base)
    if offsets.requires_grad:
        _known.pop(source, None)
        return None
    if source.is_inference() or (offsets.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    state = source._version, source.data_ptr(), offsets.shape, geometry
    entry: list[Any] = _known.get(source, [None])
    if entry[0] != state:
        entry = _known[source] = [state, 0, None]
    entry[1] += 1
    if entry[1] == _ASK_AT and not offsets.isnan().any():
        plan = plan_windows(offsets, geometry)
        if len(plan.windows) == 1 and plan.windows[0].area <= geometry.taps:
            entry[2] = plan
    found: Plan | None = entry[2]
    return found
