"""Active versions of the convolutions of lukemelas' EfficientNet-PyTorch, which segmentation_models_pytorch has too.

They pad as TensorFlow does: by the size of each image, or of the image size that the model was built for.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .derived import DerivedACUConv2d
from .folded import FoldedConv2d, PadSame2d
from .geometry import Padding, same_padding

__all__ = ["DynamicSamePadding", "StaticSamePadding"]

torch.fx.wrap("same_padding")  # depends on numbers that torch.fx does not know while it traces


class _PaddedFirst(DerivedACUConv2d):
    """Pads the image in its own way, and then as ``nn.Conv2d`` does."""

    def _merge_padding(self, folded: FoldedConv2d) -> FoldedConv2d:
        return folded  # the padding stays a layer of its own


class DynamicSamePadding(_PaddedFirst):
    """``Conv2dDynamicSamePadding``: TensorFlow's "SAME", by the size of the image."""

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        geometry = self.geometry
        top, left, bottom, right = same_padding(
            input.shape[-2:], geometry.kernel_size, geometry.stride, geometry.dilation
        )
        return F.pad(input, (left, right, top, bottom)), 0

    def _padding_layer(self) -> nn.Module | None:
        geometry = self.geometry
        return PadSame2d(geometry.kernel_size, geometry.stride, geometry.dilation)


class StaticSamePadding(_PaddedFirst):
    """``Conv2dStaticSamePadding``: the same for one image size, by a layer ``static_padding``."""

    static_padding: nn.Module

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        return self.static_padding(input), 0

    def _padding_layer(self) -> nn.Module:
        return copy.deepcopy(self.static_padding)
