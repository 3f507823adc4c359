"""Active versions of the convolutions of Hugging Face's transformers that compute something else than ``nn.Conv2d``.

BiT's (also the backbone of ViT hybrid) standardises its weight, and may pad by the size of the image; Perceiver's pads
by a layer of its own.
"""

from __future__ import annotations

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import ACUConv2d
from .efficientnet_convs import DynamicSamePadding, StaticSamePadding
from .folded import FoldedConv2d
from .geometry import Padding

__all__ = ["WeightStandardized", "ZeroPadded"]


class WeightStandardized(DynamicSamePadding):
    """BiT's ``WeightStandardizedConv2d`` (Qiao et al., arXiv 1903.10520).

    If it has a layer ``pad``, that pads as TensorFlow's "SAME" does.
    """

    eps: float
    pad: nn.Module | None

    def effective_weight(self) -> Tensor:
        """Each output channel's weights at mean 0 and variance 1."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        return F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=self.eps).reshape_as(self.weight)

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        return ACUConv2d._pad(self, input) if self.pad is None else super()._pad(input)

    def _padding_layer(self) -> nn.Module | None:
        return None if self.pad is None else super()._padding_layer()

    def fold(self, form: str = "auto") -> nn.Conv2d | FoldedConv2d:
        """As in :class:`ACUConv2d`: not of BiT's class, which would standardise the weight again."""
        return ACUConv2d.fold(self, form)


class ZeroPadded(StaticSamePadding):
    """Perceiver's ``Conv2dSamePadding``: the zeros that its layer ``zero_pad_2d`` adds."""

    zero_pad_2d: nn.Module

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        return self.zero_pad_2d(input), 0

    def _padding_layer(self) -> nn.Module:
        return copy.deepcopy(self.zero_pad_2d)
