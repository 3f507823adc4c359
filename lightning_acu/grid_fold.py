"""The fold of an active convolution whose taps are on plain dilated grids: at exactly the plain price."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dilation import grid_dilations, padding_at
from .expansion import pad_or_crop
from .folded import FoldedConv2d
from .geometry import ConvGeometry, Padding, pair, resolve_padding

__all__ = ["SplitConv2d", "conv2d_as_plain", "fold_onto_grids"]

_NO_SIDES = (0, 0, 0, 0)


class _WithPositions(torch.autograd.Function):
    """The weight itself, in a graph that gives positions gradients of zero: DDP waits for those of all parameters."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, offsets: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.positions = inputs[1].shape, inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.positions
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def conv2d_as_plain(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    at: tuple[int, int],
) -> Tensor:
    """What ``acu_conv2d`` computes for taps on the grid of dilation ``at`` (dy, dx), by ``F.conv2d``.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as there.
        offsets: not read; they get gradients of zero.
        at: the dilation that is computed with. Output size and centre are those of ``dilation``.
    """
    if torch.is_grad_enabled() and offsets.requires_grad:
        weight = _WithPositions.apply(weight, offsets)  # type: ignore[no-untyped-call]
    kernel_size, stride, dilation = pair(weight.shape[-2:]), pair(stride), pair(dilation)
    sides = resolve_padding(padding, kernel_size, stride, dilation)
    sides = padding_at(at, ConvGeometry(kernel_size, stride, sides, dilation, groups))
    top, left, bottom, right = sides
    if top == bottom >= 0 and left == right >= 0:
        return F.conv2d(input, weight, bias, stride, (top, left), at, groups)
    return F.conv2d(pad_or_crop(input, sides), weight, bias, stride, 0, at, groups)


class SplitConv2d(FoldedConv2d):
    """Plain convolutions that compute some output channels each, concatenated.

    An active convolution whose position groups are on grids of different dilations folds into it: one convolution for
    the channels of each dilation, together with the arithmetic of a single plain one. (More where a dilation has
    different numbers of output channels in different conv groups.)

    Args:
        convs: the parts; each may have a bias.
        sides: (top, left, bottom, right) for each of ``convs``: zeros to add, or pixels to crop if negative.
        inputs: for each of ``convs`` the input channels it reads; None for all.
        outputs: for each of ``convs`` the output channels it computes.
        dilations: (dy, dx) of each position group.
        pad: a layer that pads the image first, or None.
    """

    if TYPE_CHECKING:  # (as annotations of the class they would be strings, which torch.jit.script cannot read)
        #: The input channels that the parts read, one part after the other.
        inputs: Tensor
        #: The place of each output channel among those of the parts; None if they are in order.
        places: Tensor | None

    def __init__(
        self,
        convs: list[nn.Conv2d],
        sides: list[tuple[int, int, int, int]],
        inputs: list[list[int] | None],
        outputs: list[list[int]],
        dilations: list[tuple[int, int]],
        pad: nn.Module | None = None,
    ) -> None:
        super().__init__(convs, sides, pad)
        self.outputs = outputs
        self.dilations = dilations
        device = convs[0].weight.device

        def index(name: str, channels: list[int] | None) -> None:
            tensor = None if channels is None else torch.tensor(channels, dtype=torch.int64, device=device)
            self.register_buffer(name, tensor, persistent=False)

        ends = list(accumulate(len(channels or ()) for channels in inputs))
        #: Where in ``inputs`` the channels of each part are; an empty range for a part that reads all.
        self.ranges = list(pairwise([0, *ends]))
        index("inputs", [channel for channels in inputs for channel in channels or ()])
        order = [channel for part in outputs for channel in part]
        places = sorted(range(len(order)), key=order.__getitem__)
        index("places", None if places == list(range(len(order))) else places)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to the convolution's output."""
        if self.pad is not None:
            input = self.pad(input)
        outputs: list[Tensor] = []
        for index, conv in enumerate(self.convs):  # (zip and comprehensions are beyond torch.jit.script)
            first, last = self.ranges[index]
            part = input if first == last else input.index_select(-3, self.inputs[first:last])
            sides = self.sides[index]
            outputs.append(conv(part if sides == (0, 0, 0, 0) else pad_or_crop(part, sides)))
        output = torch.cat(outputs, -3)
        return output if self.places is None else output.index_select(-3, self.places)


@torch.no_grad()
def fold_onto_grids(
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    pad: nn.Module | None = None,
) -> nn.Conv2d | FoldedConv2d | None:
    """The plain convolution of the same kernel size that equals ``acu_conv2d`` with these arguments, if there is one.

    There is if every position group is on a plain dilated grid (:mod:`lightning_acu.dilation`). Weights keep their
    values and their order. The parameters are new, with the ``requires_grad`` of the old ones.

    Args:
        weight, offsets, bias, geometry: of the layer; offsets (P, K, 2).
        pad: a layer that comes first, or None.

    Returns:
        One ``nn.Conv2d``, a :class:`SplitConv2d` where groups have different dilations, or a
        :class:`~lightning_acu.folded.FoldedConv2d` of one convolution where the sides are padded differently or
        cropped; None if the taps are elsewhere.
    """
    dilations = grid_dilations(offsets, geometry)
    if dilations is None:
        return None
    c_out, c_in = weight.shape[:2]
    parts = list(_parts(dilations, c_out, geometry.groups))
    convs, sides = [], []
    for dilation, groups, outputs in parts:
        padding, own = padding_at(dilation, geometry), None
        if pad is None or len(parts) > 1:
            own = _own_padding(padding, dilation, geometry)
        conv = nn.Conv2d(
            c_in * len(groups),
            len(outputs),
            geometry.kernel_size,
            geometry.stride,
            0 if own is None else own,
            dilation,
            len(groups),
            bias is not None,
            device="meta",
        )
        all_of_them = len(parts) == 1  # (no copy of a copy, and the strides stay)
        conv.weight = nn.Parameter(weight.clone() if all_of_them else weight[outputs], weight.requires_grad)
        if bias is not None:
            conv.bias = nn.Parameter(bias.clone() if all_of_them else bias[outputs], bias.requires_grad)
        convs.append(conv)
        sides.append(padding if own is None else _NO_SIDES)
    if len(parts) == 1:
        return convs[0] if pad is None and not any(sides[0]) else FoldedConv2d(convs, sides, pad)
    inputs = [
        None if len(groups) == geometry.groups else [c_in * group + i for group in groups for i in range(c_in)]
        for _, groups, _ in parts
    ]
    return SplitConv2d(convs, sides, inputs, [outputs for *_, outputs in parts], dilations, pad)


def _parts(
    dilations: list[tuple[int, int]], c_out: int, groups: int
) -> Iterator[tuple[tuple[int, int], list[int], list[int]]]:
    """(dilation, conv groups, output channels) of each convolution, with as many output channels in each group."""
    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    for channel in range(c_out):
        dilation = dilations[channel * len(dilations) // c_out]
        found.setdefault(dilation, {}).setdefault(channel * groups // c_out, []).append(channel)
    for dilation, by_group in found.items():
        alike = len({len(channels) for channels in by_group.values()}) == 1
        for part in [by_group] if alike else [{group: channels} for group, channels in by_group.items()]:
            yield dilation, list(part), [channel for channels in part.values() for channel in channels]


def _own_padding(
    sides: tuple[int, int, int, int], dilation: tuple[int, int], geometry: ConvGeometry
) -> tuple[int, int] | str | None:
    """``padding`` of an ``nn.Conv2d`` that pads these sides by itself, or None."""
    top, left, bottom, right = sides
    if top == bottom >= 0 and left == right >= 0:
        return top, left
    # As the layer itself did: torch warns of "same" where the sides differ.
    same = [resolve_padding("same", geometry.kernel_size, (1, 1), each) for each in (dilation, geometry.dilation)]
    return "same" if geometry.stride == (1, 1) and [sides, geometry.padding] == same else None
