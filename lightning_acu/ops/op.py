"""``lightning_acu::acu_conv2d``, the one registered operator, and the eager call that goes past it.

One operator for every device and backend: a graph that was compiled or exported names it, not the kernel that happened
to run where it was traced. torch.compile and torch.export see through its shape rules, autograd through its backward
operator, torch's FLOP counter through its formula.

An operator written in Python spends some 30 microseconds of a call in torch's dispatcher, and 140 with its backward
pass (``benchmarks/call_overhead.py``): as long as a small depthwise layer takes. :func:`acu_conv2d` therefore calls the
backend itself wherever nobody could tell the difference, with the same gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..geometry import LIMIT, STRIDE_LIMIT, ConvGeometry
from . import backends
from .memory_format import memory_format, preserved_format

__all__ = ["acu_conv2d", "acu_conv2d_backward_op", "acu_conv2d_op", "needs_operator"]


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


def _configuration(geometry: ConvGeometry) -> tuple[Sequence[int], Sequence[int], Sequence[int], int]:
    """As the operators take it: stride, padding, dilation, groups."""
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups


def _check(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, grad: Tensor | None, geometry: ConvGeometry
) -> None:
    """What the kernels rely on: a graph calls the operator past the clearer checks of :func:`lightning_acu.acu_conv2d`.

    Raises:
        TypeError: dtypes that cannot be used together.
        ValueError: devices, shapes or numbers that do not fit each other.
    """
    dtype, device = input.dtype, input.device
    if not (
        dtype.is_floating_point
        and weight.dtype == dtype
        and offsets.dtype in (torch.float32, torch.float64)
        and (bias is None or bias.dtype == dtype)
        and (grad is None or grad.dtype == dtype)
    ):
        given = _given(lambda tensor: tensor.dtype, input, weight, offsets, bias, grad)
        raise TypeError(f"offsets must be float32 or float64, the others of one floating point dtype; got {given}")
    if not (
        weight.device == device
        and offsets.device == device
        and (bias is None or bias.device == device)
        and (grad is None or grad.device == device)
    ):
        given = _given(lambda tensor: tensor.device, input, weight, offsets, bias, grad)
        raise ValueError(f"all tensors must be on one device; got {given}")
    stride, padding, dilation, groups = _configuration(geometry)
    if min(*stride, groups) < 1 or min(*padding, *dilation) < 0:
        raise ValueError(f"stride and groups must be at least 1, padding and dilation at least 0; got {geometry}")
    if max(*padding, *dilation) >= LIMIT or max(stride) >= STRIDE_LIMIT:
        raise ValueError(
            f"padding and dilation must be less than {LIMIT}, stride less than {STRIDE_LIMIT}; got {geometry}"
        )
    c_out, per_group, kh, kw = weight.shape
    position_groups = len(offsets)
    fits = (
        input.ndim == 4
        and per_group * groups == input.shape[1]
        and c_out % groups == 0
        and offsets.shape == (position_groups, kh * kw, 2)
        and position_groups > 0
        and c_out % position_groups == 0
        and (bias is None or bias.shape == (c_out,))
    )
    if fits:
        size = geometry.output_size(input.shape[2:])
        fits = min(size) > 0 and (grad is None or grad.shape == (len(input), c_out, *size))
    if not fits:
        given = _given(lambda tensor: tuple(tensor.shape), input, weight, offsets, bias, grad)
        raise ValueError(f"these shapes do not fit each other: {given}, with {geometry}")


def _given(what: Callable[[Tensor], Any], *tensors: Tensor | None) -> str:
    names = ("input", "weight", "offsets", "bias", "grad")
    return ", ".join(f"`{name}` {what(t)}" for name, t in zip(names, tensors, strict=True) if t is not None)


#: Backend "dense" waits for positions on the host, which cannot be captured in a CUDA graph, and which backend runs is
#: chosen at run time: `torch.compile(mode="reduce-overhead")` leaves the operators between its graphs.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("lightning_acu::acu_conv2d", mutates_args=(), tags=_TAGS)
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
    """:func:`lightning_acu.acu_conv2d` after its checks, with offsets (P, K, 2), padding (top, left, bottom, right)."""
    geometry = _geometry(weight, stride, padding, dilation, groups)
    _check(input, weight, offsets, bias, None, geometry)
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


@torch.library.custom_op("lightning_acu::acu_conv2d_backward", mutates_args=(), tags=_TAGS)
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
    _check(input, weight, offsets, None, grad, geometry)
    grads = backends.backward(grad, input, weight, offsets, geometry, backend, needs)
    grad_input, grad_weight, grad_offsets = (
        tensor.new_empty(0) if result is None else result
        for result, tensor in zip(grads, (input, weight, offsets), strict=True)
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
        _empty(tensor.shape, tensor, preserved_format(tensor)) if need else tensor.new_empty(0)
        for tensor, need in zip((input, weight, offsets), needs, strict=True)
    )
    return grad_input, grad_weight, grad_offsets


def _empty(size: Sequence[int], like: Tensor, format: torch.memory_format) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format)


# ---- Gradients, of the operator and of the eager call alike: what differs is the function that computes them.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, offsets, _, *ctx.configuration = inputs
    ctx.save_for_backward(input, weight, offsets)


def _gradients(ctx: Any, grad: Tensor, backward: Callable[..., Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    """A gradient or None for each argument of the forward pass; ``backward`` has those of input, weight and offsets."""
    *needs, needs_bias = ctx.needs_input_grad[:4]
    grads: Sequence[Tensor | None] = (None, None, None)
    if any(needs):
        grads = backward(grad, *ctx.saved_tensors, *ctx.configuration, needs)
    else:
        backends.require_memory(grad)
    return *grads, grad.sum((0, 2, 3)) if needs_bias else None, *[None] * len(ctx.configuration)


def _backward_by_operator(*arguments: Any) -> list[Tensor | None]:
    """The arguments of :func:`acu_conv2d_backward_op` to its results, with None instead of empty tensors."""
    grads, needs = acu_conv2d_backward_op(*arguments), arguments[-1]
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "acu_conv2d has no second derivative in its fast backends; use backend='reference' for double backward"
    )


def _map_over_batch(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of torch.vmap: the operator for one entry after the other."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        def entry(number: int) -> Any:
            return operator(
                *(
                    argument.select(dim, number) if isinstance(dim, int) else argument
                    for argument, dim in zip(arguments, in_dims, strict=True)
                )
            )

        if not info.batch_size:  # the shapes of no results are those of the result for zeros
            arguments = tuple(
                argument.sum(dim, keepdim=True) if isinstance(dim, int) else argument
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        results = [entry(number) for number in range(max(1, info.batch_size))]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[: info.batch_size], 0
        stacked = (torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True))
        return tuple(stacked), (0,) * len(results[0])

    return rule


acu_conv2d_op.register_vmap(_map_over_batch(acu_conv2d_op))
acu_conv2d_backward_op.register_vmap(_map_over_batch(acu_conv2d_backward_op))
acu_conv2d_op.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, _backward_by_operator), setup_context=_setup_context
)
acu_conv2d_backward_op.register_autograd(_no_double_backward, setup_context=lambda ctx, inputs, output: None)


@register_flop_formula(torch.ops.lightning_acu.acu_conv2d)
def _flops(input_shape: Any, weight_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """A convolution with K taps, as torch counts one: 2 FLOP for each multiply-add. Interpolation is not counted."""
    return 2 * int(math.prod(out_shape) * math.prod(weight_shape[1:]))


@register_flop_formula(torch.ops.lightning_acu.acu_conv2d_backward)
def _backward_flops(grad_shape: Any, input_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    """As much again for the gradient of the input, and for that of weight and offsets (they share one convolution)."""
    needs = args[-1] if not kwargs.get("needs") else kwargs["needs"]
    return 2 * int(math.prod(grad_shape) * math.prod(weight_shape[1:])) * (int(needs[0]) + int(needs[1] or needs[2]))


# ---- The eager call.

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


#: What :func:`needs_operator` asks: private to torch, so that a version may lack it.
_PRIVATE = (
    (torch._C, "DispatchKeySet"),
    (torch._C, "_dispatch_tls_local_include_set"),
    (torch._C, "_len_torch_function_stack"),
    (torch.autograd, "_profiler_enabled"),
    (forward_ad, "_current_level"),
)


def _undisturbed_keys() -> tuple[int, ...]:
    """The dispatch keys of a thread in which nothing intervenes: as usual, and in inference mode.

    Empty where this torch cannot tell: then every call is the operator's.
    """
    if not all(hasattr(owner, name) for owner, name in _PRIVATE):
        return ()
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    return nothing.add(torch._C.DispatchKey.ADInplaceOrView).raw_repr(), nothing.raw_repr()


_UNDISTURBED = _undisturbed_keys()


def acu_conv2d(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, backend: str
) -> Tensor:
    """What :func:`acu_conv2d_op` computes, through it only where that makes a difference. Shapes have been checked."""
    tensors = (input, weight, offsets) if bias is None else (input, weight, offsets, bias)
    if needs_operator(*tensors):
        if _is_transformed():
            return _Transformable.apply(input, weight, offsets, bias, geometry, backend)  # type: ignore[no-any-return]
        _refuse_tangents(*tensors)
        return acu_conv2d_op(input, weight, offsets, bias, *_configuration(geometry), backend)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _EagerConvolution.apply(input, weight, offsets, bias, geometry, backend)  # type: ignore[no-any-return]
    return backends.forward(input, weight, offsets, bias, geometry, backend)


def needs_operator(*tensors: Tensor) -> bool:
    """Whether the operator itself has to be called.

    By torch.compile and export (first: what follows cannot be compiled), tensor subclasses, modes (fake tensors, FLOP
    counters), tracing, function transforms, forward-mode derivatives, profilers; on "meta" there are shapes only.
    """
    return (
        torch.compiler.is_compiling()
        or not _UNDISTURBED
        or any(type(tensor) not in _PLAIN_TYPES for tensor in tensors)
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _UNDISTURBED
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        or tensors[0].is_meta
    )


def _is_transformed() -> bool:
    """Whether torch.func's transforms or vmap are at work."""
    functorch = None if torch.compiler.is_compiling() else getattr(torch._C, "_functorch", None)
    return functorch is not None and functorch.peek_interpreter_stack() is not None


def _refuse_tangents(*tensors: Tensor) -> None:
    """A RuntimeError where a tensor has a forward-mode derivative: the operator would drop it."""
    if torch.compiler.is_compiling():
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        _no_forward_mode()


def _no_forward_mode() -> None:
    raise RuntimeError(
        "acu_conv2d has no forward-mode derivatives in its fast backends; use backend='reference' for jvp"
    )


class _UnderTransforms(torch.autograd.Function):
    """For torch.func, whose transforms cannot differentiate an operator that is written in Python.

    No argument is a list or a tuple: vmap within forward mode takes those apart and miscounts them.
    """

    generate_vmap_rule = True  # forward and backward are operators, and those have rules

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        _no_forward_mode()


class _Transformable(_UnderTransforms):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, backend: str
    ) -> Tensor:
        return acu_conv2d_op(input, weight, offsets, bias, *_configuration(geometry), backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])  # vmap within forward mode expects as many as are saved for backward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, _transformable_backward)


class _TransformableBackward(_UnderTransforms):
    @staticmethod
    def forward(
        grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, backend: str, *needs: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return acu_conv2d_backward_op(grad, input, weight, offsets, *_configuration(geometry), backend, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _no_double_backward(ctx, *grads)


def _transformable_backward(*arguments: Any) -> list[Tensor | None]:
    *others, needs = arguments
    grads = _TransformableBackward.apply(*others, *needs)
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


class _EagerConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = backends.forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, _eager_backward)


def _eager_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    # Gradients are enabled where second derivatives will be asked for, which the operator refuses.
    if torch.is_grad_enabled() or needs_operator(grad, input, weight, offsets):
        return _backward_by_operator(grad, input, weight, offsets, *_configuration(geometry), backend, needs)
    return backends.backward(grad, input, weight, offsets, geometry, backend, needs)
