"""Which form of a fold is cheapest: a rule that counts arithmetic and memory traffic, fitted to measurements.

A form is run on the meta device, and every operation is counted by its kind: multiply-accumulates of convolutions
(with a larger kernel, 1x1, depthwise), numbers read and written by what only moves them, and calls. A weighted sum of
the counts estimates the time. ``benchmarks/fold_forms.py`` measures all forms of many layers, and fits the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..conv import ACUConv2d
from ..forms import FORMS
from .outputs import Arguments, map_tensors

__all__ = ["KINDS", "RUNTIMES", "WEIGHTS", "candidates", "cheapest_form", "count", "mean_price", "price", "prices"]

#: What can be asked to compute a fold.
RUNTIMES = ("torch", "onnxruntime")

#: What is counted: multiply-accumulates of convolutions (with a larger kernel, 1x1, 1x1 in groups, depthwise), numbers
#: that they read and write, those that padding, cropping and concatenating or interpolating do, sums, and calls.
KINDS = ("dense", "pointwise", "grouped", "depthwise", "passes", "pad", "crop", "copy", "add", "calls")

#: Nanoseconds for each of ``KINDS``, of one thread; ``benchmarks/fold_forms.py`` fits them. What comes together in all
#: measured forms, such as depthwise passes, padding and sums, the fit may put on one of them.
WEIGHTS: Mapping[str, tuple[float, ...]] = {
    "torch": (0.017, 0.013, 0.0042, 0.015, 1.3, 1.7, 0.93, 0.62, 0.0, 4000.0),
    "onnxruntime": (0.011, 0.01, 0.011, 0.0, 0.0, 0.37, 1.2, 1.7, 0.0, 97.0),
}

#: Another form than "auto" has to be cheaper by this factor: one convolution is easier to work with afterwards.
_GAIN = 0.9


#: With more taps than this, over all position groups, only "auto" and "single" are candidates: the others compute all
#: channels at the place of every tap of any group.
_MOST_TAPS = 256


class _Counter(TorchDispatchMode):
    """Counts by ``KINDS`` what is computed in this block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(KINDS, 0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            image, weight = args[0], args[1]
            kind = "dense" if math.prod(weight.shape[2:]) > 1 else "pointwise"
            kind = "grouped" if kind == "pointwise" and args[8] > 1 else kind
            kind = "depthwise" if weight.shape[1] == 1 else kind
            self._add(kind, output.numel() * math.prod(weight.shape[1:]))
            self._add("passes", image.numel() + output.numel())
        elif name == "constant_pad_nd":
            self._add("crop" if min(args[1]) < 0 else "pad", output.numel())
        elif name in ("cat", "lerp", "index_select"):
            self._add("copy", output.numel())
        elif name == "add":
            self._add("add", output.numel())
        else:
            return output  # a view
        self._add("calls", 1)
        return output

    def _add(self, kind: str, number: int) -> None:
        self.counts[kind] += number


def count(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The counts by ``KINDS`` of ``module``, on the meta device, called with these arguments."""
    counter = _Counter()
    with torch.no_grad(), counter:
        module(*args, **kwargs)
    return counter.counts


def price(counts: Mapping[str, int], runtime: str) -> float:
    """Estimated time in nanoseconds, of one thread."""
    return sum(weight * counts[kind] for weight, kind in zip(WEIGHTS[runtime], KINDS, strict=True))


def candidates(layer: ACUConv2d) -> dict[str, nn.Module]:
    """The forms that ``layer`` can take, without numbers; those equal to an earlier one left out."""
    found: dict[str, nn.Module] = {}
    few = layer.active_offsets()[..., 0].numel() <= _MOST_TAPS
    for form in FORMS if few else ("auto", "single"):
        try:
            found[form] = layer.fold_without_numbers(form)
        except ValueError:  # taps too far apart for it
            continue
    return {form: module for form, module in found.items() if form == "auto" or repr(module) != repr(found["auto"])}


def mean_price(module: nn.Module, arguments: Arguments, runtime: str | None) -> float:
    """The price of ``module``, a fold on the meta device; without ``runtime`` the geometric mean of all."""
    dtype = next(module.parameters()).dtype  # (under autocast images come in another one)
    args, kwargs = map_tensors(lambda tensor: tensor.to(dtype), arguments)
    counts = count(module, *args, **kwargs)
    each = [price(counts, name) for name in (RUNTIMES if runtime is None else (runtime,))]
    return math.prod(each) ** (1 / len(each))


def prices(layer: ACUConv2d, arguments: Arguments, runtime: str | None) -> dict[str, float]:
    """The price of every candidate, called with ``arguments`` on the meta device; see :func:`cheapest_form`."""
    return {form: mean_price(module, arguments, runtime) for form, module in candidates(layer).items()}


def cheapest_form(layer: ACUConv2d, arguments: Arguments, runtime: str | None) -> str:
    """The form with the lowest price; "auto" where no other is cheaper by a tenth, and for taps on plain dilated grids.

    Args:
        layer: an active convolution.
        arguments: what it is called with, on the meta device.
        runtime: one of ``RUNTIMES``; None: the geometric mean of their prices.
    """
    if layer.grid_dilations is not None:
        return "auto"
    found = prices(layer, arguments, runtime)
    best = min(found, key=found.__getitem__)
    return best if found[best] < _GAIN * found["auto"] else "auto"
