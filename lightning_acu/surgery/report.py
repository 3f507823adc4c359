"""What a conversion did, layer by layer."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from ..conv import ACUConv2d
from .convert import SKIP_REASON
from .rules import named_conv2ds, why_not_convertible

__all__ = ["ACUReport", "ConvRow", "report_acu"]


@dataclass(frozen=True)
class ConvRow:
    """One 2-D convolution of a model.

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


@dataclass(frozen=True)
class ACUReport:
    """All 2-D convolutions of a model. ``str()`` and ``print`` show a table."""

    model: str
    rows: tuple[ConvRow, ...]

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

    def table(self) -> Table:
        """The report as a rich table."""
        count = f"{len(self.converted)} of {len(self.rows)} convolutions active"
        title = f"{self.model}: {count}, {self.added} parameters added"
        table = Table("layer", "class", "kernel", "stride", "dilation", "groups", "channels", "active?", title=title)
        for row in self.rows:
            name = row.name or "(the model)"
            table.add_row(
                name + "".join(f"\n= {alias}" for alias in row.aliases),
                row.kind,
                *("x".join(map(str, pair)) for pair in (row.kernel_size, row.stride, row.dilation)),
                str(row.groups),
                f"{row.channels[0]} -> {row.channels[1]}",
                f"yes, +{row.added}" if row.converted else escape(f"no: {row.reason}"),
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self.table())
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined, no-any-return]


def report_acu(model: nn.Module) -> ACUReport:
    """Account for every 2-D convolution of ``model``: active, or the reason why not.

    Works before a conversion too, and then says of each convolution whether one could be.
    """
    rows = (_row(module, names) for module, names in named_conv2ds(model).items())
    return ACUReport(type(model).__name__, tuple(rows))


def _row(module: nn.Module, names: list[str]) -> ConvRow:
    converted = isinstance(module, ACUConv2d)
    reason = (
        "" if converted else why_not_convertible(module) or getattr(module, SKIP_REASON, None) or "not converted yet"
    )

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
        converted=converted,
        reason=reason,
        added=module.offsets.numel() if isinstance(module, ACUConv2d) else 0,
        aliases=tuple(names[1:]),
    )
