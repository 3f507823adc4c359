"""The effective receptive field against theory: one layer exactly, chains of random layers by adding variances."""

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu
from lightning_acu.metrics import EffectiveReceptiveField
from lightning_acu.receptive_field import receptive_energy, spread


def test_one_layer_is_the_sum_of_squared_weights_at_its_taps():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 5, (3, 2), padding=(1, 0), dilation=(2, 1), bias=False).double()
    images = torch.randn(400, 2, 9, 7, dtype=torch.float64)  # many signs
    energy = receptive_energy(conv, images, generator=torch.Generator().manual_seed(0))
    # The middle of the output (7, 6) is (3, 3); its taps are at rows 2, 4, 6 of the image, columns 3, 4.
    expected = torch.zeros(9, 7, dtype=torch.float64)
    expected[2:7:2, 3:5] = conv.weight.square().sum((0, 1))
    assert torch.equal(energy > 0, expected > 0)
    torch.testing.assert_close(energy, expected, rtol=0.25, atol=0)  # signs are random: +-5 % each, 6 pixels


def test_a_tap_between_pixels_has_the_squares_of_its_weights():
    conv = ACUConv2d.from_positions(1, 1, [(0.25, -0.5)], bias=False).double()
    energy = receptive_energy(conv, torch.randn(1, 1, 5, 5, dtype=torch.float64))
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[2:4, 1:3] = torch.tensor([[0.75 * 0.5, 0.75 * 0.5], [0.25 * 0.5, 0.25 * 0.5]], dtype=torch.float64) ** 2
    torch.testing.assert_close(energy, expected * conv.weight.item() ** 2)


@pytest.mark.parametrize("dilation", [1, 2])
def test_in_a_chain_of_random_linear_layers_variances_add(dilation):
    torch.manual_seed(dilation)
    chain = nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 2, dilation, dilation), nn.Conv2d(64, 64, (1, 5), 1, (0, 2))
    )
    field = EffectiveReceptiveField()
    for _ in range(3):
        field.update(chain, torch.randn(16, 3, 41, 37))
    _, (down, across) = spread(field.map)
    three, five = 2 / 3, 2.0  # variances of -1, 0, 1 and of -2 ... 2
    assert down.item() ** 2 == pytest.approx(three + dilation**2 * three, rel=0.1)
    assert across.item() ** 2 == pytest.approx(three + dilation**2 * three + 4 * five, rel=0.1)
    assert field.compute().item() ** 2 == pytest.approx((down.item() ** 2 + across.item() ** 2) / 2, rel=1e-5)
    assert field.map.sum().item() == pytest.approx(1)


def test_wider_taps_see_further_and_the_model_stays_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    convert_to_acu(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 21, 21)
    narrow, wide = EffectiveReceptiveField(), EffectiveReceptiveField(layer="3")
    narrow.update(model, images)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for _, layer in acu_layers(model):
            layer.offsets.copy_(2 * layer.positions.flatten())  # three times as far out
    wide.update(model, images)
    assert wide.compute() > 1.5 * narrow.compute()


def test_errors():
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    with pytest.raises(TypeError, match=r"`images` must be a float tensor \(N, C, H, W\), got torch.uint8"):
        receptive_energy(model, torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"`images` must be a float tensor.*got list"):
        receptive_energy(model, [])
    with pytest.raises(ValueError, match=r"`layer` \(='1'\): the model has no such module; there are 0"):
        receptive_energy(model, torch.zeros(1, 1, 4, 4), layer="1")
    with pytest.raises(ValueError, match="no module has an output"):
        receptive_energy(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), torch.zeros(1, 1, 4, 4))
    field = EffectiveReceptiveField()
    field.update(model, torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"`images` are \(9, 8\) pixels, those before \(8, 8\)"):
        field.update(model, torch.randn(1, 1, 9, 8))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="does not depend on these `images`"):
        field.update(model, torch.randn(1, 1, 8, 8))
