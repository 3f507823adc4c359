"""Models to draw, and drawings read back."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d


@pytest.fixture
def stack():
    def make(count):
        """A model with ``count`` active convolutions of many kinds, moved."""
        kinds = [
            {"kernel_size": 3},
            {"kernel_size": (3, 2), "dilation": (2, 1), "position_groups": 2},
            {"kernel_size": 5, "groups": 4, "position_groups": 4, "fixed_centre": False},
            {"kernel_size": 1},
        ]
        model = nn.Sequential(*(ACUConv2d(4, 4, **kinds[index % 4]) for index in range(count)))
        for layer in model:
            nn.init.uniform_(layer.offsets, -1, 1)
        return model

    return make


@pytest.fixture
def drawn():
    def points(axes, label):
        """The places of the circles of that label, as (row, column)."""
        [circles] = [collection for collection in axes.collections if collection.get_label() == label]
        return torch.tensor(np.asarray(circles.get_offsets()))[:, [1, 0]]

    return points
