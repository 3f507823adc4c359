"""The active convolution as a function: ``F.conv2d`` plus ``offsets``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]

from .geometry import LIMIT, STRIDE_LIMIT, ConvGeometry, Padding, integers, resolve_padding
from .ops import check_backend, op, reference, require_memory, without_autocast

__all__ = ["acu_conv2d"]


def acu_conv2d(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    backend: str = "auto",
) -> Tensor:
    r"""Convolve with taps at real-valued positions: the Active Convolution Unit.

    Each tap k = (i, j) of the kernel is moved from its place on the regular grid by its own offset, the same at every
    pixel and channel, and reads the image by bilinear interpolation::

        y_k = oy * stride - padding + i * dilation + dy_k
        x_k = ox * stride - padding + j * dilation + dx_k
        output[n, co, oy, ox] = bias[co] + sum_{ci, k} weight[co, ci, k] * bilinear(input[n, ci], y_k, x_k)

    with zeros outside the image. ``offsets = 0`` is exactly ``F.conv2d``. Differentiable with respect to input, weight,
    offsets and bias. Where a coordinate is a whole number the bilinear interpolation has a kink: the derivative is the
    one to the right (of the cell that floor() picks), in every backend.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); any memory format, channels_last is kept.
        weight: (C_out, C_in/groups, kh, kw), of the input's dtype.
        offsets: (K, 2), or (P, K, 2) for P position groups, with K = kh * kw in raster order: (dy, dx) in input pixels,
            rows first as in ``torchvision.ops.deform_conv2d``. Output channel co uses group ``co * P // C_out``.
            float32 or float64, whatever the precision of the input: in bfloat16 small steps would be lost.
        bias: (C_out,) or None.
        stride, padding, dilation, groups: as in ``F.conv2d``. ``padding`` may also be four sides
            (left, right, top, bottom) as in ``F.pad``. A ``dilation`` of 0 puts all taps of that axis on one grid
            point, so that their offsets alone make the shape.
        backend: "auto" (the fastest that can run, as measured), "cython" (CPU: taps are interpolated into the cache;
            results do not depend on the number of threads), "triton" (GPU: taps are interpolated in registers; new, and
            not yet run on a GPU, so that "auto" does not take it), "dense" (expanded kernel and ``F.conv2d``; any
            device) or "reference" (the formula in plain torch; slow; has second derivatives).

    Returns:
        (N, C_out, H_out, W_out), or (C_out, H_out, W_out) for a 3-D input, of the input's dtype (of autocast's dtype
        under autocast), with the H_out and W_out of ``F.conv2d``.

    Raises:
        TypeError: an unsupported dtype, something other than a tensor, or numbers that are not integers.
        ValueError: an invalid shape or number, as is a padding or dilation of 2^20 or more, or an unknown backend; the
            message names argument and value.
        RuntimeError: arguments on different devices, memory that was freed, or a named backend that cannot run here.

    References:
        Y. Jeon and J. Kim, Active Convolution: Learning the Shape of Convolution for Image Classification, CVPR 2017
        (arXiv 1703.09076), section 3, equations 1 to 7.
    """
    check_backend(backend)
    stride, dilation = _pair("stride", stride, 1, STRIDE_LIMIT), _pair("dilation", dilation, 0)
    if type(groups) is not int:
        groups = _one("groups", groups)
    # Sizes are tensors then, and each comparison warns; the operator checks them too.
    tracing = is_tracing()
    if not tracing:
        _check_tensors(input, weight, offsets, bias, groups)
    kernel_size = (weight.shape[2], weight.shape[3])
    if tracing and isinstance(padding, str):  # computed from them
        kernel_size = (int(kernel_size[0]), int(kernel_size[1]))
    geometry = ConvGeometry(
        kernel_size, stride, resolve_padding(padding, kernel_size, stride, dilation), dilation, groups
    )
    if not tracing and min(geometry.output_size(input.shape[-2:])) < 1:
        top, left, bottom, right = geometry.padding
        padded = (input.shape[-2] + top + bottom, input.shape[-1] + left + right)
        effective = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True))
        raise ValueError(
            f"the kernel covers {effective} pixels (`weight` kernel size {kernel_size}, `dilation` {dilation}), "
            f"more than the padded `input` of {padded}; pad more or use a larger image"
        )

    device = input.device.type
    tensors = (input, weight, offsets) if bias is None else (input, weight, offsets, bias)
    if backend == "reference" or _autocast_enabled(device):
        require_memory(*tensors)  # before torch's own functions read it; the backends look for themselves
    if _autocast_enabled(device):  # as autocast does for conv2d; the offsets keep their precision
        dtype = torch.get_autocast_dtype(device)
        if input.dtype != torch.float64:
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    offsets = offsets if offsets.ndim == 3 else offsets[None]
    batch = input if input.ndim == 4 else input[None]
    if backend == "reference":
        with without_autocast(device):
            output = reference.acu_conv2d(batch, weight, offsets, bias, geometry)
    else:
        output = op.acu_conv2d(batch, weight, offsets, bias, geometry, backend)
    return output if input.ndim == 4 else output[0]


def _autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # "meta" has none, and torch raises


def _one(name: str, value: int) -> int:
    numbers = integers(name, value)
    if len(numbers) != 1:
        raise ValueError(f"`{name}` (={value!r}) must be one int")
    return numbers[0]


def _pair(name: str, value: int | Sequence[int], least: int, limit: int = LIMIT) -> tuple[int, int]:
    numbers = integers(name, value, limit)
    if len(numbers) not in (1, 2) or min(numbers) < least:
        raise ValueError(f"`{name}` (={value}) must be an int >= {least} or a pair of them")
    return numbers[0], numbers[-1]


def _check_tensors(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, groups: int) -> None:
    """Every demand on shapes, dtypes and devices, each with an error that says what was given."""
    tensors = {"input": input, "weight": weight, "offsets": offsets} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if tensor.layout is not torch.strided:
            raise TypeError(f"`{name}` must be a dense tensor, got one of layout {tensor.layout}; use to_dense()")
    if input.ndim not in (3, 4):
        raise ValueError(f"`input` must be (N, C_in, H, W) or (C_in, H, W), got shape {tuple(input.shape)}")
    if weight.ndim != 4:
        raise ValueError(f"`weight` must be (C_out, C_in/groups, kh, kw), got shape {tuple(weight.shape)}")
    c_in, (c_out, c_per_group, kh, kw) = input.shape[-3], weight.shape
    if min(c_out, kh, kw) < 1:
        raise ValueError(f"`weight` must have output channels and a kernel of at least 1x1, got {tuple(weight.shape)}")
    if groups < 1 or c_in % groups:
        raise ValueError(f"`groups` (={groups}) must divide the `input` channels (={c_in})")
    if c_out % groups:
        raise ValueError(f"`groups` (={groups}) must divide the output channels of `weight` (={c_out})")
    if c_per_group != c_in // groups:
        raise ValueError(
            f"`weight` {tuple(weight.shape)} takes {c_per_group} channels for each of {groups} groups, "
            f"but `input` has {c_in} channels; expected `weight`.shape[1] = {c_in // groups}"
        )
    taps = kh * kw
    if offsets.ndim not in (2, 3) or offsets.shape[-2:] != (taps, 2):
        raise ValueError(
            f"`offsets` must be (K, 2) or (P, K, 2) with K = {kh} * {kw} = {taps} taps, "
            f"got shape {tuple(offsets.shape)}"
        )
    if offsets.ndim == 3 and (offsets.shape[0] < 1 or c_out % offsets.shape[0]):
        raise ValueError(
            f"`offsets` has {len(offsets)} position groups, which must divide the output channels (={c_out})"
        )
    if bias is not None and bias.shape != (c_out,):
        raise ValueError(f"`bias` must be ({c_out},), got shape {tuple(bias.shape)}")

    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be a floating point tensor, got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(f"`{name}` is on {tensor.device} but `input` is on {input.device}; move them together")
    if offsets.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"`offsets` must be float32 or float64, got {offsets.dtype}, which loses position steps of 0.001 pixel; "
            "use offsets.float(). If a MixedPrecisionPolicy of FSDP2 casts them, leave `param_dtype` out and use "
            "torch.autocast"
        )
    if not _autocast_enabled(input.device.type):
        for name, tensor in tensors.items():
            if name != "offsets" and tensor.dtype != input.dtype:
                raise TypeError(f"`{name}` is {tensor.dtype} but `input` is {input.dtype}; convert one of them")
