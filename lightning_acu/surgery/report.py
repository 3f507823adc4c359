"""What a conversion did, layer by layer, and what it does to the arithmetic."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from ..conv import ACUConv2d
from .arithmetic import (
    Call,
    convolution_calls,
    folded_macs_per_pixel,
    fractional_fold_macs_per_pixel,
    macs_per_pixel,
)
from .marks import SKIP_REASON
from .rules import is_conv2d, why_not_convertible
from .table import report_table

__all__ = ["ACUReport", "ConvRow", "report_acu"]


@dataclass(frozen=True)
class ConvRow:
    """One 2-D convolution of a model. MACs are multiply-accumulates.

    Attributes:
        name: qualified name in the model; "" for the model itself.
        kind: class name.
        kernel_size, stride, dilation: (rows, columns).
        groups: conv groups.
        channels: (in, out).
        converted: whether it is an active convolution.
        reason: why not, where it is not.
        added: parameters added by the conversion (2 for each tap of each position group).
        aliases: further names of the same module, where the model shares it.
        macs: MACs per output pixel of the plain convolution (per input pixel of a transposed one).
        folded_macs: the same, folded at the present positions; None where it is not active, or cannot be folded
            because positions are not finite.
        fractional_fold_macs: the same, folded at positions between pixels, within one of where they started; None
            where it is not active.
        output_sizes: (height, width) of its output, for each call; empty where not measured or not called.
        pixels: how many of those that ``macs`` count per, over all calls for one image; None where not measured.
    """

    name: str
    kind: str
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels: tuple[int, int]
    converted: bool
    reason: str
    added: int
    aliases: tuple[str, ...]
    macs: int
    folded_macs: int | None = None
    fractional_fold_macs: int | None = None
    output_sizes: tuple[tuple[int, int], ...] = ()
    pixels: int | None = None


@dataclass(frozen=True)
class ACUReport:
    """All 2-D convolutions of a model. ``str()`` and ``print`` show a table.

    Attributes:
        model: class name.
        rows: one for each convolution, in the order of the model's modules; a shared one once.
        input_size: (channels, height, width) of the image that MACs were counted for, if they were.
    """

    model: str
    rows: tuple[ConvRow, ...]
    input_size: tuple[int, int, int] | None = None

    @property
    def converted(self) -> tuple[ConvRow, ...]:
        """The active convolutions."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def skipped(self) -> tuple[ConvRow, ...]:
        """The convolutions that are not active."""
        return tuple(row for row in self.rows if not row.converted)

    @property
    def added(self) -> int:
        """Parameters added to the whole model."""
        return sum(row.added for row in self.rows)

    @property
    def macs(self) -> int | None:
        """MACs of all convolutions for one image, were they all plain; None without ``input_size``."""
        return self._total(lambda row: row.macs)

    @property
    def folded_macs(self) -> int | None:
        """The same with the active ones folded at their present positions; None too if one cannot be folded."""
        return self._total(lambda row: row.folded_macs if row.converted else row.macs)

    @property
    def fractional_fold_macs(self) -> int | None:
        """The same with the active ones folded at positions between pixels, within one of where they started."""
        return self._total(lambda row: row.fractional_fold_macs if row.converted else row.macs)

    def _total(self, macs: Callable[[ConvRow], int | None]) -> int | None:
        total = 0
        for row in self.rows:
            each = macs(row)
            if each is None or row.pixels is None:
                return None
            total += each * row.pixels
        return None if self.input_size is None else total

    def table(self, every: bool = False) -> Table:
        """A rich table of active layers, and below it one of skipped layers: by reason, or ``every`` one by itself.

        "fold x" is the arithmetic of the fold at the present positions, as a multiple of the plain convolution's.
        """
        return report_table(self, every)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self.table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


def report_acu(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> ACUReport:
    """Account for every 2-D convolution of ``model``: active, or the reason why not; and for its arithmetic.

    Works before a conversion too, and then says of each convolution whether one could be. Under FSDP2 it reads
    positions, and so has to be called on every process.

    Args:
        model: any module, also a single convolution.
        input_size: (channels, height, width) of an image, to count multiply-accumulates in one forward pass of zeros.
            The model stays as it is.

    Raises:
        TypeError: ``input_size`` is not made of ints.
        ValueError: it is not three numbers >= 1, or the forward pass fails.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_conv2d(module) or isinstance(module, nn.ConvTranspose2d):
            names.setdefault(module, []).append(name)
    calls = {} if input_size is None else convolution_calls(model, input_size, names)
    rows = tuple(_row(module, own, calls.get(module)) for module, own in names.items())
    return ACUReport(type(model).__name__, rows, input_size and (input_size[0], input_size[1], input_size[2]))


def _row(module: nn.Module, names: list[str], calls: list[Call] | None) -> ConvRow:
    active = isinstance(module, ACUConv2d)
    reason = "" if active else why_not_convertible(module) or getattr(module, SKIP_REASON, None) or "not converted yet"

    def pair(attribute: str) -> tuple[int, ...]:
        value = getattr(module, attribute, 1)
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
    )
