"""Layers that were parametrized after the conversion: folded, rounded, moved to half precision."""

import copy

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_acu import ACUConv2d, convert_to_acu, fold_acu, round_acu


class Halved(nn.Module):
    """Twice the value is stored."""

    def forward(self, stored):
        return stored / 2

    def right_inverse(self, value):
        return value * 2


class Bounded(nn.Module):
    """Less than two pixels; it cannot be set."""

    def forward(self, stored):
        return 2 * stored.tanh()


class Rough(Halved):
    """Its inverse is not exact."""

    def right_inverse(self, value):
        return value * 2.001


def model_with(name, parametrization):
    torch.manual_seed(0)
    model = convert_to_acu(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()))
    nn.init.uniform_(model[0].offsets, -0.9, 0.9)
    if parametrization == "weight_norm":
        parametrizations.weight_norm(model[0], name)
    else:
        parametrize.register_parametrization(model[0], name, parametrization)
    return model


@pytest.mark.parametrize(
    ("name", "parametrization"),
    [("weight", "weight_norm"), ("bias", Halved()), ("offsets", Halved()), ("offsets", Bounded())],
)
@pytest.mark.parametrize("rounded", [False, True])
def test_a_fold_bakes_the_parametrization_in(name, parametrization, rounded):
    model, x = model_with(name, parametrization), torch.randn(2, 2, 9, 7)
    if rounded and not isinstance(parametrization, Bounded):
        round_acu(model)
    expected = model(x)
    with torch.no_grad():  # what a parameter asks for does not depend on the caller
        fold_acu(model)
    assert_close(model(x), expected, 1e-6)
    assert {key: parameter.requires_grad for key, parameter in model.named_parameters()} == {
        "0.weight": True,
        "0.bias": True,
    }
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    convert_to_acu(copy.deepcopy(model), kernel_sizes=[3, 4, 5, 6, 7])  # not skipped for dead parameters
    parametrizations.weight_norm(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    assert_close(model(x), expected, 1e-6)


def test_what_else_is_parametrized_on_a_layer_is_kept_as_it_is():
    model = model_with("weight", "weight_norm")
    model[0].register_parameter("gate", nn.Parameter(torch.tensor([3.0])))
    parametrize.register_parametrization(model[0], "gate", Halved())
    model[0].register_forward_hook(lambda module, args, output: output * module.gate)
    x = torch.randn(2, 2, 9, 7)
    expected = model(x)
    fold_acu(model)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "0.gate"}
    assert_close(model(x), expected, 1e-6)


def test_parametrized_positions_are_rounded():
    model = model_with("offsets", Halved())
    expected = model[0].offsets.detach().round()
    round_acu(model)
    assert torch.equal(model[0].offsets, expected)
    assert expected.any()
    model[0].reset_parameters()
    assert not model[0].offsets.any()


@pytest.mark.parametrize("parametrization", [Bounded(), Rough()])
def test_positions_that_cannot_be_set_say_so_and_stay(parametrization):
    model = model_with("offsets", parametrization)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"`offsets` are parametrized by {type(parametrization).__name__}, which"):
        round_acu(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parametrized_positions_stay_in_float32(dtype):
    layer: ACUConv2d = model_with("offsets", Halved())[0]
    before = layer.offsets.detach().clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert layer.offsets.dtype == torch.float32
    assert torch.equal(layer.offsets, before)
    assert layer(torch.randn(1, 2, 5, 6, dtype=dtype)).dtype == dtype
    assert layer.double().offsets.dtype == torch.float64
