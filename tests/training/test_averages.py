"""Averaged copies of a model: found in whatever holds them, and kept on the model's whole positions."""

import copy

import pytest
import torch
from helpers.tiny import TinyModule
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.training import averaged_layers, averaged_models, is_average, keep_rounded_, trained_layers

KINDS = {"AveragedModel": AveragedModel, "ModelEma": ModelEma, "ModelEmaV2": ModelEmaV2, "ModelEmaV3": ModelEmaV3}


def network():
    net = convert_to_acu(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3)))
    with torch.no_grad():
        for _, layer in acu_layers(net):
            layer.offsets.uniform_(-3, 3)
    return net


class Holds(nn.Module):
    """A network and an average of it: inside (as modules are) or as a plain attribute (ModelEma is no module)."""

    def __init__(self, make):
        super().__init__()
        self.net = network()
        self.ema = make(self.net)


@pytest.mark.parametrize("name", KINDS)
def test_averages_are_known_by_their_class(name):
    class Own(KINDS[name]):
        pass

    net = network()
    for average in (KINDS[name](net), Own(net)):
        assert is_average(average)
        (inner,) = averaged_models([net, average, None, 3])
        assert inner is (average.ema if name == "ModelEma" else average.module)
    assert not is_average(net)


@pytest.mark.parametrize("name", KINDS)
def test_layers_of_an_average_inside_are_copies_and_not_trained(name):
    module = Holds(KINDS[name])
    assert [layer for layer, _ in trained_layers(module)] == ["net.0", "net.2"]
    (inner,) = averaged_models([module.ema])
    pairs = list(averaged_layers(module))
    assert [(id(layer), id(copied)) for layer, copied in pairs] == [
        (id(module.net[index]), id(inner[index])) for index in (0, 2)
    ]


@pytest.mark.parametrize("name", KINDS)
def test_averages_get_the_whole_positions(name):
    module = Holds(KINDS[name])
    elsewhere = copy.deepcopy(module.net)
    for _, layer in trained_layers(module):
        layer.round_()
    keep_rounded_(module, [elsewhere])
    (inner,) = averaged_models([module.ema])
    for index in (0, 2):
        rounded = module.net[index].offsets
        assert rounded.abs().max() > 1
        assert torch.equal(rounded, rounded.round())
        assert torch.equal(inner[index].offsets, rounded)
        assert torch.equal(elsewhere[index].offsets, rounded)


def test_an_average_of_something_else_is_left_alone():
    module, other = TinyModule(), convert_to_acu(nn.Sequential(nn.Conv2d(2, 5, 3)))
    before = other[0].offsets.detach().clone().fill_(0.25)
    with torch.no_grad():
        other[0].offsets.copy_(before)
    assert list(averaged_layers(module, [other])) == []
    keep_rounded_(module, [other])
    assert torch.equal(other[0].offsets, before)


def test_this_average_does_lose_whole_numbers():
    """Else the tests above show nothing."""
    whole = torch.arange(-7.0, 8.0)
    average, update = whole.clone(), get_ema_avg_fn(0.997)
    for step in range(180):
        average = update(average, whole, torch.tensor(step))
    assert not torch.equal(average, whole)


@pytest.mark.parametrize("teacher_first", [True, False])
def test_an_average_is_of_the_student_not_of_a_teacher_of_the_same_build(teacher_first):
    class Distils(nn.Module):
        def __init__(self):
            super().__init__()
            nets = {"teacher": network().requires_grad_(False), "student": network()}
            for name in sorted(nets, reverse=teacher_first):
                setattr(self, name, nets[name])
            self.ema = ModelEmaV3(self.student)
            with torch.no_grad():
                self.student[0].weight += 0.01

    model = Distils()
    pairs = list(averaged_layers(model))
    assert [(id(layer), id(average)) for layer, average in pairs] == [
        (id(model.student[index]), id(model.ema.module[index])) for index in (0, 2)
    ]
