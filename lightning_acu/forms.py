"""The exact forms of a fold: one convolution, or several on shifted images.

An active convolution is the sum over its taps of a 1x1 convolution of the image seen from the tap, interpolated where
the tap lies between pixels. What that costs depends on who computes it, so it can be written in several ways:

========= ==============================================================================================
form      what it consists of
========= ==============================================================================================
single    one convolution, dilated or larger: ``nn.Conv2d``
sum       a small convolution for each distinct cell, on the padded or cropped image, added up
depthwise for each tap a depthwise convolution that shifts and interpolates, then a 1x1 convolution, added up
shifts    the image shifted and interpolated for each tap, the copies concatenated, one 1x1 convolution
auto      "single", or "sum" where that would hold far more cells than the taps need (:mod:`.expansion`)
========= ==============================================================================================

K taps at whole pixels do K times the arithmetic of a 1x1 convolution in all forms but "single".
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_finite_offsets
from .choices import one_of
from .expansion import Window, split_offsets
from .folded import FoldedConv2d, fold_conv2d
from .geometry import ConvGeometry

__all__ = ["FORMS", "ShiftedConv2d", "check_form", "fold_in_form"]

#: All forms by name.
FORMS = ("auto", "single", "sum", "depthwise", "shifts")

#: A depthwise kernel reaches from its tap to the output pixel, so that it only pads, which runtimes fuse into it, and
#: need not crop, which costs a copy of the image; up to so many cells.
_MOST_CELLS = 49

#: "shifts" pads the image once, for all taps, by less than this on each side.
_MOST_PADDING = 64

#: A tap, and the weights of all output channels there: ((row, column, their fractions), (C_out, C_in/groups)).
_Tap = tuple[tuple[int, int, float, float], Tensor]


class ShiftedConv2d(FoldedConv2d):
    """A 1x1 convolution of copies of the image, one for each tap: shifted to it, and interpolated between pixels.

    Args:
        conv: the 1x1 convolution; its input channels are, group by group, those of the image at each tap.
        taps: (row, column, their fractions) of each, in pixels of the image with ``margins``.
        margins: (top, left, bottom, right) zeros to add to the image first.
        stride: (rows, columns).
        reach: (rows, columns) of the image with ``margins`` that are not first pixels of an output's window.
        pad: a layer that pads the image before that, or None.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        taps: list[tuple[int, int, float, float]],
        margins: tuple[int, int, int, int],
        stride: tuple[int, int],
        reach: tuple[int, int],
        pad: nn.Module | None = None,
    ) -> None:
        super().__init__([conv], [margins], pad)
        self.taps, self.step, self.reach = taps, stride, reach

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to the convolution's output."""
        if self.pad is not None:
            input = self.pad(input)
        top, left, bottom, right = self.sides[0]
        input = F.pad(input, (left, right, top, bottom))
        height, width = input.size(-2) - self.reach[0], input.size(-1) - self.reach[1]
        step_y, step_x = self.step
        groups = self.convs[0].groups
        copies = []
        for row, column, below, beside in self.taps:
            end, side = row + height, column + width
            copy = input[..., row:end:step_y, column:side:step_x]
            if below != 0.0:
                copy = torch.lerp(copy, input[..., row + 1 : end + 1 : step_y, column:side:step_x], below)
            if beside != 0.0:
                right_copy = input[..., row:end:step_y, column + 1 : side + 1 : step_x]
                if below != 0.0:
                    corner = input[..., row + 1 : end + 1 : step_y, column + 1 : side + 1 : step_x]
                    right_copy = torch.lerp(right_copy, corner, below)
                copy = torch.lerp(copy, right_copy, beside)
            copies.append(copy if groups == 1 else copy.unflatten(-3, (groups, -1)))
        if groups == 1:
            return self.convs[0](torch.cat(copies, dim=-3))
        return self.convs[0](torch.cat(copies, dim=-3).flatten(-4, -3))

    def extra_repr(self) -> str:
        """The number of taps."""
        return f"taps={len(self.taps)}, margins={self.sides[0]}, stride={self.step}"


def check_form(form: str) -> None:
    """Raise a ValueError unless ``form`` is one of ``FORMS``."""
    one_of("form", form, FORMS)


@torch.no_grad()
def fold_in_form(
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    geometry: ConvGeometry,
    pad: nn.Module | None = None,
    form: str = "auto",
) -> nn.Conv2d | FoldedConv2d:
    """The plain convolutions of the given form that equal ``acu_conv2d`` with these arguments, for every image.

    Numbers are computed in float64 and stored in the precision of ``weight``. The parameters are new, with the
    ``requires_grad`` of the old ones; kernels that only shift and interpolate do not learn.

    Args:
        weight: (C_out, C_in/groups, kh, kw); on the meta device the result is there, too.
        offsets: (P, K, 2), in pixels.
        bias: (C_out,) or None.
        geometry: that of the convolution.
        pad: a layer that comes first, or None.
        form: one of ``FORMS``.

    Raises:
        ValueError: an unknown form, ``offsets`` that are not finite, or taps too far apart for the form.
    """
    check_form(form)
    if form in ("auto", "single", "sum"):
        return fold_conv2d(weight, offsets, bias, geometry, pad, one={"single": True, "sum": False}.get(form))
    check_finite_offsets([("", offsets)])
    make = _depthwise if form == "depthwise" else _shifts
    return make(list(_taps(weight, offsets, geometry)), weight, bias, geometry, pad)


def _taps(weight: Tensor, offsets: Tensor, geometry: ConvGeometry) -> Iterator[_Tap]:
    """Every distinct place of a tap, with the weights there, in float64; of position groups without a tap there 0."""
    whole, fraction = split_offsets(offsets.detach().to("cpu", torch.float64))
    corner = whole + torch.tensor(geometry.grid(), dtype=torch.long, device="cpu")
    exact = weight.detach().to("meta" if weight.is_meta else "cpu", torch.float64)
    grouped = exact.reshape(len(offsets), -1, weight.shape[1], geometry.taps)  # (P, C_out/P, C_in/groups, K)
    places: dict[tuple[int, int, float, float], list[tuple[int, int]]] = {}
    for group, (cells, shares) in enumerate(zip(corner.tolist(), fraction.tolist(), strict=True)):
        for tap, ((row, column), (below, beside)) in enumerate(zip(cells, shares, strict=True)):
            places.setdefault((row, column, below, beside), []).append((group, tap))
    for place, users in places.items():
        total = grouped.new_zeros(grouped.shape[:3])
        for group, tap in users:
            total[group] += grouped[group, ..., tap]
        yield place, total.flatten(0, 1)


def _pointwise(
    kernel: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, stride: tuple[int, int]
) -> nn.Conv2d:
    """A 1x1 convolution with ``kernel`` (C_out, C_in/groups) and the precision and device of ``weight``."""
    conv = nn.Conv2d(
        geometry.groups * kernel.shape[1], len(kernel), 1, stride, 0, 1, geometry.groups, bias is not None,
        device="meta",
    )  # fmt: skip
    conv.weight = nn.Parameter(kernel[:, :, None, None].to(weight), weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return conv


def _depthwise(
    taps: list[_Tap], weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, pad: nn.Module | None
) -> FoldedConv2d:
    channels = geometry.groups * weight.shape[1]
    convs: list[nn.Module] = []
    sides: list[tuple[int, int, int, int]] = []
    for (row, column, below, beside), kernel in taps:
        window = _window(row, column, below != 0, beside != 0, geometry)
        top, left, bottom, right = padding = window.padding(geometry)
        own_bias = bias if not convs else None
        if window.area == 1:
            convs.append(_pointwise(kernel, weight, own_bias, geometry, geometry.stride))
            sides.append(padding)
            continue
        own = top == bottom >= 0 and left == right >= 0  # then it pads by itself
        shift = nn.Conv2d(
            channels, channels, (window.height, window.width), geometry.stride, (top, left) if own else 0,
            window.dilation, channels, bias=False, device="meta",
        )  # fmt: skip
        rows = _shares(window.top, window.height, window.dilation[0], row, below)
        columns = _shares(window.left, window.width, window.dilation[1], column, beside)
        cells = torch.outer(rows, columns).to(weight).expand(channels, 1, -1, -1)
        shift.weight = nn.Parameter(cells.contiguous(), requires_grad=False)
        convs.append(nn.Sequential(shift, _pointwise(kernel, weight, own_bias, geometry, (1, 1))))
        sides.append((0, 0, 0, 0) if own else padding)
    return FoldedConv2d(convs, sides, pad)


def _window(row: int, column: int, below: bool, beside: bool, geometry: ConvGeometry) -> Window:
    """The kernel that reads a tap: its cells, and where it is small enough those between it and the output pixel."""
    lost = geometry.shrinkage
    reaching = [
        _axis(min(first, 0), max(first + more, end), (first, first + more))
        for first, more, end in ((row, below, lost[0]), (column, beside, lost[1]))
    ]
    if math.prod(count for _, count, _ in reaching) > _MOST_CELLS:
        reaching = [_axis(first, first + more, (first,)) for first, more in ((row, below), (column, beside))]
    (top, height, dilation_y), (left, width, dilation_x) = reaching
    return Window(top, left, height, width, (dilation_y, dilation_x))


def _axis(low: int, high: int, cells: tuple[int, ...]) -> tuple[int, int, int]:
    """First cell, number of cells and step of the smallest axis from ``low`` to ``high`` that has ``cells``."""
    step = math.gcd(high - low, *(cell - low for cell in cells)) or 1
    return low, (high - low) // step + 1, step


def _shares(first: int, count: int, step: int, cell: int, fraction: float) -> Tensor:
    """(count,): the share of each cell of an axis in a tap ``fraction`` behind ``cell``."""
    shares = torch.zeros(count, dtype=torch.float64, device="cpu")
    shares[(cell - first) // step] = 1 - fraction
    if fraction:
        shares[(cell + 1 - first) // step] = fraction
    return shares


def _shifts(
    taps: list[_Tap], weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, pad: nn.Module | None
) -> ShiftedConv2d:
    lost = geometry.shrinkage
    rows, columns = ([row for (row, *_), _ in taps], [column for (_, column, *_), _ in taps])
    top, left = max(0, -min(rows)), max(0, -min(columns))
    bottom = max(0, max(row + (below != 0) for (row, _, below, _), _ in taps) - lost[0])
    right = max(0, max(column + (beside != 0) for (_, column, _, beside), _ in taps) - lost[1])
    if max(top, left, bottom, right) >= _MOST_PADDING:
        raise ValueError(
            f"`form`='shifts' pads the image by less than {_MOST_PADDING} pixels, and these taps need "
            f"{max(top, left, bottom, right)}; use 'sum'"
        )
    channels = geometry.groups * weight.shape[1]
    conv = nn.Conv2d(
        channels * len(taps), len(weight), 1, groups=geometry.groups, bias=bias is not None, device="meta"
    )  # fmt: skip
    kernel = torch.cat([kernel for _, kernel in taps], dim=1)[:, :, None, None]
    conv.weight = nn.Parameter(kernel.to(weight), weight.requires_grad)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    places = [(row + top, column + left, below, beside) for (row, column, below, beside), _ in taps]
    reach = (lost[0] + top + bottom, lost[1] + left + right)
    return ShiftedConv2d(conv, places, (top, left, bottom, right), geometry.stride, reach, pad)
