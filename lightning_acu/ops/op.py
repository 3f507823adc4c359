"""``lightning_acu::acu_conv2d``, the one registered operator.

One operator for every device and backend: a graph that was compiled or exported names it, not the kernel that happened
to run where it was traced. torch.compile and torch.export see through its shape rules, autograd through its backward
operator, torch's FLOP counter through its formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..geometry import ConvGeometry
from . import backends
from .memory_format import memory_format, preserved_format

__all__ = ["acu_conv2d_backward_op", "acu_conv2d_op"]


def _geometry(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> ConvGeometry:
    top, left, bottom, right = padding
    return ConvGeometry(
        kernel_size=(weight.shape[-2], weight.shape[-1]),
        stride=(stride[0], stride[1]),
        padding=(top, left, bottom, right),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
    )


def _check_shapes(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, grad: Tensor | None, geometry: ConvGeometry
) -> None:
    """What compiled kernels rely on. :func:`lightning_acu.acu_conv2d` says it better; a graph calls the operator."""
    c_out, per_group, kh, kw = weight.shape
    fits = (
        input.ndim == 4
        and per_group * geometry.groups == input.shape[1]
        and c_out % geometry.groups == 0
        and offsets.shape == (len(offsets), kh * kw, 2)
        and len(offsets) > 0
        and c_out % len(offsets) == 0
        and (bias is None or bias.shape == (c_out,))
        and (grad is None or grad.shape == (len(input), c_out, *geometry.output_size(input.shape[2:])))
    )
    if not fits:
        shapes = {"input": input, "weight": weight, "offsets": offsets, "bias": bias, "grad": grad}
        given = ", ".join(f"`{name}` {tuple(t.shape)}" for name, t in shapes.items() if t is not None)
        raise ValueError(f"these shapes do not fit each other: {given}, with {geometry}")


@torch.library.custom_op("lightning_acu::acu_conv2d", mutates_args=())
def acu_conv2d_op(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    """:func:`lightning_acu.acu_conv2d` after its checks: offsets (P, K, 2), padding (top, left, bottom, right)."""
    geometry = _geometry(weight, stride, padding, dilation, groups)
    _check_shapes(input, weight, offsets, bias, None, geometry)
    return backends.forward(input, weight, offsets, bias, geometry, backend)


@acu_conv2d_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    size = _geometry(weight, stride, padding, dilation, groups).output_size(input.shape[2:])
    return _empty((input.shape[0], weight.shape[0], *size), input, memory_format(input, weight))


@torch.library.custom_op("lightning_acu::acu_conv2d_backward", mutates_args=())
def acu_conv2d_backward_op(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and offsets; an empty tensor for each that ``needs`` does not ask for."""
    geometry = _geometry(weight, stride, padding, dilation, groups)
    _check_shapes(input, weight, offsets, None, grad, geometry)
    grads = backends.backward(grad, input, weight, offsets, geometry, backend, needs)
    grad_input, grad_weight, grad_offsets = (
        like.new_empty(0) if found is None else found
        for found, like in zip(grads, (input, weight, offsets), strict=True)
    )
    return grad_input, grad_weight, grad_offsets


@acu_conv2d_backward_op.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grad_input, grad_weight, grad_offsets = (
        _empty(like.shape, like, preserved_format(like)) if need else like.new_empty(0)
        for like, need in zip((input, weight, offsets), needs, strict=True)
    )
    return grad_input, grad_weight, grad_offsets


def _empty(size: Sequence[int], like: Tensor, format: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, offsets, _, *ctx.configuration = inputs
    ctx.save_for_backward(input, weight, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads: list[Tensor | None] = [None, None, None]
    if any(needs):
        found = acu_conv2d_backward_op(grad, *ctx.saved_tensors, *ctx.configuration, needs)
        grads = [one if need else None for one, need in zip(found, needs, strict=True)]
    grad_bias = grad.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
    return *grads, grad_bias, None, None, None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "acu_conv2d has no second derivative in its fast backends; use backend='reference' for double backward"
    )


acu_conv2d_op.register_autograd(_backward, setup_context=_setup_context)
acu_conv2d_backward_op.register_autograd(_no_double_backward, setup_context=lambda ctx, inputs, output: None)


@register_flop_formula(torch.ops.lightning_acu.acu_conv2d)
def _flops(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """A convolution with K taps, as torch counts one: 2 FLOP for each multiply-add. Interpolation is not counted."""
    return 2 * int(math.prod(out_shape) * math.prod(weight_shape[1:]))


@register_flop_formula(torch.ops.lightning_acu.acu_conv2d_backward)
def _backward_flops(grad_shape: Any, input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """As much for each of the two gradients that are convolutions: the input's, and the weights' with the offsets'."""
    needs = args[-1] if not kwargs.get("needs") else kwargs["needs"]
    return 2 * int(math.prod(grad_shape) * math.prod(weight_shape[1:])) * (int(needs[0]) + int(needs[1] or needs[2]))
