"""The Cython backend: taps interpolated into the cache and multiplied there, with a plain convolution's arithmetic.

This module checks, allocates and chooses the route; the loops are in ``_cpu_kernels.pyx`` (a matrix product over
interpolated taps) and ``_cpu_channelwise.pyx`` (depthwise layers: weights spread over integer cells). Both work on
channels_last images; others are converted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..geometry import ConvGeometry
from ..positions import FAR, plan_windows

try:
    from . import _cpu_channelwise, _cpu_kernels  # type: ignore[attr-defined]

    _MISSING = None
except ImportError as error:
    _MISSING = (
        f"the compiled extension is missing ({error}); reinstall lightning_acu where there is a C compiler (GCC or "
        "Clang), or use backend='dense'"
    )

__all__ = ["backward", "forward", "prefers", "why_not"]

_NATIVE = (torch.float32, torch.float64)
_CONVERTED = (torch.bfloat16, torch.float16)  # computed in float32

#: Below this many multiply-adds, a second thread costs more than it saves.
_THREAD_WORK = 200_000


def why_not(input: Tensor) -> str | None:
    """Why the kernels cannot run on ``input``, or None."""
    if _MISSING is not None:
        return _MISSING
    if input.device.type != "cpu":
        return f"it runs on the CPU, and `input` is on {input.device}"
    if input.dtype not in _NATIVE + _CONVERTED:
        return f"it knows float32, float64, bfloat16 and float16, and `input` is {input.dtype}"
    return None


def prefers(
    input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool] | None = None
) -> bool:
    """Whether this backend is faster here than the dense one: the rule "auto" follows, as measured."""
    if not (needs and needs[2]) and _is_plain(offsets, geometry):
        return False  # exactly F.conv2d, at its price
    if _channelwise(weight, geometry):
        return True
    return True


def _is_plain(offsets: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the taps form an ordinary convolution of no more cells than taps."""
    if _cpu_kernels.any_fraction(_array(offsets.double().contiguous())):
        return False
    return plan_windows(offsets, geometry).cells <= geometry.taps


def _channelwise(weight: Tensor, geometry: ConvGeometry) -> bool:
    """Which of the two routes: channel by channel, or a matrix product for each group."""
    return weight.shape[1] * weight.shape[0] <= 4 * geometry.groups


def forward(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """(N, C_in, H, W) to (N, C_out, H_out, W_out), channels_last; shapes as in the reference."""
    if input.dtype in _CONVERTED:
        converted = forward(input.float(), weight.float(), offsets, bias if bias is None else bias.float(), geometry)
        return converted.to(input.dtype)
    size = (len(input), len(weight), *geometry.output_size(input.shape[2:]))
    output = torch.empty(size, dtype=input.dtype, memory_format=torch.channels_last)
    cell, fraction = _taps(offsets, geometry)
    kernels = _cpu_channelwise if _channelwise(weight, geometry) else _cpu_kernels
    kernels.forward(
        _pixels(input), _array(weight.flatten(2)), None if bias is None else _array(bias.contiguous()), cell, fraction,
        geometry.groups, geometry.stride, _pixels(output), _threads(output, weight),
    )  # fmt: skip
    if np.isnan(fraction).any():  # also where the tap reads nothing but the zeros outside the image
        output.unflatten(1, (len(offsets), -1))[:, offsets.isnan().flatten(1).any(-1)] = float("nan")
    return output


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and offsets; None for those that ``needs`` does not ask for."""
    if input.dtype in _CONVERTED:
        converted = backward(grad.float(), input.float(), weight.float(), offsets, geometry, needs)
        return tuple(
            None if found is None else found.to(like.dtype)
            for found, like in zip(converted, (input, weight, offsets), strict=True)
        )  # type: ignore[return-value]
    cell, fraction = _taps(offsets, geometry)
    common = (cell, fraction, geometry.groups, geometry.stride)
    pixels, weights, threads = _pixels(grad), _array(weight.flatten(2)), _threads(grad, weight)
    grad_cell = np.zeros(cell.shape) if needs[2] else None
    grad_input = grad_weight = None
    if _channelwise(weight, geometry):
        if needs[0]:
            grad_input = torch.empty_like(input, memory_format=torch.channels_last)
            _cpu_channelwise.backward_image(pixels, weights, *common, _pixels(grad_input), threads)
        if needs[1] or needs[2]:
            grad_weight = torch.empty(weights.shape, dtype=weight.dtype)
            grad_cell = np.zeros(cell.shape)
            _cpu_channelwise.backward_kernel(
                pixels, _pixels(input), weights, *common, _array(grad_weight), grad_cell, threads
            )
            grad_weight = grad_weight.view(weight.shape)
    else:
        if needs[0] or needs[2]:
            if needs[0]:
                grad_input = torch.empty_like(input, memory_format=torch.channels_last).zero_()
            _cpu_kernels.backward_image(
                pixels, _pixels(input), weights, *common, None if grad_input is None else _pixels(grad_input),
                grad_cell, threads,
            )  # fmt: skip
        if needs[1]:
            c_out, inputs, *kernel_size = weight.shape
            flat = torch.empty(c_out, geometry.taps, inputs, dtype=weight.dtype)
            if not grad.numel():  # no pixel, no product
                flat.zero_()
            _cpu_kernels.backward_weight(pixels, _pixels(input), *common, _array(flat), threads)
            grad_weight = flat.view(c_out, *kernel_size, inputs).permute(0, 3, 1, 2)
    grad_offsets = None if grad_cell is None else torch.from_numpy(grad_cell).to(offsets.dtype)
    return grad_input, grad_weight if needs[1] else None, grad_offsets if needs[2] else None


def _taps(offsets: Tensor, geometry: ConvGeometry) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(P, K, 2): the cell that each tap is in, seen from ``output * stride``, and the fractions above it in [0, 1)."""
    positions = _array(offsets.double().contiguous())
    cell, fraction = np.empty(positions.shape, dtype=np.int64), np.empty(positions.shape)
    top, left, _, _ = geometry.padding
    _cpu_kernels.locate(positions, geometry.kernel_size[1], *geometry.dilation, top, left, FAR, cell, fraction)
    return cell, fraction


def _pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """(N, C, H, W) as a contiguous (N, H, W, C) array, shared with the tensor where it is channels_last."""
    return _array(image.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1))


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.numpy(force=True)


def _threads(output: Tensor, weight: Tensor) -> int:
    """As many as torch uses; one where there is little to do. The result does not depend on it."""
    return torch.get_num_threads() if output.numel() * weight[0].numel() > _THREAD_WORK else 1
