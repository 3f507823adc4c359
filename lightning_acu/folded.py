"""The exact fold of one active convolution into plain ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .expansion import Plan, expand_kernel, pad_or_crop, plan_windows
from .geometry import ConvGeometry, same_padding

__all__ = ["FoldedConv2d", "PadSame2d", "fold_conv2d", "padding_layer"]

torch.fx.wrap("same_padding")  # depends on numbers that torch.fx does not know while it traces


class PadSame2d(nn.Module):
    """TensorFlow's "SAME" zero padding, which depends on the size of the image.

    Args:
        kernel_size, stride, dilation: (rows, columns) of the convolution that follows.
    """

    def __init__(self, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, input: Tensor) -> Tensor:
        """(..., H, W) to (..., H + top + bottom, W + left + right)."""
        top, left, bottom, right = same_padding(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        return F.pad(input, (left, right, top, bottom))

    def extra_repr(self) -> str:
        """The convolution that follows."""
        return f"kernel_size={self.kernel_size}, stride={self.stride}, dilation={self.dilation}"


#: The layers that pad as ``nn.Conv2d`` does, for each ``padding_mode`` except "zeros".
_PADDING_LAYERS = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}


def padding_layer(conv: nn.Conv2d) -> nn.Module | None:
    """The layer that pads the image of ``conv`` first; None if ``conv`` pads with zeros, which it does by itself."""
    if conv.padding_mode == "zeros":
        return None
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    return _PADDING_LAYERS[conv.padding_mode]((left, right, top, bottom))


class FoldedConv2d(nn.Module):
    """A sum of plain convolutions, each of which pads or crops the input in its own way.

    An active convolution folds into it if no single ``nn.Conv2d`` of reasonable size covers its taps: at large
    dilations, or with taps far apart. It consists of ``nn.Conv2d`` and padding only, so any runtime can run it.

    Args:
        convs: the summands; the first may have a bias.
        sides: (top, left, bottom, right) for each of ``convs``: zeros to add, or pixels to crop if negative.
        pad: a layer that pads the image first, or None.
    """

    def __init__(
        self,
        convs: list[nn.Conv2d],
        sides: list[tuple[int, int, int, int]],
        pad: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pad = pad
        self.convs = nn.ModuleList(convs)
        self.sides = sides

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to the convolution's output."""
        if self.pad is not None:
            input = self.pad(input)
        first, *others = (conv(pad_or_crop(input, sides)) for conv, sides in zip(self.convs, self.sides, strict=True))
        output = first.to(torch.promote_types(first.dtype, torch.float32)) if others else first
        for part in others:
            output = output + part
        return output.to(first.dtype)

    def extra_repr(self) -> str:
        """The padding of each summand."""
        return f"sides={self.sides}"


@torch.no_grad()
def fold_conv2d(
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    pad: nn.Module | None = None,
) -> nn.Conv2d | FoldedConv2d:
    """The plain convolution that equals ``acu_conv2d`` with these arguments, for every image.

    The kernel is expanded in float64 and stored in the precision of ``weight``. The parameters are new, with the
    ``requires_grad`` of the old ones. ``pad`` is a layer that comes first, or None.

    Raises:
        ValueError: ``offsets`` are not finite.
    """
    if not offsets.isfinite().all():
        raise ValueError(
            f"`offsets` has {int((~offsets.isfinite()).sum())} values that are not finite and cannot be folded"
        )
    plan = plan_windows(offsets, geometry)
    kernels = _kernels(weight, offsets, plan)
    convs: list[nn.Conv2d] = []
    sides: list[tuple[int, int, int, int]] = []
    for window, kernel in zip(plan.windows, kernels, strict=True):
        top, left, bottom, right = window.padding(geometry)
        # One convolution with equal sides pads by itself.
        own = len(plan.windows) == 1 and pad is None and top == bottom >= 0 and left == right >= 0
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
    return FoldedConv2d(convs, sides, pad)


def _kernels(weight: Tensor, offsets: Tensor, plan: Plan) -> list[Tensor]:
    memory_format = torch.contiguous_format
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        memory_format = torch.channels_last
    # On the CPU, where float64 always exists.
    expanded = expand_kernel(weight.to("cpu", torch.float64), offsets.to("cpu", torch.float64), plan)
    return [kernel.to(weight).contiguous(memory_format=memory_format) for kernel in plan.split(expanded)]
