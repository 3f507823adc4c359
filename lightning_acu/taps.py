"""What there is to know of the taps of a convolution: where they are, where they started, which can move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from .geometry import ConvGeometry, Padding, resolve_padding
from .rounding import round_offsets
from .sharded import copy_whole_, whole

__all__ = ["PositionedConv2d"]

torch.fx.wrap("whole")  # asks what kind of tensor it has, which torch.fx does not know while it traces


class PositionedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` with ``offsets``; the base of :class:`~lightning_acu.ACUConv2d`, which explains them.

    Under FSDP2 what reads positions is a collective operation, to be called on every process.
    """

    offsets: nn.Parameter
    position_groups: int
    fixed_tap: int | None
    start: tuple[tuple[float, float], ...] | None

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry that the operator sees (for other padding modes: after the padding)."""
        kernel_size, stride, dilation = self.kernel_size, self.stride, self.dilation
        padding: Padding = self.padding if self.padding_mode == "zeros" else 0
        sides = resolve_padding(padding, kernel_size, stride, dilation)  # type: ignore[arg-type]
        return ConvGeometry(kernel_size, stride, sides, dilation, self.groups)  # type: ignore[arg-type]

    def active_offsets(self) -> Tensor:
        """(P, K, 2), differentiable: ``offsets`` as the layer uses them, with the fixed tap at zero."""
        offsets = whole(self.offsets).view(self.position_groups, -1, 2)
        if self.fixed_tap is None:  # (a view asks for a gradient even where none is recorded)
            active = offsets if torch.is_grad_enabled() else offsets.detach()
        else:
            before, _, after = offsets.split([self.fixed_tap, 1, self.geometry.taps - self.fixed_tap - 1], dim=1)
            active = torch.cat((before, offsets.new_zeros(self.position_groups, 1, 2), after), dim=1)
        return active

    @property
    def positions(self) -> Tensor:
        """(P, K, 2), detached: (dy, dx) of each tap in pixels from the centre of the kernel."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        offsets = self.active_offsets().detach()
        return offsets + self._grid(offsets) - offsets.new_tensor([(kh - 1) / 2 * dh, (kw - 1) / 2 * dw])

    def starting_offsets(self) -> Tensor:
        """(P, K, 2): what ``active_offsets`` were before any training."""
        shape = (self.position_groups, self.geometry.taps, 2)
        if self.start is None:
            return torch.zeros(shape, dtype=self.offsets.dtype, device=self.offsets.device)
        return torch.tensor(self.start, dtype=self.offsets.dtype, device=self.offsets.device).expand(shape)

    @property
    def displacement(self) -> Tensor:
        """(P, K, 2), detached: how far each tap has moved from where it started, (dy, dx) in pixels."""
        return self.active_offsets().detach() - self.starting_offsets()

    @property
    def movable(self) -> Tensor:
        """(K,) bool: True for the taps that can move."""
        movable = torch.ones(self.geometry.taps, dtype=torch.bool, device=self.offsets.device)
        if self.fixed_tap is not None:
            movable[self.fixed_tap] = False
        return movable

    def _grid(self, like: Tensor) -> Tensor:
        """(K, 2): the regular grid from its first tap, in pixels."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return like.new_tensor([(i * dh, j * dw) for i in range(kh) for j in range(kw)])

    @torch.no_grad()
    def round_(self, separate: bool = False) -> Self:
        """Move every tap to the nearest whole pixel (ties to even), in place.

        Args:
            separate: where taps of one position group would end on one pixel, give each its own instead: the nearest
                such arrangement, by the sum of squared distances.

        Raises:
            ValueError: ``offsets`` are not finite, with ``separate``.
        """
        offsets = whole(self.offsets).view(self.position_groups, -1, 2)
        copy_whole_(self.offsets, round_offsets(offsets, self._grid(offsets), self.fixed_tap, separate).flatten())
        return self

    def reset_parameters(self) -> None:
        """``nn.Conv2d``'s initialisation, and the taps back to where they start."""
        super().reset_parameters()
        if "offsets" in self._parameters:  # nn.Conv2d calls this before there are any
            with torch.no_grad():
                self.offsets.copy_(self.starting_offsets().flatten())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        offsets = self.offsets

        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if (tensor is offsets or tensor is offsets.grad) and applied.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(applied.device)
            return applied

        return super()._apply(keep_precision, recurse)
