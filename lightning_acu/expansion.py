"""Real-valued tap positions as integer cells: expansion of a kernel over them, and the plain convolutions they form.

Positions are shared by all pixels, so an active convolution equals a plain one whose kernel spreads the weight of every
tap over its 4 integer neighbours with bilinear weights. This module owns that fact. :func:`plan_windows` decides which
plain convolutions hold those cells, :func:`expand_kernel` fills them, :func:`expand_kernel_backward` is the adjoint.
The dense backend and the fold are both thin layers over these three, so that a folded model computes what the dense
backend does.

Shapes: P position groups, K taps, C_out output channels; offsets (P, K, 2) hold (row, column) in input pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from .geometry import LIMIT, ConvGeometry

__all__ = [
    "FAR",
    "Plan",
    "Window",
    "distinct",
    "expand_kernel",
    "expand_kernel_backward",
    "pad_or_crop",
    "plan_windows",
    "propagate_nan_offsets",
    "regular_window",
    "split_offsets",
]

#: Offsets are clamped to this many pixels: far outside any image, and still exact as an integer.
FAR = float(LIMIT)

#: One kernel over all cells is used until it holds this many times the cells of one small kernel per tap.
#: Such a kernel does more arithmetic, but one large convolution runs nearer to the peak than many small ones.
_SPARSE_FACTOR = 4

#: Position groups of at most so many weights a tap (a channel of a depthwise layer) are expanded weight by weight: the
#: matrix from taps to cells, which a matrix product needs, would be larger than the kernel itself.
_FEW = 4


@dataclass(frozen=True)
class Window:
    """The kernel of one plain convolution: ``height x width`` cells ``dilation`` apart.

    ``top`` and ``left`` place its first cell, in input pixels seen from ``output pixel * stride``.
    """

    top: int
    left: int
    height: int
    width: int
    dilation: tuple[int, int] = (1, 1)

    @property
    def area(self) -> int:
        """The number of cells."""
        return self.height * self.width

    def padding(self, geometry: ConvGeometry) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) that keep the output size of ``geometry``; a negative side is cropped."""
        lost = geometry.shrinkage
        bottom = (self.height - 1) * self.dilation[0] - lost[0] + self.top
        right = (self.width - 1) * self.dilation[1] - lost[1] + self.left
        return -self.top, -self.left, bottom, right


def pad_or_crop(image: Tensor, sides: tuple[int, int, int, int]) -> Tensor:
    """``image`` (..., H, W) with zeros added at (top, left, bottom, right), or pixels removed where a side is negative.

    ``sides`` as :meth:`Window.padding` gives them; they may remove all pixels of the image.
    """
    top, left, bottom, right = sides
    if sides == (0, 0, 0, 0):
        return image
    if is_tracing():  # slower, but a trace records no decisions on sizes
        padded = F.pad(image, (max(left, 0), max(right, 0), max(top, 0), max(bottom, 0)))
        return F.pad(padded, (min(left, 0), min(right, 0), min(top, 0), min(bottom, 0)))
    if min(top, left, bottom, right) < 0:  # (the size of an image may not be known while a program is exported)
        height, width = image.shape[-2:]
        if max(-top, -bottom) >= height or max(-left, -right) >= width:  # no pixel of the image is left
            return image.new_zeros(image.shape[:-2] + (height + top + bottom, width + left + right))  # noqa: RUF005 (for scripts)
    return F.pad(image, (left, right, top, bottom))


@dataclass(frozen=True)
class Plan:
    """Which plain convolutions hold the taps, and where in them each tap's 4 neighbours lie.

    ``index`` (P, K, 4) counts cells through all ``windows`` in order; ``cells`` (one past the end) stands for a
    neighbour that no window holds.
    """

    windows: tuple[Window, ...]
    index: Tensor

    @property
    def cells(self) -> int:
        """The number of cells of all windows."""
        return sum(window.area for window in self.windows)

    def split(self, expanded: Tensor) -> list[Tensor]:
        """(..., cells) to one (..., height, width) for each window."""
        parts = expanded.split([window.area for window in self.windows], dim=-1)
        return [part.unflatten(-1, (w.height, w.width)) for part, w in zip(parts, self.windows, strict=True)]


def split_offsets(offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets to whole pixels (int64, by floor) and the fractions in [0, 1) above them.

    On the lattice the fraction is 0, so that derivatives with respect to it are those of the cell to the right: the
    one-sided derivative this project uses everywhere. A weight written as ``relu(1 - |p - g|)`` has none there.
    Infinite offsets count as far outside the image; NaN stays NaN in the fraction and so reaches the output.
    """
    clamped = offsets.clamp(-FAR, FAR)
    whole = clamped.detach().floor().nan_to_num()
    return whole.long(), clamped - whole


def propagate_nan_offsets(output: Tensor, offsets: Tensor) -> Tensor:
    """``output`` (N, C_out, H, W) with NaN in all channels of the position groups that hold a NaN offset.

    Interpolation alone would miss it where the tap, without its offset, reads nothing but zeros outside the image.
    """
    invalid = offsets.detach().isnan().flatten(1).any(1)
    grouped = output.unflatten(1, (len(offsets), -1))
    return grouped.masked_fill(invalid[:, None, None, None], float("nan")).flatten(1, 2)


def plan_windows(
    offsets: Tensor,
    geometry: ConvGeometry,
    input_size: Sequence[int] | None = None,
    *,
    gradient: bool = False,
    one: bool | None = None,
) -> Plan:
    """The fewest and smallest plain convolutions that hold every tap of ``offsets`` (P, K, 2), on the CPU.

    One window where the taps lie close together, with the dilation their rows and columns share; where that would
    hold far more cells than taps (large dilations, scattered taps), one small window for each distinct cell.

    Args:
        offsets: (P, K, 2) in pixels, on any device (a GPU tensor is copied to the host, which waits for it).
        geometry: the convolution the offsets belong to.
        input_size: (height, width) of the image; cells that never meet it are dropped. None keeps all.
        gradient: keep all 4 neighbours of a tap on the lattice. Their weight is 0 there, their derivative is not.
        one: True asks for one window, False for one for each distinct cell; None for what holds fewer cells.
    """
    whole, fraction = split_offsets(offsets.detach().cpu())
    # Of the two neighbours of a tap along each axis, (2, P, K).
    rows, columns = (torch.stack((first, first + 1)) for first in (whole + _grid(geometry)).unbind(-1))
    used = torch.ones(2, *rows.shape, dtype=torch.bool, device="cpu")  # [row, column, position group, tap]
    if not gradient:
        used[1] &= fraction[..., 0] != 0
        used[:, 1] &= fraction[..., 1] != 0
    span = _span(_where(used.any(1), rows), _where(used.any(0), columns), geometry)
    if input_size is not None and span.area > geometry.taps:  # (the kernel as it was is best left as it was)
        meets = [
            (cells < size) & (cells + (outputs - 1) * stride >= 0)
            for cells, size, outputs, stride in zip(
                (rows, columns), input_size, geometry.output_size(input_size), geometry.stride, strict=True
            )
        ]
        used &= meets[0][:, None] & meets[1]
        if not used.any():
            return Plan((), torch.zeros(*whole.shape[:2], 4, dtype=torch.long, device="cpu"))
        span = _span(_where(used.any(1), rows), _where(used.any(0), columns), geometry)

    taps = used.any(0).any(0)
    tap_rows, tap_columns = _where(taps, rows[0]), _where(taps, columns[0])
    codes = tap_rows * (1 << 32) + tap_columns  # one number for each cell: columns lie in a range of less than 2^32
    box_height, box_width = 1 + bool(used[1].any()), 1 + bool(used[:, 1].any())
    area = box_height * box_width
    if one is None:  # (the first taps usually have enough cells already)
        one = any(span.area <= _SPARSE_FACTOR * area * len(set(some.tolist())) for some in (codes[:1024], codes))
    if one:
        windows: tuple[Window, ...] = (span,)
        row, column = (
            (cells - first).div(step, rounding_mode="floor")
            for cells, first, step in zip((rows, columns), (span.top, span.left), span.dilation, strict=True)
        )
        index = row[:, None] * span.width + column
    else:
        first = dict(zip(codes.tolist(), zip(tap_rows.tolist(), tap_columns.tolist(), strict=True), strict=True))
        windows = tuple(Window(row, column, box_height, box_width) for row, column in first.values())
        number = {code: place for place, code in enumerate(first)}
        window = torch.zeros(taps.shape, dtype=torch.long, device="cpu")
        window[taps] = _integers([number[code] for code in codes.tolist()])
        in_window = _integers([0, 1, box_width, box_width + 1]).view(2, 2, 1, 1)
        index = in_window + window * area
    index = index.masked_fill(~used, sum(window.area for window in windows))
    return Plan(windows, index.flatten(0, 1).permute(1, 2, 0).contiguous())


def regular_window(geometry: ConvGeometry) -> Window:
    """That of the kernel itself, all of its offsets 0. Without dilation (0) there is none."""
    top, left, _, _ = geometry.padding
    return Window(-top, -left, *geometry.kernel_size, geometry.dilation)


@functools.lru_cache
def _grid(geometry: ConvGeometry) -> Tensor:
    """The regular grid (K, 2)."""
    with torch.inference_mode(False):  # the tensor is kept, and an inference tensor would not serve in training
        return _integers(geometry.grid())


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """1-D: the ``values`` where ``mask`` is true."""
    return values.flatten() if mask.all() else values[mask]


def _integers(values: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device="cpu")


def _span(rows: Tensor, columns: Tensor, geometry: ConvGeometry) -> Window:
    """The smallest plain kernel that holds cells in these ``rows`` and ``columns``."""
    found = distinct(rows), distinct(columns)
    (top, height, row_step), (left, width, column_step) = map(_fit, found, geometry.shrinkage)
    return Window(top, left, height, width, (row_step, column_step))


def distinct(values: Tensor) -> list[int]:
    """The different numbers in ``values`` (int64), in order."""
    values = values.flatten()
    if len(values) < 512:
        return sorted(set(values.tolist()))
    lowest, highest = (int(value) for value in values.aminmax())
    if highest - lowest > 4 * len(values):
        return sorted(set(values.tolist()))
    found = torch.zeros(highest - lowest + 1, dtype=torch.bool, device="cpu")  # layers of many position groups
    found[values - lowest] = True
    return (found.nonzero().flatten() + lowest).tolist()  # type: ignore[no-any-return]


def _fit(values: list[int], lost: int) -> tuple[int, int, int]:
    """First cell, number of cells and step of the smallest plain axis that holds ``values``.

    A plain convolution pads both sides by the same p >= 0 and its cells span exactly ``2 p + lost`` pixels.
    """
    pad = max(0, -values[0], values[-1] - lost, -(lost // 2))
    span = 2 * pad + lost
    step = math.gcd(span, *(value + pad for value in values)) or 1
    return -pad, span // step + 1, step


def expand_kernel(weight: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """``weight`` (C_out, C_in/groups, kh, kw) spread over the cells of ``plan``: (C_out, C_in/groups, cells).

    Computed and returned in at least float32, whatever the weight's precision (a matrix product: TF32 where the user
    lets torch use that for them).
    """
    grouped = _by_position_group(weight, len(offsets)).to(_precision(weight, offsets))
    shares = _bilinear_shares(split_offsets(offsets)[1])
    if grouped.shape[1] > _FEW:
        return (grouped @ _bilinear_matrix(shares, plan).to(grouped.dtype)).reshape(*weight.shape[:2], plan.cells)
    index = plan.index.to(weight.device)
    expanded = grouped.new_zeros(*grouped.shape[:2], plan.cells + 1)  # one for dropped cells
    for tap in range(offsets.shape[1]):  # one at a time: the 4 cells of a tap are different ones
        values = grouped[:, :, tap, None] * shares[:, None, tap].to(grouped.dtype)
        expanded.scatter_add_(-1, index[:, None, tap].expand_as(values), values)
    return expanded[..., :-1].reshape(*weight.shape[:2], plan.cells)


def expand_kernel_backward(weight: Tensor, offsets: Tensor, plan: Plan, grad: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of the expanded kernel (C_out, C_in/groups, cells) to those of ``weight`` and ``offsets``.

    ``plan`` has to be made with ``gradient=True``. With g_00, g_01, g_10, g_11 the gradients of a tap's 4 bilinear
    weights (each a sum over the tap's weights times the gradient of the cell) and (fy, fx) its fractions:

        d/d row    = (1 - fx) (g_10 - g_00) + fx (g_11 - g_01)
        d/d column = (1 - fy) (g_01 - g_00) + fy (g_11 - g_10)
    """
    fraction = split_offsets(offsets)[1]
    shares, index = _bilinear_shares(fraction), plan.index.to(grad.device)
    dtype = _precision(weight, offsets)
    grouped = _by_position_group(weight, len(offsets)).to(dtype)
    grad_grouped = grad.to(dtype).reshape(*grouped.shape[:2], plan.cells)
    if grouped.shape[1] > _FEW:
        grad_weight = grad_grouped @ _bilinear_matrix(shares, plan).to(dtype).transpose(-1, -2)
        grad_matrix = F.pad(grouped.transpose(-1, -2) @ grad_grouped, (0, 1))  # a 0 for dropped cells
        grad_shares = grad_matrix.gather(-1, index)
    else:
        at_cells = index.flatten(1)[:, None].expand(-1, grouped.shape[1], -1)
        seen = F.pad(grad_grouped, (0, 1)).gather(-1, at_cells).unflatten(-1, (-1, 4))
        grad_weight = (seen * shares[:, None].to(dtype)).sum(-1)
        grad_shares = (seen * grouped[..., None]).sum(1)
    g00, g01, g10, g11 = grad_shares.unbind(-1)
    fy, fx = fraction.to(dtype).unbind(-1)
    grad_rows = (1 - fx) * (g10 - g00) + fx * (g11 - g01)
    grad_columns = (1 - fy) * (g01 - g00) + fy * (g11 - g10)
    grad_offsets = torch.stack((grad_rows, grad_columns), -1)
    return grad_weight.reshape(weight.shape).to(weight.dtype), grad_offsets.to(offsets.dtype)


def _bilinear_shares(fraction: Tensor) -> Tensor:
    """(P, K, 4): the bilinear weights of each tap's neighbours."""
    fy, fx = fraction.unbind(-1)
    return torch.stack(((1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx), -1)


def _bilinear_matrix(shares: Tensor, plan: Plan) -> Tensor:
    """(P, K, cells): the share of tap k that falls on each cell."""
    matrix = shares.new_zeros(*shares.shape[:2], plan.cells + 1)
    return matrix.scatter_add(-1, plan.index.to(shares.device), shares)[..., :-1]


def _by_position_group(weight: Tensor, groups: int) -> Tensor:
    """(C_out, C_in/groups, kh, kw) to (P, C_out/P * C_in/groups, K)."""
    return weight.reshape(groups, -1, weight.shape[-2] * weight.shape[-1])


def _precision(weight: Tensor, offsets: Tensor) -> torch.dtype:
    """At least float32: a bfloat16 share of a tap would be wrong by up to 0.4 %."""
    return torch.promote_types(torch.promote_types(weight.dtype, offsets.dtype), torch.float32)
