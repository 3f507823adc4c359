"""A small network whose names and convolutions cover every selection, and ways to look at a model."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_acu import acu_layers


@pytest.fixture
def net():
    """Fresh, in float64; for images (N, 3, H, W). xconv1 and conv10 are there to be mistaken for conv1."""

    def block(**layers):
        return nn.Sequential(OrderedDict(layers))

    return block(
        stem=nn.Conv2d(3, 4, 3, stride=2, bias=False),
        layer1=nn.Sequential(
            block(conv1=nn.Conv2d(4, 4, (3, 5), padding=(1, 2)), norm=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 8, 1)),
            block(conv1=nn.Conv2d(8, 8, 5, padding="same", groups=8), act=nn.ReLU(), conv10=nn.Conv2d(8, 8, 3, 2, 1)),
        ),
        layer2=block(xconv1=nn.Conv2d(8, 4, 3, padding=1, groups=2, padding_mode="circular")),
    ).double()


@pytest.fixture
def image():
    return torch.randn(2, 3, 17, 22, dtype=torch.float64)


@pytest.fixture
def active():
    """Names of the active convolutions of a model."""
    return lambda model: {name for name, _ in acu_layers(model)}


@pytest.fixture
def move():
    """Moves every tap of a model by up to ``scale`` pixels; gives the model."""

    def moved(model, scale=1.0):
        for _, layer in acu_layers(model):
            nn.init.uniform_(layer.offsets, -scale, scale)
        return model

    return moved
