"""The dense backend: expand the kernel over the integer cells of its taps, then one plain convolution.

Runs wherever torch does and needs nothing else. A 3x3 whose taps stay within 2 pixels becomes a 5x5, so it costs about
25/9 of the plain convolution; taps far apart (large dilations) become one small convolution each. The shape of the
expanded kernel depends on the positions, so on a GPU every call waits for them to reach the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..expansion import (
    Plan,
    Window,
    expand_kernel,
    expand_kernel_backward,
    pad_or_crop,
    plan_windows,
    propagate_nan_offsets,
    regular_window,
)
from ..geometry import ConvGeometry

__all__ = ["backward", "convolve", "forward", "input_gradient", "prefers", "weight_gradient", "why_not"]


def why_not(input: Tensor) -> str | None:
    """None: this backend always runs."""
    return None


def prefers(
    input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool] | None = None
) -> bool:
    """Always: it is the last choice of "auto"."""
    return True


def forward(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """(N, C_in, H, W) to (N, C_out, H_out, W_out); shapes as in the reference."""
    if min(geometry.dilation) > 0 and not offsets.any():  # no tap has moved yet: the kernel as it is
        return _conv(input, regular_window(geometry), weight, bias, geometry)
    output = convolve(input, weight, offsets, bias, geometry, plan_windows(offsets, geometry, input.shape[2:]))
    return propagate_nan_offsets(output, offsets) if offsets.isnan().any() else output


def convolve(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, plan: Plan
) -> Tensor:
    """The output by the plain convolutions of ``plan``; does not wait for the values of ``offsets`` on a GPU."""
    if not plan.windows:  # every tap lies outside the image
        output = input.new_zeros(len(input), len(weight), *geometry.output_size(input.shape[2:]))
        return output if bias is None else output + bias[:, None, None]
    kernels = plan.split(expand_kernel(weight, offsets, plan).to(input.dtype))
    first, *others = zip(plan.windows, kernels, strict=True)
    output = _conv(input, *first, bias, geometry)
    if others:  # summed in at least float32; in lower precision every addition would round
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        for window, kernel in others:
            output += _conv(input, window, kernel, None, geometry)
    return output.to(input.dtype)


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and offsets; None for those that ``needs`` does not ask for."""
    grad_input = grad_weight = grad_offsets = None
    if needs[0]:
        plan = plan_windows(offsets, geometry, input.shape[2:])
        grad_input = input_gradient(grad, input, weight, offsets, plan, geometry)
    if needs[1] or needs[2]:
        plan = plan_windows(offsets, geometry, input.shape[2:], gradient=needs[2])
        grad_weight, grad_offsets = weight_gradient(grad, input, weight, offsets, plan, geometry)
    return grad_input, grad_weight if needs[1] else None, grad_offsets if needs[2] else None


def input_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, plan: Plan, geometry: ConvGeometry
) -> Tensor:
    """The gradient of the input, by the plain convolutions of ``plan``."""
    if not plan.windows:
        return torch.zeros_like(input)
    grad_input: Tensor | None = None
    kernels = plan.split(expand_kernel(weight, offsets, plan).to(grad.dtype))
    for window, kernel in zip(plan.windows, kernels, strict=True):
        padded = _pad_for(input, window, geometry)
        part = _convolution_backward(grad, padded, kernel, window, geometry, (True, False))[0]
        top, left, bottom, right = padded.sides
        if any(padded.sides):  # the adjoint of padding is cropping, and vice versa
            part = pad_or_crop(part, (-top, -left, -bottom, -right))
        if grad_input is None:
            grad_input = part if len(plan.windows) == 1 else part.to(torch.promote_types(part.dtype, torch.float32))
        else:
            grad_input += part
    assert grad_input is not None
    return grad_input.to(input.dtype)


def weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, plan: Plan, geometry: ConvGeometry
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and offsets; that of offsets needs a ``plan`` made with ``gradient=True``."""
    expanded = [_kernel_gradient(grad, input, weight, window, geometry).flatten(2) for window in plan.windows]
    flat = torch.cat(expanded, -1) if expanded else weight.new_zeros(*weight.shape[:2], 0)
    return expand_kernel_backward(weight, offsets, plan, flat)


def _kernel_gradient(grad: Tensor, input: Tensor, weight: Tensor, window: Window, geometry: ConvGeometry) -> Tensor:
    """The gradient of a window's expanded kernel, (C_out, C_in/groups, height, width)."""
    padded = _pad_for(input, window, geometry)
    kernel = weight.new_empty(()).to(grad.dtype).expand(*weight.shape[:2], window.height, window.width)
    return _convolution_backward(grad, padded, kernel, window, geometry, (False, True))[1]


def _convolution_backward(
    grad: Tensor,
    padded: _Padded,
    kernel: Tensor,
    window: Window,
    geometry: ConvGeometry,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    grad_input, grad_kernel, _ = torch.ops.aten.convolution_backward(
        grad, padded.image, kernel, None, padded.stride, padded.padding, window.dilation, False, (0, 0),
        geometry.groups, (*needs, False),
    )  # fmt: skip
    return grad_input, grad_kernel


def _conv(input: Tensor, window: Window, kernel: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    padded = _pad_for(input, window, geometry)
    return F.conv2d(padded.image, kernel, bias, padded.stride, padded.padding, window.dilation, geometry.groups)


class _Padded(NamedTuple):
    """An image that was padded or cropped at ``sides`` (top, left, bottom, right), and how to convolve it.

    ``padding`` (rows, columns) is what is left to the convolution.
    """

    image: Tensor
    sides: tuple[int, int, int, int]
    padding: tuple[int, int]
    stride: tuple[int, int]


def _pad_for(input: Tensor, window: Window, geometry: ConvGeometry) -> _Padded:
    """The image with which a plain convolution has its kernel at ``window``.

    Where both sides of an axis need the same padding, the convolution pads by itself; otherwise the input is padded or
    cropped first, which copies it.
    """
    sides = window.padding(geometry)
    if input.device.type == "cpu" and input.itemsize == 2 and _fails_in_half(input, window, sides, geometry):
        return _pad_in_half(input, window, sides, geometry)
    if _is_symmetric(sides):
        return _Padded(_canonical_strides(input), (0, 0, 0, 0), sides[:2], geometry.stride)
    return _Padded(_canonical_strides(pad_or_crop(input, sides)), sides, (0, 0), geometry.stride)


def _fails_in_half(input: Tensor, window: Window, sides: tuple[int, int, int, int], geometry: ConvGeometry) -> bool:
    """Whether torch 2.14's CPU convolution may crash, or give memory that nobody wrote, in bfloat16 and float16.

    It does, forward or backward, where a row or column of the kernel reads padding alone, and with a stride where the
    output is one row or column.
    """
    output = geometry.output_size(input.shape[2:])
    for axis, cells in enumerate((window.height, window.width)):
        size, stride, dilation = input.shape[2 + axis], geometry.stride[axis], window.dilation[axis]
        if stride > 1 and output[axis] == 1:
            return True
        for first in range(-sides[axis], -sides[axis] + cells * dilation, dilation):
            inside = -(-max(0, -first) // stride)  # the first output pixel whose cell is not before the image
            if inside >= output[axis] or first + inside * stride >= size:
                return True
    return False


def _pad_in_half(input: Tensor, window: Window, sides: tuple[int, int, int, int], geometry: ConvGeometry) -> _Padded:
    """As :func:`_pad_for`, for :func:`_fails_in_half`: nothing is left to the convolution to pad.

    Where the output is one row or column, any stride is right if the image is as large as the kernel.
    """
    top, left, bottom, right = sides
    stride_y, stride_x = geometry.stride
    height, width = geometry.output_size(input.shape[2:])
    if height == 1:
        bottom, stride_y = window.dilation[0] * (window.height - 1) + 1 - input.shape[2] - top, 1
    if width == 1:
        right, stride_x = window.dilation[1] * (window.width - 1) + 1 - input.shape[3] - left, 1
    sides = (top, left, bottom, right)
    return _Padded(_canonical_strides(pad_or_crop(input, sides)), sides, (0, 0), (stride_y, stride_x))


def _is_symmetric(sides: tuple[int, int, int, int]) -> bool:
    """Whether a convolution can pad like this by itself."""
    top, left, bottom, right = sides
    return top == bottom >= 0 and left == right >= 0


def _canonical_strides(image: Tensor) -> Tensor:
    """``image``; if it has one channel, with the strides of NCHW.

    Images of one channel are contiguous with the strides of channels_last as well. With those, torch 2.15's float32 CPU
    convolution is wrong where the output is one column wide and the stride is 2.
    """
    if image.shape[1] != 1:
        return image
    _, _, height, width = image.shape
    return image.contiguous().as_strided(image.shape, (height * width, height * width, width, 1))
