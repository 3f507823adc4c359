"""Layers that several tests use."""

import math

import torch
from torch import nn

from lightning_acu import ACUConv2d

CROSS = [(-1, 0), (0, -1), (0, 1), (1, 0)]
RING = [(1.5 * math.sin(2 * math.pi * k / 8), 1.5 * math.cos(2 * math.pi * k / 8)) for k in range(8)]
TAPS_24 = [(0.37 * k - 4, (0.61 * k) % 5 - 2) for k in range(24)]


def perturbed(layer, scale=1.0):
    """``layer`` with offsets in (-scale, scale), none of them whole."""
    nn.init.uniform_(layer.offsets, -scale, scale)
    return layer


def asymmetric(**arguments):
    """A layer whose every argument tells rows from columns, and its image."""
    layer = ACUConv2d(4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, position_groups=3, **arguments)
    return perturbed(layer), torch.randn(2, 4, 7, 9, dtype=layer.weight.dtype)
