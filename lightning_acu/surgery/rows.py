"""The rows of a report: the 2-D convolutions of a model, and their totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["ConvRow", "ConvRows"]


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
        reason: why it is not one; "" if it is.
        added: parameters added by the conversion (2 for each tap of each position group).
        aliases: further names of the same module, if the model shares it.
        macs: MACs per output pixel of the plain convolution (per input pixel of a transposed one).
        folded_macs: the same, folded at the present positions; None if it is not active, or cannot be folded because
            positions are not finite.
        fractional_fold_macs: the same, folded at positions between pixels, within one of where they started; None if
            it is not active.
        output_sizes: (height, width) of its output, for each call; empty if not measured or not called.
        pixels: number of output (input) pixels over all calls for one image; None if not measured.
        form_prices: for each form that the fold can take at the present positions, its estimated time as a multiple of
            the plain convolution's (:mod:`lightning_acu.surgery.fold_rule`); empty if not asked for or not known.
        backends: which backend computes its forward and its backward pass, at the first of its sizes and the present
            positions; empty if it is not active, or its size not known.
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
    form_prices: Mapping[str, float] = field(default_factory=dict)
    backends: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConvRows:
    """All 2-D convolutions of a model, and their totals.

    Attributes:
        model: class name of the model.
        rows: one for each convolution, in the order of the model's modules; a shared one appears once.
        input_size: (channels, height, width) of the image that MACs were counted for, or None.
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
        """MACs of all convolutions for one image, as if all were plain; None without ``input_size``."""
        return self._total(lambda row: row.macs)

    @property
    def folded_macs(self) -> int | None:
        """The same with the active ones folded at their present positions; also None if one cannot be folded."""
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
