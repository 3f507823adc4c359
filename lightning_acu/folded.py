"""Active convolutions as plain ones: the exact fold of one layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import ConvGeometry
from .ops.dense import pad_or_crop
from .positions import Plan, expand_kernel, plan_windows

__all__ = ["FoldedConv2d", "fold_conv2d"]


class FoldedConv2d(nn.Module):
    """A sum of plain convolutions, each of the input padded or cropped in its own way.

    What an active convolution folds into where no single ``nn.Conv2d`` of reasonable size holds its taps: at large
    dilations, or with taps far apart. Holds only ``nn.Conv2d`` and padding, so any runtime can run it.

    Args:
        convs: the summands; the first may have a bias.
        sides: (top, left, bottom, right) for each of ``convs``: zeros to add, or pixels to crop where negative.
        border: sides (left, right, top, bottom) to pad first, in ``padding_mode``; () for none.
        padding_mode: of ``border``, as in ``F.pad``.
    """

    def __init__(
        self,
        convs: list[nn.Conv2d],
        sides: list[tuple[int, int, int, int]],
        border: tuple[int, ...] = (),
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.sides = sides
        self.border = border
        self.padding_mode = padding_mode

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to the convolution's output."""
        if self.border:
            input = F.pad(input, self.border, mode=self.padding_mode)
        first, *others = (conv(pad_or_crop(input, sides)) for conv, sides in zip(self.convs, self.sides, strict=True))
        output = first.to(torch.promote_types(first.dtype, torch.float32)) if others else first
        for part in others:
            output = output + part
        return output.to(first.dtype)

    def extra_repr(self) -> str:
        """The padding of each summand."""
        border = f"border={self.border}, padding_mode={self.padding_mode!r}, " if self.border else ""
        return f"{border}sides={self.sides}"


@torch.no_grad()
def fold_conv2d(
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    border: tuple[int, ...] = (),
    padding_mode: str = "zeros",
) -> nn.Conv2d | FoldedConv2d:
    """The plain convolution that equals ``acu_conv2d`` with these arguments, for every image.

    Expanded in float64 and stored in the weight's own precision. New parameters, with the ``requires_grad`` of the
    old ones. ``border`` and ``padding_mode`` describe a padding other than zeros that comes first.

    Raises:
        ValueError: ``offsets`` are not finite.
    """
    if not offsets.isfinite().all():
        raise ValueError(
            f"`offsets` has {int((~offsets.isfinite()).sum())} values that are not finite; nothing to fold"
        )
    plan = plan_windows(offsets, geometry)
    kernels = _kernels(weight, offsets, plan)
    convs: list[nn.Conv2d] = []
    sides: list[tuple[int, int, int, int]] = []
    for window, kernel in zip(plan.windows, kernels, strict=True):
        top, left, bottom, right = window.padding(geometry)
        # The convolution pads by itself where it can.
        own = len(plan.windows) == 1 and not border and top == bottom >= 0 and left == right >= 0
        conv = nn.Conv2d(
            geometry.groups * weight.shape[1],
            len(weight),
            (window.height, window.width),
            geometry.stride,  # type: ignore[arg-type]
            (top, left) if own else 0,
            window.dilation,
            geometry.groups,
            bias is not None and not convs,
            device="meta",
        )
        conv.weight = nn.Parameter(kernel, weight.requires_grad)
        if bias is not None and not convs:
            conv.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        if own:
            return conv
        convs.append(conv)
        sides.append((top, left, bottom, right))
    return FoldedConv2d(convs, sides, border, padding_mode)


def _kernels(weight: Tensor, offsets: Tensor, plan: Plan) -> list[Tensor]:
    memory_format = torch.contiguous_format
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        memory_format = torch.channels_last
    # On the CPU, where float64 always exists.
    expanded = expand_kernel(weight.to("cpu", torch.float64), offsets.to("cpu", torch.float64), plan)
    return [kernel.to(weight).contiguous(memory_format=memory_format) for kernel in plan.split(expanded)]
