"""What was converted, layer by layer, and how much arithmetic it takes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checks import require_module, require_package
from ..conv import ACUConv2d
from ..dilation import Dilations
from ..folded import ReshapedConv2d
from ..ops.backends import planned
from .arithmetic import (
    Call,
    convolution_calls,
    folded_macs_per_pixel,
    fractional_fold_macs_per_pixel,
    macs_per_pixel,
)
from .dilations import found_dilations
from .fold_rule import mean_price, prices
from .marks import SKIP_REASON
from .outputs import Arguments
from .rows import ConvRow, ConvRows
from .rules import is_conv2d, why_not_convertible

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ACUReport", "ConvRow", "report_acu"]


@dataclass(frozen=True)
class ACUReport(ConvRows):
    """All 2-D convolutions of a model. ``str()`` and ``print`` show a table.

    Attributes:
        model: class name of the model.
        rows: one for each convolution, in the order of the model's modules; a shared one appears once.
        input_size: (channels, height, width) of the image that MACs were counted for, or None.
        dilations: the architecture that was found: for each layer that is (or was, before it was folded) active and
            whose taps are exactly on a plain dilated grid, (dy, dx), or a list of them where position groups differ.
            :func:`apply_dilations` gives it to a plain model.
    """

    dilations: Mapping[str, Dilations] = field(default_factory=dict)

    def table(self, every: bool = False) -> Table:
        """A rich table of active layers, and below it one of skipped layers: grouped by reason, or ``every`` one.

        "fold x" is the arithmetic of the fold at the present positions, as a multiple of the plain convolution's.

        Raises:
            ModuleNotFoundError: rich is not installed.
        """
        require_package("rich", "a report as a table (not its rows and properties)")
        from .table import report_table

        return report_table(self, every)

    def __str__(self) -> str:
        table = self.table()
        from rich.console import Console

        console = Console(file=io.StringIO(), width=140)
        console.print(table)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


def report_acu(model: nn.Module, input_size: tuple[int, int, int] | None = None, *, forms: bool = False) -> ACUReport:
    """List every 2-D convolution of ``model``: active, or the reason why not; and its arithmetic.

    Before a conversion it tells which convolutions can be converted. Under FSDP2 it reads positions, so call it on
    every process.

    Args:
        model: any module, also a single convolution.
        input_size: (channels, height, width) of an image, to count multiply-accumulates in one forward pass of zeros.
            The model is not changed.
        forms: also estimate the price of each form of each fold (:mod:`lightning_acu.forms`) at these sizes, which
            takes a moment for large models; without ``input_size`` there are none.

    Raises:
        TypeError: ``model`` is not a module, or ``input_size`` does not consist of ints.
        ValueError: it is not three numbers >= 1, or the forward pass fails; or ``forms`` without ``input_size``.
    """
    require_module(model)
    if forms and input_size is None:
        raise ValueError("`forms`=True: prices depend on the size of images; give `input_size`")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_conv2d(module) or isinstance(module, nn.ConvTranspose2d):
            names.setdefault(module, []).append(name)
    calls = {} if input_size is None else convolution_calls(model, input_size, names)
    rows = tuple(_row(module, own, calls.get(module), forms) for module, own in names.items())
    size = input_size and (input_size[0], input_size[1], input_size[2])
    return ACUReport(type(model).__name__, rows, size, found_dilations(model))


def _row(module: nn.Module, names: list[str], calls: list[Call] | None, forms: bool) -> ConvRow:
    active = isinstance(module, ACUConv2d)
    reason = "" if active else getattr(module, SKIP_REASON, None) or why_not_convertible(module) or "not converted yet"

    own = module.own if isinstance(module, ReshapedConv2d) else {}  # what is computed with

    def pair(attribute: str) -> tuple[int, ...]:
        value = own.get(attribute, getattr(module, attribute, 1))
        return tuple(value) if isinstance(value, tuple | list) else (value, value)

    return ConvRow(
        name=names[0],
        kind=type(module).__name__,
        kernel_size=pair("kernel_size"),
        stride=pair("stride"),
        dilation=pair("dilation"),
        groups=getattr(module, "groups", 1),
        channels=(module.in_channels, module.out_channels),  # type: ignore[arg-type]
        converted=active,
        reason=reason,
        added=module.offsets.numel() if isinstance(module, ACUConv2d) else 0,
        aliases=tuple(names[1:]),
        macs=macs_per_pixel(module),
        folded_macs=folded_macs_per_pixel(module) if isinstance(module, ACUConv2d) else None,
        fractional_fold_macs=fractional_fold_macs_per_pixel(module) if isinstance(module, ACUConv2d) else None,
        output_sizes=tuple(call.size for call in calls or ()),
        pixels=None if calls is None else sum(call.pixels for call in calls),
        backends=_backends(module, calls[0].shape) if calls and isinstance(module, ACUConv2d) else (),
        form_prices=_form_prices(module, calls[0].shape) if forms and calls and isinstance(module, ACUConv2d) else {},
    )


def _backends(layer: ACUConv2d, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The backends of the forward and the backward pass for an input of ``shape``."""
    if layer.weight.is_meta:
        return ()
    sizes = shape if len(shape) == 4 else (1, *shape)
    image = layer.weight.detach().new_empty(sizes)  # (only looked at)
    offsets = layer.active_offsets().detach()
    return tuple(
        planned(image, layer.weight, offsets, layer.geometry, layer.backend, needs) for needs in (None, (True,) * 3)
    )


def _form_prices(layer: ACUConv2d, shape: tuple[int, ...]) -> dict[str, float]:
    """The price of each form of the fold over that of the plain convolution, for an input of ``shape``."""
    if layer.start is not None or folded_macs_per_pixel(layer) is None:  # (there is no plain one, or no fold)
        return {}
    plain = layer.fold_without_numbers("single", moved=False)
    arguments: Arguments = ((torch.empty(shape, dtype=layer.weight.dtype, device="meta"),), {})
    unit = mean_price(plain, arguments, None)
    return {form: price / unit for form, price in prices(layer, arguments, None).items()}
