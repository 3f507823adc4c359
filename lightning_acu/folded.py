"""The exact fold of one active convolution into plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_finite_offsets, refuse_peft
from .expansion import Plan, expand_kernel, pad_or_crop, plan_windows
from .geometry import ConvGeometry, same_sides

__all__ = [
    "GEOMETRY",
    "FoldedConv2d",
    "PadSame2d",
    "ReshapedConv2d",
    "fold_conv2d",
    "kernel_size_of",
    "padding_layer",
]

#: The attributes that say how an ``nn.Conv2d`` is applied, which code around it may read.
GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "_reversed_padding_repeated_twice",
)

#: A kernel of more cells is a mistake rather than a fold: with one tap far away it would be larger than any image.
_MOST_CELLS = 128 * 128

# These depend on numbers that torch.fx does not know while it traces.
torch.fx.wrap("same_sides")
torch.fx.wrap("pad_or_crop")
torch.fx.wrap("sum_parts")


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
        top, bottom = same_sides(input.shape[-2], self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = same_sides(input.shape[-1], self.kernel_size[1], self.stride[1], self.dilation[1])
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


def sum_parts(parts: list[Tensor]) -> Tensor:
    """Their sum, added in float32 at least, in their precision."""
    first = parts[0]
    if len(parts) == 1:
        return first
    total = first.to(torch.promote_types(first.dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(first.dtype)


class FoldedConv2d(nn.Module):
    """A sum of plain convolutions, each of which pads or crops the input in its own way.

    An active convolution folds into it if no single ``nn.Conv2d`` of reasonable size covers its taps, at large
    dilations or with taps far apart; or where it is cheaper (:mod:`lightning_acu.forms`). It consists of ``nn.Conv2d``
    and padding only, so any runtime can run it; ``torch.jit.script`` compiles it. :func:`lightning_acu.fold_acu` gives
    it the attributes of the active layer (kernel_size, stride, padding, dilation, groups, channels), which code around
    it may read.

    Args:
        convs: the summands, ``nn.Conv2d`` or sequences of them; the first may have a bias.
        sides: (top, left, bottom, right) for each of ``convs``: zeros to add, or pixels to crop if negative.
        pad: a layer that pads the image first, or None.
    """

    def __init__(
        self,
        convs: Sequence[nn.Module],
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
        parts: list[Tensor] = []
        for index, conv in enumerate(self.convs):  # (zip and comprehensions are beyond torch.jit.script)
            parts.append(conv(pad_or_crop(input, self.sides[index])))
        return sum_parts(parts)

    def extra_repr(self) -> str:
        """The padding of each summand."""
        return f"sides={self.sides}"


class ReshapedConv2d(nn.Conv2d):
    """One plain convolution whose attributes are those of the active one that folded into it.

    Its kernel has another size, padding or dilation than the active layer had. Code around a layer may read these:
    models that pad by ``conv.kernel_size`` and ``conv.stride`` in their own forward would pad by something else after
    the fold. So the attributes stay, and only ``weight`` has the shape that is computed with.

    :func:`lightning_acu.fold_acu` makes it in place; :meth:`plain` gives an ordinary ``nn.Conv2d``.
    """

    #: torch.jit.script looks at every attribute; these are not for it.
    __jit_ignored_attributes__: ClassVar = ["own", "plain_class", "former"]

    #: The attributes of the fold itself, as in ``GEOMETRY``.
    own: dict[str, Any]
    #: ``nn.Conv2d``, or timm's ``Conv2dSame``: what the fold is without the attributes of the active layer.
    plain_class: type[nn.Conv2d]
    if TYPE_CHECKING:  # (as annotations of the class they would be strings, which torch.jit.script cannot read)
        #: The padding and dilation of ``own``.
        own_padding: tuple[int, int] | str
        own_dilation: tuple[int, int]
        #: The layer that pads the image first, or None.
        image_pad: nn.Module | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An ordinary ``nn.Conv2d`` for code that builds more layers by ``type(conv)(...)``."""
        if not args and not kwargs:  # copied or pickled
            return super().__new__(cls)
        refuse_peft(cls, "replace it by its plain() first: model.set_submodule(name, layer.plain())")
        return nn.Conv2d(*args, **kwargs)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight, bias, self.stride, self.own_padding, self.own_dilation, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to the convolution's output."""
        if self.image_pad is not None:
            input = self.image_pad(input)
        return self._conv_forward(input, self.weight, self.bias)

    def plain(self) -> nn.Conv2d:
        """The same convolution with attributes of its own; it shares ``weight`` and ``bias``."""
        conv = nn.Conv2d(1, 1, 1, device="meta")
        conv.__class__ = self.plain_class
        vars(conv).update(self.own)
        for name in ("weight", "bias"):
            conv.register_parameter(name, self._parameters[name])
        return conv.train(self.training)

    def show_own_geometry(self) -> None:
        """Become ``plain_class``, in place, until :meth:`show_former_geometry`, for code that merges weights."""
        vars(self)["former"] = type(self), {name: vars(self)[name] for name in GEOMETRY}
        vars(self).update(self.own)
        self.__class__ = self.plain_class  # type: ignore[assignment]

    @staticmethod
    def show_former_geometry(conv: Any) -> None:
        """Undo :meth:`show_own_geometry`; attributes that were changed meanwhile stay as they are then."""
        cls, former = vars(conv).pop("former")
        if type(conv) is conv.plain_class and all(vars(conv)[name] == value for name, value in conv.own.items()):
            vars(conv).update(former)
            conv.__class__ = cls

    def become_sum(self) -> FoldedConv2d:
        """Turn into a sum of one convolution, in place, so that this one can be converted by itself."""
        conv = self.plain()
        conv.__class__ = nn.Conv2d  # (the padding layer stays outside)
        for name in ("weight", "bias"):
            del self._parameters[name]
        for name in ("own", "plain_class", "own_padding", "own_dilation"):
            del vars(self)[name]
        self.pad = self._modules.pop("image_pad")
        self.__class__ = FoldedConv2d  # type: ignore[assignment]
        self.convs, self.sides = nn.ModuleList([conv]), [(0, 0, 0, 0)]
        return self  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """That of ``nn.Conv2d``, and what the fold has instead."""
        own = ", ".join(f"{name}={self.own[name]}" for name in ("kernel_size", "padding", "dilation"))
        return f"{super().extra_repr()}, folded: {own}"


def kernel_size_of(conv: nn.Module) -> tuple[int, int]:
    """(rows, columns) of the kernel that ``conv`` computes with."""
    return tuple(conv.own["kernel_size"] if isinstance(conv, ReshapedConv2d) else conv.kernel_size)  # type: ignore[arg-type,return-value]


@torch.no_grad()
def fold_conv2d(
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    pad: nn.Module | None = None,
    one: bool | None = None,
) -> nn.Conv2d | FoldedConv2d:
    """The plain convolution that equals ``acu_conv2d`` with these arguments, for every image.

    The kernel is expanded in float64 and stored in the precision of ``weight``. The parameters are new, with the
    ``requires_grad`` of the old ones. ``pad`` is a layer that comes first, or None. ``one`` asks for one convolution,
    False for a small one for each distinct cell; None leaves it to :func:`.expansion.plan_windows`.

    Raises:
        ValueError: ``offsets`` are not finite, or too far apart for one convolution.
    """
    check_finite_offsets([("", offsets)])
    plan = plan_windows(offsets, geometry, one=one)
    if one and plan.cells > _MOST_CELLS:
        raise ValueError(
            f"`form`='single' would be a kernel of {plan.windows[0].height}x{plan.windows[0].width} cells, because the "
            "taps are far apart; use 'sum'"
        )
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
    if weight.is_meta:
        return [weight.new_empty(*weight.shape[:2], window.height, window.width) for window in plan.windows]
    memory_format = torch.contiguous_format
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        memory_format = torch.channels_last
    # On the CPU, where float64 always exists.
    expanded = expand_kernel(weight.to("cpu", torch.float64), offsets.to("cpu", torch.float64), plan)
    return [kernel.to(weight).contiguous(memory_format=memory_format) for kernel in plan.split(expanded)]
