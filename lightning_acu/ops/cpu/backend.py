"""The Cython backend for CPUs: about as much arithmetic as a plain convolution, on data that stays in the cache.

This module allocates and chooses the route; the loops are in ``_product*.pyx`` (a matrix product over interpolated
taps), ``_planar*.pyx`` (the same for few channels, with vectors along pixels) and ``_channelwise*.pyx`` (depthwise
layers: weights spread over integer cells). Planes take images of any layout, the others channels_last ones; what they
do not take is converted a few images at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...expansion import FAR, distinct, plan_windows, propagate_nan_offsets, split_offsets
from ...geometry import ConvGeometry
from ..autoselect import choose
from ..memory_format import images_per_block, is_native, memory_format, preserved_format

try:
    from . import (  # type: ignore[attr-defined]
        _channelwise,
        _channelwise_weight,
        _planar,
        _planar_backward,
        _positions,
        _product,
        _product_weight,
        _vectors,
    )
    from ._memory import Memory  # type: ignore[import-not-found]

    MISSING: str | None = None
except ImportError as error:
    MISSING = (
        f"the compiled extension is missing ({error}); reinstall lightning_acu where there is a C compiler (GCC or "
        "Clang), or use backend='dense'"
    )

__all__ = ["MISSING", "backward", "forward", "is_faster_by_rule", "prefers", "why_not"]

Array = np.ndarray[Any, Any]
Route = Literal["channelwise", "planar", "product"]

_NATIVE = (torch.float32, torch.float64)
_CONVERTED = (torch.bfloat16, torch.float16)  # computed in float32

#: Below this many multiply-adds, a second thread costs more than it saves.
_THREAD_WORK = 200_000

#: Taps that reach further and longer strides, in pixels, go by the product: planes would become large.
_FARTHEST, _LONGEST_STRIDE = 16, 4


def why_not(input: Tensor) -> str | None:
    """Why the kernels cannot run on ``input``, or None."""
    if MISSING is not None:
        return MISSING
    if input.device.type != "cpu":
        return f"it runs on the CPU, and `input` is on {input.device}"
    if input.dtype not in _NATIVE + _CONVERTED:
        return f"it supports float32, float64, bfloat16 and float16, and `input` is {input.dtype}"
    return None


def prefers(
    input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool] | None = None
) -> bool:
    """Whether this backend is faster here than the dense one: as measured on this machine, or else by a rule.

    The rule was measured with ``benchmarks/auto_rule.py`` and ``benchmarks/narrow.py``. The taps are interpolated again
    for each run of output channels that share a convolution group and a position group. Where position groups cut a
    convolution group into runs of fewer than 16 channels, they do not pay for that.
    """
    if input.device.type != "cpu":
        return False
    if MISSING is not None or not input.numel():  # (then there is nothing to compute)
        return True
    if not _vectors.OPENMP and torch.get_num_threads() > 2:
        return False
    if needs is None and _is_plain(offsets, geometry):
        return False  # exactly F.conv2d, bit for bit
    by_rule = is_faster_by_rule(weight.shape, geometry, len(offsets), needs is not None)
    return choose(input, weight, offsets, geometry, needs, "cython" if by_rule else "dense") == "cython"


def is_faster_by_rule(
    weight: Sequence[int], geometry: ConvGeometry, position_groups: int, backward: bool = False
) -> bool:
    """The rule, for a weight of that shape whose taps are between pixels, forward or ``backward``."""
    groups, c_out, per_group = geometry.groups, weight[0], weight[1]
    if per_group * c_out <= 4 * groups:
        return True
    # The expanded kernel has (k + 2)^2 cells for k^2 taps: little more where k is large. Only in wide layers do many
    # outputs share what is interpolated.
    if backward and ((geometry.taps > 25 and 4 < per_group <= 48) or (geometry.taps > 9 and 12 < per_group <= 24)):
        return False
    if not backward and geometry.taps > 49 and 4 < per_group <= 48:
        return False
    runs = groups + position_groups - math.gcd(groups, position_groups)
    return runs == groups or c_out // runs >= 16


def _is_plain(offsets: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the taps form one ordinary convolution, of no more cells than taps."""
    positions = Memory(offsets)
    if _positions.any_fraction(positions):
        return False
    if min(geometry.dilation) > 0 and not _positions.any_shift(positions):
        return True
    grid = torch.tensor(geometry.grid(), dtype=torch.long, device="cpu")
    rows, columns = (split_offsets(offsets)[0] + grid).unbind(-1)
    if len(distinct(rows)) * len(distinct(columns)) > geometry.taps:  # quick: a plan looks at all position groups
        return False
    plan = plan_windows(offsets, geometry)
    return len(plan.windows) == 1 and plan.cells <= geometry.taps


def _route(image: Tensor, weight: Tensor, output: Sequence[int], cell: Array, geometry: ConvGeometry) -> Route:
    """Channel by channel where a group has at most 4 products; planes for few channels; else a product for each group.

    ``weight`` is in the type of the computation, ``output`` the size (N, C_out, H_out, W_out). As measured with
    ``benchmarks/narrow.py``: on planes vectors are full whatever the number of channels, but there are zeros between
    rows, as wide as taps reach.
    """
    groups, inputs = geometry.groups, weight.shape[1]
    if weight.shape[0] * inputs <= 4 * groups:
        return "channelwise"
    outputs = weight.shape[0] // (groups + len(cell) - math.gcd(groups, len(cell)))  # of a run, see `prefers`
    lanes = _vectors.BYTES[_vectors.current()] // weight.element_size()
    fewer, more = min(inputs, outputs), max(inputs, outputs)
    if 0 in output or 0 in image.shape or (fewer > 0.75 * lanes and more > 1.5 * lanes):
        return "product"
    if (reach := _planar.reach(cell)) > _FARTHEST or max(geometry.stride) > _LONGEST_STRIDE:
        return "product"
    with_zeros = math.prod(size + reach // step for size, step in zip(output[2:], geometry.stride, strict=True))
    return "planar" if with_zeros <= (2.5 if fewer <= 0.75 * lanes else 1.6) * math.prod(output[2:]) else "product"


def forward(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """(N, C_in, H, W) to (N, C_out, H_out, W_out); shapes as in the reference, memory format as F.conv2d's."""
    dtype = _compute_dtype(input)
    size = (input.shape[0], weight.shape[0], *geometry.output_size(input.shape[2:]))
    output = torch.empty(size, dtype=input.dtype, device="cpu", memory_format=memory_format(input, weight))
    cell, fraction, any_nan = _taps(offsets, geometry)
    weight = weight.to(dtype)
    route = _route(input, weight, size, cell, geometry)
    weights = Memory((weight.contiguous() if route == "planar" else weight).flatten(2))
    biases = None if bias is None else Memory(bias.to(dtype).contiguous())
    kernels = {"channelwise": _channelwise, "planar": _planar, "product": _product}[route]
    for image, result in _blocks(route, dtype, input, output):
        target = result if _fits(result, route, dtype) else _empty(result, route, dtype)
        kernels.forward(
            _pixels(image, route, dtype), weights, biases, cell, fraction, geometry.groups, geometry.stride,
            _pixels(target, route, dtype), _threads(target, weight),
        )  # fmt: skip
        if target is not result:
            result.copy_(target)
    return propagate_nan_offsets(output, offsets) if any_nan else output


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and offsets; None for those that ``needs`` does not ask for."""
    dtype = _compute_dtype(input)
    cell, fraction, _ = _taps(offsets, geometry)
    common = (cell, fraction, geometry.groups, geometry.stride)
    weights, threads = weight.to(dtype).flatten(2), _threads(grad, weight)
    route = _route(input, weights, grad.shape, cell, geometry)
    run = {"channelwise": _backward_channelwise, "planar": _backward_planar, "product": _backward_product}[route]
    grad_input = torch.empty_like(input, memory_format=preserved_format(input)) if needs[0] else None
    grad_weight: Tensor | None = None
    grad_cell = np.zeros(offsets.shape)
    for gradient, image, result in _blocks(route, dtype, grad, input, grad_input):
        target = None if result is None else result if _fits(result, route, dtype) else _empty(result, route, dtype)
        weight_part = run(gradient, image, weights, common, target, grad_cell, needs, threads)
        if result is not None and target is not result:
            result.copy_(target)
        if weight_part is not None:
            grad_weight = weight_part if grad_weight is None else grad_weight.add_(weight_part)
    return (
        grad_input,
        None if grad_weight is None else grad_weight.view(weight.shape).to(weight.dtype),
        torch.from_numpy(grad_cell).to(offsets.dtype) if needs[2] else None,
    )


def _backward_planar(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    common: tuple[Any, ...],
    grad_image: Tensor | None,
    grad_cell: Array,
    needs: Sequence[bool],
    threads: int,
) -> Tensor | None:
    """As `_backward_product`, on planes."""
    dtype = weight.dtype
    grad_weight = torch.empty(weight.shape, dtype=dtype, device="cpu") if needs[1] else None
    finite = _planar_backward.backward(
        _pixels(grad, "planar", dtype), _pixels(image, "planar", dtype), Memory(weight.contiguous()), *common,
        None if grad_image is None else Memory(grad_image), None if grad_weight is None else Memory(grad_weight),
        grad_cell if needs[2] else None, threads,
    )  # fmt: skip
    if finite:
        return grad_weight
    # Planes multiply what is outside the image by zero, which makes infinity NaN; a product reads nothing there.
    native = None if grad_image is None or is_native(grad_image, dtype) else _empty(grad_image, "product", dtype)
    grad_weight = _backward_product(
        grad, image, weight, common, grad_image if native is None else native, grad_cell, needs, threads
    )
    if native is not None:
        grad_image.copy_(native)  # type: ignore[union-attr]
    return grad_weight


def _backward_product(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    common: tuple[Any, ...],
    grad_image: Tensor | None,
    grad_cell: Array,
    needs: Sequence[bool],
    threads: int,
) -> Tensor | None:
    """Returns the gradient of the weights (C_out, C_in/groups, K); writes to ``grad_image``, adds to ``grad_cell``."""
    pixels = [_pixels(tensor, "product", weight.dtype) for tensor in (grad, image)]
    if grad_image is not None or needs[2]:
        target = None if grad_image is None else _pixels(grad_image.zero_(), "product", weight.dtype)
        sums = grad_cell if needs[2] else None
        _product.backward_image(*pixels, Memory(weight), *common, target, sums, threads)
    if not needs[1]:
        return None
    grad_weight = weight.new_empty(weight.shape[0], weight.shape[2], weight.shape[1])
    _product_weight.backward_weight(*pixels, *common, Memory(grad_weight), threads)
    return grad_weight.transpose(1, 2)


def _backward_channelwise(
    grad: Tensor,
    image: Tensor,
    weight: Tensor,
    common: tuple[Any, ...],
    grad_image: Tensor | None,
    grad_cell: Array,
    needs: Sequence[bool],
    threads: int,
) -> Tensor | None:
    """The same, channel by channel."""
    pixels = [_pixels(tensor, "channelwise", weight.dtype) for tensor in (grad, image)]
    if grad_image is not None:
        target = _pixels(grad_image, "channelwise", weight.dtype)
        _channelwise.backward_image(pixels[0], Memory(weight), *common, target, threads)
    if not needs[1] and not needs[2]:
        return None
    grad_weight = weight.new_zeros(weight.shape)
    _channelwise_weight.backward_kernel(*pixels, Memory(weight), *common, Memory(grad_weight), grad_cell, threads)
    return grad_weight if needs[1] else None


def _compute_dtype(input: Tensor) -> torch.dtype:
    return input.dtype if input.dtype in _NATIVE else torch.float32


def _fits(image: Tensor, route: Route, dtype: torch.dtype) -> bool:
    """Whether the kernels of ``route`` can work on ``image`` (N, C, H, W) as it is."""
    return image.dtype == dtype if route == "planar" else is_native(image, dtype)


def _blocks(route: Route, dtype: torch.dtype, *batches: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The batches as they are if kernels can work on them; otherwise a few images at a time, to be converted.

    Whole copies of large batches would double the memory and not fit the caches.
    """
    present = [batch for batch in batches if batch is not None]
    if all(_fits(batch, route, dtype) for batch in present):
        return iter([batches])
    count = images_per_block(*present)
    blocks = -(-max(len(present[0]), 1) // count)
    return zip(*([None] * blocks if batch is None else batch.split(count) for batch in batches), strict=True)


def _empty(like: Tensor, route: Route, dtype: torch.dtype) -> Tensor:
    if route == "planar":
        return torch.empty_like(like, dtype=dtype)
    return torch.empty(like.shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _taps(offsets: Tensor, geometry: ConvGeometry) -> tuple[Array, Array, bool]:
    """The cells that the taps are in, seen from ``output * stride``, and the fractions above them, each (P, K, 2).

    The third result says whether any offset is NaN.
    """
    cell, fraction = np.empty(offsets.shape, dtype=np.int64), np.empty(offsets.shape)
    top, left, _, _ = geometry.padding
    any_nan = _positions.locate(
        Memory(offsets), geometry.kernel_size[1], *geometry.dilation, top, left, FAR, cell, fraction
    )
    return cell, fraction, any_nan


def _pixels(image: Tensor, route: Route, dtype: torch.dtype) -> Any:
    """(N, C, H, W) as a buffer that the kernels of ``route`` take, shared with the tensor where it `_fits`.

    That is (N, C, H, W) of any strides for planes, else a contiguous (N, H, W, C).
    """
    if route == "planar":
        return Memory(image.to(dtype))
    if not is_native(image, dtype):
        image = image.to(dtype).contiguous(memory_format=torch.channels_last)
    return Memory(image, pixels=True)


def _threads(output: Tensor, weight: Tensor) -> int:
    """As many as torch uses, one where there is little to do. Results do not depend on it."""
    return torch.get_num_threads() if output.numel() * math.prod(weight.shape[1:]) > _THREAD_WORK else 1
