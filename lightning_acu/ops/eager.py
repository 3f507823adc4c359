"""The operator for calls that nobody watches: straight to the backend, past torch's dispatcher.

An operator written in Python spends some 30 microseconds of a call in the dispatcher, and 140 with its backward pass
(``benchmarks/call_overhead.py``): as long as a small depthwise layer takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..geometry import ConvGeometry
from . import backends
from .op import acu_conv2d_backward_op, acu_conv2d_op

__all__ = ["acu_conv2d"]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_NOTHING = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
#: The dispatch keys of a thread in which nothing intervenes: as usual, and in inference mode.
_UNTOUCHED = (_NOTHING.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr(), _NOTHING.raw_repr())


def acu_conv2d(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, backend: str
) -> Tensor:
    """``acu_conv2d_op``, which is called where anybody could tell the difference. Shapes have been checked."""
    tensors = (input, weight, offsets) if bias is None else (input, weight, offsets, bias)
    if _watched(*tensors):
        _refuse_tangents(*tensors)
        stride, padding, dilation, groups = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        return acu_conv2d_op(input, weight, offsets, bias, stride, padding, dilation, groups, backend)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _ActiveConvolution.apply(input, weight, offsets, bias, geometry, backend)  # type: ignore[no-any-return]
    return backends.forward(input, weight, offsets, bias, geometry, backend)


def _watched(*tensors: Tensor) -> bool:
    """Whether the operator itself has to be called.

    By torch.compile and export (first: what follows cannot be compiled), tensor subclasses, modes (fake tensors, FLOP
    counters), tracing, function transforms, forward-mode derivatives, profilers; on "meta" it has shapes only.
    """
    return (
        torch.compiler.is_compiling()
        or any(type(tensor) not in _PLAIN_TYPES for tensor in tensors)
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _UNTOUCHED
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or tensors[0].is_meta
    )


def _refuse_tangents(*tensors: Tensor) -> None:
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):  # the operator would drop them
        raise RuntimeError(
            "acu_conv2d has no forward-mode derivatives in its fast backends; use backend='reference' for jvp"
        )


class _ActiveConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor,
        bias: Tensor | None,
        geometry: ConvGeometry,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, offsets)
        ctx.geometry, ctx.backend = geometry, backend
        return backends.forward(input, weight, offsets, bias, geometry, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *needs, needs_bias, _, _ = ctx.needs_input_grad
        input, weight, offsets = ctx.saved_tensors
        geometry, backend = ctx.geometry, ctx.backend
        grads: list[Tensor | None] = [None, None, None]
        if any(needs) and (torch.is_grad_enabled() or _watched(grad, input, weight, offsets)):
            # (enabled: there will be second derivatives, which the operator refuses)
            configuration = geometry.stride, geometry.padding, geometry.dilation, geometry.groups, backend
            found = acu_conv2d_backward_op(grad, input, weight, offsets, *configuration, needs)
            grads = [one if need else None for one, need in zip(found, needs, strict=True)]
        elif any(needs):
            grads = backends.backward(grad, input, weight, offsets, geometry, backend, needs)
        return *grads, grad.sum((0, 2, 3)) if needs_bias else None, None, None
