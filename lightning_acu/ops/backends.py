"""The registry of backends, and the choice of one for each call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..choices import did_you_mean
from ..expansion import propagate_nan_offsets
from ..geometry import ConvGeometry
from . import autoselect, dense
from .cpu import backend as cpu_backend
from .memory_format import memory_format, preserved_format
from .triton import backend as triton_backend

__all__ = [
    "BACKENDS",
    "Backend",
    "available_backends",
    "backward",
    "check_backend",
    "forward",
    "planned",
    "require_memory",
    "without_autocast",
]


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which autocast is off on ``device``, a type such as "cpu" ("meta" has no autocast)."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


class Backend(Protocol):
    """The functions of a backend module. Shapes as in :func:`lightning_acu.ops.reference.acu_conv2d`."""

    def why_not(self, input: Tensor) -> str | None:
        """Why this backend cannot run on ``input``, as the end of a sentence; None where it can."""

    def prefers(
        self,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor,
        geometry: ConvGeometry,
        needs: Sequence[bool] | None = None,
    ) -> bool:
        """Whether "auto" should take it: it is faster here than those after it in ``BACKENDS``.

        Also asked where it cannot run: "auto" then says once what it goes without, and why.

        ``needs``: None for the forward pass, otherwise which gradients the backward pass is asked for.
        """

    def forward(
        self, input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        """The output, in any memory format; autograd does not record it."""

    def backward(
        self,
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor,
        geometry: ConvGeometry,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and offsets; those that ``needs`` does not ask for may be None."""


#: "auto" takes the first that can run and prefers to. ("reference" is not here: autograd runs through its formula.)
BACKENDS: dict[str, Backend] = {
    "cython": cast(Backend, cpu_backend),
    "triton": cast(Backend, triton_backend),
    "dense": cast(Backend, dense),
}


def available_backends() -> tuple[str, ...]:
    """Every value that ``backend`` may take."""
    return ("auto", "reference", *BACKENDS)


def check_backend(backend: str) -> str:
    """``backend`` itself.

    Raises:
        ValueError: there is no such backend; the message lists those there are.
    """
    if backend not in available_backends():
        raise ValueError(
            f"`backend` (={backend!r}) is unknown; choose one of {', '.join(available_backends())}"
            f"{did_you_mean(backend, available_backends())}"
        )
    return backend


def _select(
    backend: str,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    needs: Sequence[bool] | None = None,
) -> Backend:
    """The backend to run: the one named, or for "auto" the first that can and prefers to.

    Raises:
        RuntimeError: the one named cannot run here.
    """
    if backend != "auto":
        reason = BACKENDS[check_backend(backend)].why_not(input)
        if reason is not None:
            raise RuntimeError(f"`backend` (={backend!r}) cannot run here: {reason}")
        return BACKENDS[backend]
    if needs is None:
        autoselect.note(input, weight, offsets, geometry)
    missed: list[str] = []
    for name, candidate in BACKENDS.items():
        reason = candidate.why_not(input)
        if candidate.prefers(input, weight, offsets, geometry, needs):
            if reason is None:
                break
            missed.append(f"{name!r} would be: {reason}")
    for other in missed:
        _warn_once(f"backend='auto' uses {name!r}, about twice as slow as {other}")
    return candidate  # the last one always runs


def planned(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    backend: str = "auto",
    needs: Sequence[bool] | None = None,
) -> str:
    """The name of the backend that such a call would take now; nothing is computed or measured.

    Raises:
        RuntimeError: the one named by ``backend`` cannot run here.
    """
    if backend == "reference":
        return backend
    with autoselect.planning():
        chosen = _select(backend, input, weight, offsets, geometry, needs)
    return next(name for name, candidate in BACKENDS.items() if candidate is chosen)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def require_memory(*tensors: Tensor | None) -> None:
    """A RuntimeError where a tensor's memory was freed, as ``tensor.untyped_storage().resize_(0)`` does (and FSDP).

    Compiled kernels, torch's too, would read what lies behind it.
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        try:
            size = tensor.untyped_storage().nbytes()
        except NotImplementedError:  # a wrapper of torch.func, around the tensor that has the memory
            require_memory(_unwrapped(tensor))
            continue
        # (The first three are quick, and tell for tensors that begin where their storage does and have no gaps.)
        if (
            (size < tensor.nbytes or tensor.storage_offset() or not _is_dense(tensor))
            and tensor.numel()
            and size < _extent(tensor)
        ):
            raise RuntimeError(
                f"the memory of a tensor of shape {tuple(tensor.shape)} was freed: its storage has {size} bytes and "
                f"would need {_extent(tensor)}; allocate it again before the call"
            )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


def _unwrapped(tensor: Tensor) -> Tensor | None:
    """What torch.func has wrapped; None where this torch cannot tell."""
    functorch = getattr(torch._C, "_functorch", None)
    if functorch is None or not functorch.is_functorch_wrapped_tensor(tensor):
        return None
    inner: Tensor = functorch.get_unwrapped(tensor)
    return inner


def _extent(tensor: Tensor) -> int:
    """Bytes of its storage up to the end of ``tensor``, which has elements."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + sum(steps) + 1) * tensor.itemsize


def forward(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry, backend: str
) -> Tensor:
    """The output, computed by ``backend`` and not recorded by autograd. Shapes have been checked."""
    require_memory(input, weight, offsets, bias)
    # The caller has cast for autocast already; in here, autocast would cast the float32 positions too.
    with without_autocast(input.device.type):
        chosen = _select(backend, input, weight, offsets, geometry)
        forward = chosen.forward if input.numel() else _forward_of_nothing
        output = forward(input, weight, offsets, bias, geometry)
    return output.contiguous(memory_format=memory_format(input, weight))


def _forward_of_nothing(
    input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry
) -> Tensor:
    """The output for an ``input`` without pixels: no channels, or nothing but padding. torch's own refuse those."""
    output = input.new_zeros(len(input), len(weight), *geometry.output_size(input.shape[2:]))
    output = output if bias is None else output + bias[:, None, None]
    return propagate_nan_offsets(output, offsets)


def backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of input, weight and offsets, None where ``needs`` does not ask for one; not recorded by autograd."""
    require_memory(grad, input, weight, offsets)
    with without_autocast(input.device.type):
        chosen = _select(backend, input, weight, offsets, geometry, needs)
        if input.numel() and grad.numel():
            grads = chosen.backward(grad, input, weight, offsets, geometry, needs)
        else:  # nothing depends on anything
            grads = torch.zeros_like(input), torch.zeros_like(weight), torch.zeros_like(offsets)
    return [
        None if result is None or not need else result.contiguous(memory_format=preserved_format(tensor))
        for result, tensor, need in zip(grads, (input, weight, offsets), needs, strict=True)
    ]
