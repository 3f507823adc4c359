"""Merges of parallel branches that their own class would do for its kernel sizes only; by class names, as for rules.

Ultralytics' ``RepVGGDW`` (YOLOv10) pads its 3x3 kernel by 2 to add it to a 7x7 one, and ``RepConv`` (RT-DETR, YOLOv9) a
1x1 by 1: right for kernels of these sizes, an error for the larger or dilated ones of a fold. The merge itself is
always possible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

__all__ = ["known_merge", "merge_branches"]


def merge_branches(branches: list[tuple[nn.Conv2d, Any]]) -> nn.Conv2d:
    """One frozen convolution that computes the sum of convolutions, each followed by its batch norm (in eval mode).

    Raises:
        ValueError: their strides or groups differ, or they pad other than by zeros on equal sides.
    """
    first, _ = branches[0]
    for conv, _ in branches:
        same = (conv.stride, conv.groups, conv.padding_mode) == (first.stride, first.groups, "zeros")
        if not same or isinstance(conv.padding, str):
            raise ValueError(f"cannot add the kernels of ({conv.extra_repr()}) and ({first.extra_repr()})")
    rows, columns = (max(int(conv.padding[axis]) for conv, _ in branches) for axis in (0, 1))
    # Each kernel begins by its own padding before the first output pixel.
    height, width = (
        max(pad - int(conv.padding[axis]) + _reach(conv, axis) for conv, _ in branches)
        for axis, pad in enumerate((rows, columns))
    )
    kernel: Any = 0
    bias: Any = 0
    for conv, norm in branches:
        weight, shift = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        dense = weight.new_zeros(*weight.shape[:2], _reach(conv, 0), _reach(conv, 1))
        dense[:, :, :: conv.dilation[0], :: conv.dilation[1]] = weight
        top, left = rows - int(conv.padding[0]), columns - int(conv.padding[1])
        bottom, right = height - top - dense.shape[2], width - left - dense.shape[3]
        kernel, bias = kernel + F.pad(dense, (left, right, top, bottom)), bias + shift
    merged = nn.Conv2d(
        first.in_channels, first.out_channels, (height, width), (1, 1), (rows, columns), 1, first.groups, device="meta"
    )
    merged.stride = first.stride
    merged.weight, merged.bias = (nn.Parameter(each.detach(), requires_grad=False) for each in (kernel, bias))
    return merged.train(first.training)


def _reach(conv: nn.Conv2d, axis: int) -> int:
    """The rows (columns) from the first to the last tap."""
    return (conv.kernel_size[axis] - 1) * conv.dilation[axis] + 1


def _identity(block: Any) -> nn.Conv2d:
    """The convolution that gives what it takes, for a batch norm of the block's input."""
    conv = nn.Conv2d(block.c1, block.c1, 1, groups=block.g, bias=False, device="meta")
    eye = torch.eye(block.c1 // block.g, dtype=block.bn.weight.dtype, device=block.bn.weight.device)
    conv.weight = nn.Parameter(eye.repeat(block.g, 1)[:, :, None, None], requires_grad=False)
    return conv


@torch.no_grad()
def _fuse_repvggdw(block: Any) -> None:
    block.conv = merge_branches([(branch.conv, branch.bn) for branch in (block.conv, block.conv1)])
    del block.conv1


@torch.no_grad()
def _fuse_repconv(block: Any) -> None:
    branches = [(branch.conv, branch.bn) for branch in (block.conv1, block.conv2)]
    block.conv = merge_branches(branches if block.bn is None else [*branches, (_identity(block), block.bn)])
    for name in ("conv1", "conv2", "bn"):
        delattr(block, name)


_KNOWN: dict[tuple[str, str, str], Callable[[Any], None]] = {
    ("ultralytics.nn.modules.block", "RepVGGDW", "fuse"): _fuse_repvggdw,
    ("ultralytics.nn.modules.conv", "RepConv", "fuse_convs"): _fuse_repconv,
}


def known_merge(cls: type[nn.Module], method: str) -> Callable[[Any], None] | None:
    """What does for kernels of any size what ``method`` of exactly ``cls`` does for some, or None."""
    return _KNOWN.get((cls.__module__, cls.__qualname__, method))
