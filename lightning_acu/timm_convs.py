"""Active versions of timm's own convolution classes, which standardise their weight or pad by the image's size.

Each computes what its class in timm does as long as the taps are on the grid, has the same parameters and names, and
is an instance of that class. :func:`lightning_acu.convert_to_acu` makes them.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from .checks import refuse_peft
from .conv import ACUConv2d
from .folded import FoldedConv2d, PadSame2d
from .geometry import Padding, same_padding
from .plain import PositionGroups

__all__ = [
    "ACUConv2dSame",
    "ACUScaledStdConv2d",
    "ACUScaledStdConv2dSame",
    "ACUStdConv2d",
    "ACUStdConv2dSame",
    "TimmACUConv2d",
]

torch.fx.wrap("same_padding")  # depends on numbers that torch.fx does not know while it traces


class TimmACUConv2d(ACUConv2d):
    """Their common base: the arguments of timm's class, and TensorFlow's "SAME" padding if ``same_pad`` is true.

    Args:
        args, kwargs: those of ``plain_class``.
        position_groups, fixed_centre, backend: as in :class:`ACUConv2d`.
    """

    #: Whether the zero padding depends on the size of the image.
    same_pad: bool = False

    def __init__(
        self,
        *args: Any,
        position_groups: PositionGroups = 1,
        fixed_centre: bool = True,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        refuse_peft(type(self), "leave active convolutions out of target_modules, or fold the model first")
        super(ACUConv2d, self).__init__(*args, **kwargs)  # that of timm's class
        self._add_offsets(position_groups, fixed_centre, backend)

    @classmethod
    def from_positions(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Only :class:`ACUConv2d` has free shapes."""
        raise TypeError(f"{cls.__name__} has the grid of {cls.plain_class.__name__}; use ACUConv2d for free shapes")

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        if not self.same_pad:
            return super()._pad(input)
        top, left, bottom, right = same_padding(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        sides = (left, right, top, bottom)
        # The operator needs ints, which programs for images of any size do not have.
        any_size = torch.compiler.is_exporting() or is_tracing()
        return (F.pad(input, sides), 0) if any_size else (input, sides)

    def _padding_layer(self) -> nn.Module | None:
        if not self.same_pad:
            return super()._padding_layer()
        return PadSame2d(self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]

    def _merge_padding(self, folded: FoldedConv2d) -> nn.Conv2d | FoldedConv2d:
        """A Conv2dSame if the kernel has grown or shrunk by as much on both sides, since "SAME" then pads to match."""
        if not self.same_pad:
            return super()._merge_padding(folded)
        (conv,), (sides,) = folded.convs, folded.sides
        top, left, bottom, right = sides
        # (Where the stride is beyond a kernel, "SAME" pads nothing, whatever the kernel's size.)
        skips = any(
            (k - 1) * d + 1 < stride
            for each in (self, conv)
            for k, d, stride in zip(each.kernel_size, each.dilation, self.stride, strict=True)  # type: ignore[arg-type]
        )
        if top != bottom or left != right or (skips and any(sides)):
            return folded
        conv.__class__ = Conv2dSame
        return conv  # type: ignore[return-value]

    def _standardized(self, scale: Tensor | None = None) -> Tensor:
        """(C_out, ...): each output channel's weights at mean 0 and variance 1, times ``scale`` (C_out,)."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        eps: float = self.eps  # type: ignore[assignment]
        return F.batch_norm(flat, None, None, scale, training=True, momentum=0.0, eps=eps).reshape_as(self.weight)


class ACUConv2dSame(TimmACUConv2d, Conv2dSame):
    """timm's ``Conv2dSame``, active."""

    plain_class: ClassVar[type[nn.Conv2d]] = Conv2dSame
    same_pad = True


class ACUStdConv2d(TimmACUConv2d, StdConv2d):
    """timm's ``StdConv2d``, active: weight standardisation (Qiao et al., arXiv 1903.10520)."""

    plain_class: ClassVar[type[nn.Conv2d]] = StdConv2d

    def effective_weight(self) -> Tensor:
        """The standardised weight."""
        return self._standardized()


class ACUStdConv2dSame(TimmACUConv2d, StdConv2dSame):
    """timm's ``StdConv2dSame``, active: weight standardisation and "SAME" padding."""

    plain_class: ClassVar[type[nn.Conv2d]] = StdConv2dSame

    def effective_weight(self) -> Tensor:
        """The standardised weight."""
        return self._standardized()


class ACUScaledStdConv2d(TimmACUConv2d, ScaledStdConv2d):
    """timm's ``ScaledStdConv2d``, active: scaled weight standardisation (Brock et al., arXiv 2101.08692)."""

    plain_class: ClassVar[type[nn.Conv2d]] = ScaledStdConv2d

    def effective_weight(self) -> Tensor:
        """The standardised weight times ``gain * scale``."""
        return self._standardized((self.gain * self.scale).view(-1))


class ACUScaledStdConv2dSame(TimmACUConv2d, ScaledStdConv2dSame):
    """timm's ``ScaledStdConv2dSame``, active: scaled weight standardisation and "SAME" padding."""

    plain_class: ClassVar[type[nn.Conv2d]] = ScaledStdConv2dSame

    def effective_weight(self) -> Tensor:
        """The standardised weight times ``gain * scale``."""
        return self._standardized((self.gain * self.scale).view(-1))
