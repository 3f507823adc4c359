""":class:`ActiveShift2d`: every channel of an image shifted by its own learned, real-valued distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from .checks import at_least, refuse_peft
from .conv import ACUConv2d
from .geometry import integers

__all__ = ["ActiveShift2d"]


class ActiveShift2d(ACUConv2d):
    """The Active Shift Layer (ASL): each channel is read ``offsets`` away from where it is, by bilinear interpolation.

        output[n, c, oy, ox] = bilinear(input[n, c], oy * stride + dy_c, ox * stride + dx_c)

    with zeros outside the image: an active convolution of one tap a channel whose weight is 1. A 1x1 convolution after
    it makes the whole a spatial convolution: ``nn.Sequential(ActiveShift2d(c), nn.Conv2d(c, d, 1))``. ``offsets``, the
    only parameter, holds (dy, dx) in pixels for each channel, 2 * channels numbers. ``weight`` is a buffer of ones
    (channels, 1, 1, 1), in no state_dict, so that nothing trains it. The shifts start out random, uniform in
    (-radius, radius), as in the authors' code; :attr:`displacement` and limits of it count from no shift at all.

    Everything for active convolutions serves this layer too: training (with unit gradients, as the authors have it),
    rounding, reports, files, and the fold, a depthwise convolution.

    Args:
        channels: of the input and the output.
        stride: as in ``nn.Conv2d``; the output has ``ceil(H / stride)`` rows.
        device, dtype: as in ``nn.Conv2d``; ``offsets`` are float32 at least.
        radius: shifts start in (-radius, radius) pixels on each axis.
        backend: as in :class:`ACUConv2d`.

    Raises:
        ValueError: an invalid argument; the message names it and its value.

    References:
        Y. Jeon and J. Kim, Constructing Fast Network through Deconstruction of Convolution, NeurIPS 2018
        (arXiv 1806.07370).
    """

    radius: float

    def __init__(
        self,
        channels: int,
        stride: int | tuple[int, int] = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        radius: float = 1.0,
        backend: str = "auto",
    ) -> None:
        refuse_peft(type(self), "leave shifts out of target_modules, or fold the model first")
        if len(integers("channels", channels)) != 1 or channels < 1:
            raise ValueError(f"`channels` (={channels!r}) must be an int >= 1")
        self.radius = at_least("radius", radius)
        super().__init__(
            channels, channels, 1, stride, groups=channels, bias=False, device=device, dtype=dtype,
            position_groups="channels", fixed_centre=False, backend=backend,
        )  # fmt: skip
        weight = self._parameters.pop("weight")
        assert weight is not None
        # A buffer: model.requires_grad_() and optimizers leave it alone.
        self.register_buffer("weight", torch.ones_like(weight.detach()), persistent=False)
        self.reset_parameters()

    @classmethod
    def adopt(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """A shift is no conversion of a convolution; build one."""
        raise TypeError("ActiveShift2d is built by ActiveShift2d(channels), not made from a convolution or positions")

    from_conv2d = from_positions = adopt

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New random shifts."""
        if hasattr(self, "offsets"):  # nn.Conv2d calls this before there are any
            self._set_offsets(self.starting_offsets().flatten().uniform_(-self.radius, self.radius))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Initialise weight and shifts when they leave the meta device (``to_empty``)."""
        was_meta = self.weight.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.weight.is_meta:
            self.weight.fill_(1)
            self.reset_parameters()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        """Also make the weight where ``assign=True`` has replaced shifts on the meta device."""
        super()._load_from_state_dict(*args)
        if self.weight.is_meta and not self.offsets.is_meta:
            self._buffers["weight"] = torch.ones_like(self.weight, device=self.offsets.device)

    def extra_repr(self) -> str:
        """The arguments, those at their defaults left out."""
        text = f"{self.in_channels}"
        text += f", stride={self.stride}" if self.stride != (1, 1) else ""
        text += f", radius={self.radius}" if self.radius != 1 else ""
        return text + (f", backend={self.backend!r}" if self.backend != "auto" else "")
