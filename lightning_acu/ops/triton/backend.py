"""The Triton backend: fused kernels for GPUs. Positions stay on the device, so that no call waits for the host.

This module chooses the route; the kernels are in ``product.py`` (taps interpolated in registers), ``cells.py``
(products over integer cells: input gradient with a stride, weights and positions) and ``channelwise.py`` (depthwise
layers), all on channels_last images.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from ..autoselect import choose, uses_dense_only
from .tiles import arch_of

__all__ = ["MEASURED", "backward", "forward", "measured", "prefers", "why_not"]

#: GPUs on which the kernels were tested and found faster than "dense", as "sm_90" or "gfx942".
MEASURED: frozenset[str] = frozenset()

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; use `pip install triton` (it comes with torch for CUDA), or backend='dense'"
    return None


@functools.cache
def _lacking(device: torch.device) -> str | None:
    """What this GPU, or this machine, does not have."""
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "Triton needs a C compiler for its launchers, and there is none; install gcc or clang, or set CC"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    return None


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors: for tests, and for debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(input: Tensor) -> str | None:
    """Why the kernels cannot run on ``input``, or None."""
    if _missing() is not None:
        return _missing()
    if input.device.type != "cuda" and not (_interpreted() and input.device.type == "cpu"):
        driver = "" if torch.cuda.is_available() else " (torch finds no GPU driver here)"
        return f"it runs on GPUs of NVIDIA and AMD, and `input` is on {input.device}{driver}"
    if input.is_cuda and (lacking := _lacking(input.device)) is not None:
        return lacking
    if input.dtype not in _DTYPES:
        return f"it supports float32, bfloat16 and float16, and `input` is {input.dtype}"
    if _too_large(input):
        return f"an image of 2^31 numbers or a batch of 2^31 pixels is too large for it, got {tuple(input.shape)}"
    return None


def prefers(
    input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool] | None = None
) -> bool:
    """Where it was measured as faster on this GPU ("auto" does so itself), or on GPUs of its kind."""
    if not input.is_cuda:
        if input.device.type not in ("cpu", "meta"):
            uses_dense_only(input.device.type)
        return False
    by_rule = measured(input)
    if why_not(input) is not None or not input.numel():
        return by_rule
    return choose(input, weight, offsets, geometry, needs, "triton" if by_rule else "dense") == "triton"


def measured(input: Tensor) -> bool:
    """Whether ``scripts/gpu_check.sh`` has passed on a GPU of the kind that ``input`` is on."""
    return input.is_cuda and arch_of(input.device) in MEASURED


def forward(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """(N, C_in, H, W) to (N, C_out, H_out, W_out), channels_last."""
    from . import channelwise, product

    size = (input.shape[0], weight.shape[0], *geometry.output_size(input.shape[2:]))
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    _check_size(output)
    route = channelwise if _is_channelwise(weight, geometry) else product
    with _on(input):
        bias = None if bias is None else bias.contiguous()
        route.forward(_image(input), weight.contiguous(), _positions(offsets), bias, geometry, output)
    return output


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and offsets; None for those that ``needs`` does not ask for."""
    from . import cells, channelwise, product

    _check_size(grad)
    grad_input = grad_weight = grad_offsets = None
    gradient, kernel, positions = _image(grad), weight.contiguous(), _positions(offsets)
    depthwise = _is_channelwise(weight, geometry)
    with _on(input):
        if needs[0]:
            grad_input = torch.empty_like(input, memory_format=torch.channels_last)
            if depthwise:
                channelwise.input_gradient(gradient, kernel, positions, geometry, grad_input)
            elif geometry.stride == (1, 1):
                product.input_gradient(gradient, kernel, positions, geometry, grad_input)
            else:
                cells.input_gradient(gradient, kernel, positions, geometry, grad_input)
        if needs[1] or needs[2]:
            route: Any = channelwise if depthwise else cells
            grad_weight, *rest = route.weight_gradient(
                gradient, _image(input), kernel, positions, geometry, needs_offsets=needs[2]
            )
            grad_offsets = rest[0].to(offsets.dtype) if rest else None
    return grad_input, grad_weight if needs[1] else None, grad_offsets


def _check_size(output: Tensor) -> None:
    """Kernels count pixels, and numbers of an image, in 32 bits.

    Raises:
        RuntimeError: there are too many.
    """
    if _too_large(output):
        raise RuntimeError(
            f"an output of shape {tuple(output.shape)} is too large for backend='triton': 2^31 numbers an image, or "
            "pixels; use backend='dense' or fewer images at a time"
        )


def _too_large(image: Tensor) -> bool:
    return max(image.shape[1:].numel(), image.numel() // max(image.shape[1], 1)) >= 2**31 - 2**16


def _is_channelwise(weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether each output channel reads one input channel, which few others read."""
    return weight.shape[1] == 1 and weight.shape[0] <= 4 * geometry.groups


def _image(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def _positions(offsets: Tensor) -> Tensor:
    return offsets.float().contiguous()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
