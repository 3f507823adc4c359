"""The specification: the active convolution written as its formula, in plain differentiable torch.

Slow and memory-hungry (it holds K copies of the image), and as direct as possible: every other backend is tested
against it, and it against loops. Autograd differentiates it, as often as asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..expansion import propagate_nan_offsets, split_offsets
from ..geometry import ConvGeometry

__all__ = ["acu_conv2d"]


def acu_conv2d(input: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Y[n,co,oy,ox] = b[co] + sum_{ci,k} W[co,ci,k] * bilinear(X[n,ci], y_k, x_k), zero outside the image.

    Shapes: input (N, C_in, H, W), weight (C_out, C_in/groups, kh, kw), offsets (P, K, 2), bias (C_out,),
    output (N, C_out, H_out, W_out). See :func:`lightning_acu.functional.acu_conv2d` for y_k and x_k.
    """
    (batch, c_in), (c_out, position_groups) = input.shape[:2], (len(weight), len(offsets))
    height, width = geometry.output_size(input.shape[2:])
    whole, fraction = split_offsets(offsets)
    corner = whole + whole.new_tensor(geometry.grid())
    dtype = torch.promote_types(input.dtype, offsets.dtype)

    # samples[p, k]: the image as tap k of position group p sees it, (N, C_in, H_out, W_out)
    samples = torch.stack(
        [
            torch.stack(
                [_sample(input.to(dtype), corner[p, k], fraction[p, k], geometry) for k in range(geometry.taps)]
            )
            for p in range(position_groups)
        ]
    )
    # Each output channel belongs to one conv group (its input channels) and one position group (its taps).
    channel = torch.arange(c_out, dtype=torch.int64, device=input.device)
    per_group = samples.unflatten(3, (geometry.groups, c_in // geometry.groups))  # (P, K, N, groups, C_in/groups, ...)
    read = per_group[channel * position_groups // c_out, :, :, channel * geometry.groups // c_out]
    output = torch.einsum("oknchw,ock->nohw", read, weight.flatten(2).to(dtype))
    if bias is not None:
        output = output + bias.to(dtype)[:, None, None]
    return propagate_nan_offsets(output.reshape(batch, c_out, height, width).to(input.dtype), offsets)


def _sample(image: Tensor, corner: Tensor, fraction: Tensor, geometry: ConvGeometry) -> Tensor:
    """``image`` (N, C, H, W) read bilinearly at ``output * stride + corner + fraction``: (N, C, H_out, W_out)."""
    size = geometry.output_size(image.shape[2:])
    for axis in (0, 1):  # bilinear = linear along the rows, then along the columns
        dim = axis + 2
        pixel = torch.arange(size[axis], dtype=torch.int64, device=image.device)
        first = pixel * geometry.stride[axis] + corner[axis]
        low, high = _read(image, dim, first), _read(image, dim, first + 1)
        image = low * (1 - fraction[axis]) + high * fraction[axis]
    return image


def _read(image: Tensor, dim: int, index: Tensor) -> Tensor:
    """Rows or columns ``index`` of ``image``, zeros where there are none."""
    if not image.shape[dim]:  # (torch does not index nothing)
        size = [1 if axis == dim else n for axis, n in enumerate(image.shape)]
        image = torch.cat((image, image.new_zeros(size)), dim)
    inside = (index >= 0) & (index < image.shape[dim])
    taken = image.index_select(dim, index.clamp(0, image.shape[dim] - 1))
    shape = [1] * image.ndim
    shape[dim] = -1
    return torch.where(inside.view(shape), taken, taken.new_zeros(()))
