"""Models that are built or converted under ``torch.inference_mode()`` learn afterwards, or say why they cannot."""

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu


def train_once(model, image):
    model(image).square().sum().backward()
    return [layer.offsets.grad for _, layer in acu_layers(model)]


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_positions_of_a_model_that_was_converted_there_learn(net, image, backend):
    with torch.inference_mode():
        convert_to_acu(net, backend=backend)(image)
    assert all(gradient.any() for gradient in train_once(net, image))


def test_a_layer_made_there_from_a_normal_one_learns(image):
    conv = nn.Conv2d(3, 4, 3, dtype=image.dtype)
    with torch.inference_mode():
        layer = ACUConv2d.from_conv2d(conv)
        layer.round_()
    assert all(gradient.any() for gradient in train_once(layer, image))


def test_frozen_layers_stay_frozen_there(net):
    with torch.inference_mode():
        convert_to_acu(net.requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
def test_a_layer_whose_weight_was_made_there_is_torchs_error_as_with_a_plain_one(backend):
    with torch.inference_mode():
        plain, active = nn.Conv2d(3, 4, 3), ACUConv2d(3, 4, 3, backend=backend)
        free = ACUConv2d.from_positions(3, 4, [(0, 0), (0, 1.5)], backend=backend)
    for layer in (plain, active, free):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            layer(torch.randn(2, 3, 8, 9)).sum().backward()
    with torch.no_grad():
        active(torch.randn(2, 3, 8, 9))
