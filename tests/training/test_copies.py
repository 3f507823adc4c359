"""Copies of a model's positions are found wherever they are kept, and given the positions of the layer they copy."""

import copy

import pytest
import torch
from torch import nn

from lightning_acu import convert_to_acu
from lightning_acu.training import copied_positions, hold_copies_, hold_copies_in_, on_whole_pixels, trained_layers


@pytest.fixture
def net():
    """Two layers of one shape and one of another, rounded."""
    model = convert_to_acu(
        nn.Sequential(nn.Conv2d(2, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 5))), kernel_sizes=[3, 5]
    )
    for index, (_, layer) in enumerate(trained_layers(model)):
        with torch.no_grad():
            layer.offsets.copy_(torch.arange(float(len(layer.offsets))) + 10 * index)
    return model


def found(net, value, **arguments):
    return [one.path for one in copied_positions(trained_layers(net), "it", value, **arguments)]


NAMES = ["0.offsets", "1.0.offsets", "1.1.offsets"]


class Holder:
    def __init__(self, value):
        self.value = value


def hiding(net):
    """A module that does not know that ``net`` is one of its parts."""
    module = nn.Identity()
    module.hidden = [net]
    return module


PLACES = {
    "a module": (lambda net: copy.deepcopy(net), "it."),
    "a part of another module": (lambda net: nn.ModuleDict({"net": copy.deepcopy(net)}), "it.net."),
    "weights": (lambda net: copy.deepcopy(net.state_dict()), "it."),
    "weights of what contains it": (
        lambda net: {f"module.net.{name}": value.clone() for name, value in net.state_dict().items()},
        "it.module.net.",
    ),
    "a list": (lambda net: [1, "a", copy.deepcopy(net)], "it.2."),
    "a list of a part of a module": (lambda net: nn.Sequential(hiding(copy.deepcopy(net))), "it.0.hidden.0."),
    "an object": (lambda net: Holder(copy.deepcopy(net)), "it.value."),
    "an object in a tuple in a dict": (lambda net: {"a": (Holder(copy.deepcopy(net)),)}, "it.a.0.value."),
}


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_and_held(net, place):
    make, prefix = PLACES[place]
    value = make(net)
    assert found(net, value) == [prefix + name for name in NAMES]
    copies = list(copied_positions(trained_layers(net), "it", value))
    for one in copies:
        with torch.no_grad():
            one.offsets.add_(0.3)  # less than two layers of one shape differ
    hold_copies_(trained_layers(net), copies)
    for one, (_, layer) in zip(copies, trained_layers(net), strict=True):
        assert torch.equal(one.offsets, layer.offsets)


def test_layers_of_one_name_and_shape_are_told_apart_by_their_positions(net):
    both = nn.ModuleDict({"one": net, "two": copy.deepcopy(net)})
    for _, layer in trained_layers(both["two"]):
        with torch.no_grad():
            layer.offsets += 100
    teacher = copy.deepcopy(both["two"].state_dict())
    for value in teacher.values():
        value += 0.3
    layers = trained_layers(both)
    hold_copies_(layers, copied_positions(layers, "it", teacher))
    assert all(torch.equal(teacher[name], both["two"].state_dict()[name]) for name in NAMES)


def test_buffers_whose_names_have_no_dots(net):
    ema = nn.Module()
    for name, value in net.state_dict().items():
        ema.register_buffer(name.replace(".", ""), value.clone())
    assert found(net, ema) == ["it.0offsets", "it.10offsets", "it.11offsets"]


def test_the_model_itself_other_tensors_and_what_is_skipped_are_no_copies(net):
    assert found(net, net) == []
    assert found(net, {"it": net, "0.weight": net[0].weight.clone(), "0.offsets": torch.zeros(3), "offsets": 1}) == []
    assert found(net, [torch.zeros(18), {"step": 3}, None, found, Holder]) == []
    assert found(net, Holder(copy.deepcopy(net)), skip=(Holder,)) == []


def test_what_refers_to_itself_is_large_or_deep_does_no_harm(net):
    ring = Holder([])
    ring.value.append(ring)
    assert found(net, ring) == []
    assert found(net, [copy.deepcopy(net)] * 1001) == []
    wide = [[[Holder(index)] * 3 for index in range(300)] for _ in range(300)]
    assert found(net, wide) == []


@pytest.mark.parametrize(
    ("value", "whole"), [(0.0, True), (-3.0, True), (0.5, False), (torch.nan, False), (torch.inf, False)]
)
def test_on_whole_pixels(value, whole):
    assert on_whole_pixels(torch.tensor([1.0, value])) is whole


@pytest.mark.parametrize("beside", [True, False])
def test_an_average_that_holds_the_model_beside_its_copy_is_held(net, beside):
    average = nn.ModuleDict({"online": net} if beside else {})
    average["copy"] = copy.deepcopy(net)
    for _, layer in trained_layers(average["copy"]):
        with torch.no_grad():
            layer.offsets += 0.3  # less than two layers of one shape differ
    hold_copies_in_(trained_layers(net), "it", average)
    for (_, layer), (_, copied) in zip(trained_layers(net), trained_layers(average["copy"]), strict=True):
        assert torch.equal(copied.offsets, layer.offsets)


def test_a_teacher_inside_the_model_is_held(net):
    model = nn.ModuleDict({"student": net, "teacher": copy.deepcopy(net)})
    for _, layer in trained_layers(model["teacher"]):
        nn.init.constant_(layer.offsets, 0.25)
    hold_copies_in_(trained_layers(model), "it", model["teacher"])
    assert not any((layer.offsets == 0.25).any() for _, layer in trained_layers(model))
