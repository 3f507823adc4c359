"""acu_state_dict and load_acu_state_dict: positions alone."""

import copy

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu
from lightning_acu.saving.positions import acu_state_dict, load_acu_state_dict

SIZES = [3, 5, (3, 5)]


@pytest.fixture
def model(net, move):
    return move(convert_to_acu(net, kernel_sizes=SIZES, position_groups=2))


@pytest.fixture
def other(model):
    """Another one of the same kind, its taps on the grid."""
    other = copy.deepcopy(model)
    for _, layer in acu_layers(other):
        layer.reset_parameters()
    return other


def positions(model):
    return {name: layer.positions.clone() for name, layer in acu_layers(model)}


def test_it_has_the_positions_of_every_active_convolution_and_nothing_else(model):
    state = acu_state_dict(model)
    assert state.keys() == {f"{name}.offsets" for name, _ in acu_layers(model)} <= model.state_dict().keys()
    for name, layer in acu_layers(model):
        assert torch.equal(state[f"{name}.offsets"], layer.active_offsets().flatten())


def test_it_is_a_copy_that_training_does_not_change(model):
    state = acu_state_dict(model)
    before = {key: value.clone() for key, value in state.items()}
    for _, layer in acu_layers(model):
        layer.offsets.data += 1
    assert all(torch.equal(state[key], before[key]) and not state[key].requires_grad for key in state)


def test_positions_go_into_another_model_in_place(model, other):
    parameters = list(other.parameters())
    weights = {key: value.clone() for key, value in other.state_dict().items() if "offsets" not in key}
    assert load_acu_state_dict(other, acu_state_dict(model)) is other
    assert all(new is old for new, old in zip(other.parameters(), parameters, strict=True))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in weights.items())
    for name, value in positions(model).items():
        assert torch.equal(other.get_submodule(name).positions, value)


def test_of_a_whole_state_dict_only_positions_are_read(model, other):
    before = other.stem.weight.detach().clone()
    state = model.state_dict() | {"stem.weight": torch.zeros(1), "extra": "no tensor"}
    for name, layer in acu_layers(model):  # a fixed tap has no position, whatever is stored
        if layer.fixed_tap is not None:
            state[f"{name}.offsets"] = layer.active_offsets().detach().flatten()
    load_acu_state_dict(other, state)
    assert torch.equal(other.stem.weight, before)
    assert all(torch.equal(other.get_submodule(n).positions, p) for n, p in positions(model).items())


def test_what_another_module_calls_offsets_is_none_of_ours(move):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("offsets", torch.zeros(3))

    model = move(convert_to_acu(nn.Sequential(Shift(), nn.Conv2d(2, 2, 3))))
    state = acu_state_dict(model)
    assert list(state) == ["1.offsets"]
    load_acu_state_dict(model, state | {"0.offsets": torch.ones(3)})
    assert not model[0].offsets.any()


def test_a_shared_layer_appears_once_and_may_come_under_any_of_its_names(move):
    conv = nn.Conv2d(2, 2, 3)
    model = move(convert_to_acu(nn.Sequential(conv, nn.ReLU(), conv)))
    state = acu_state_dict(model)
    assert list(state) == ["0.offsets"]
    value = state["0.offsets"]
    for alias in ({"2.offsets": value}, {"0.offsets": value, "2.offsets": value.clone()}):
        conv.offsets.data.zero_()
        load_acu_state_dict(model, alias)
        assert torch.equal(conv.active_offsets().flatten(), value)
    with pytest.raises(ValueError, match=r"1 two names of one layer.*: 2\.offsets and 0\.offsets"):
        load_acu_state_dict(model, {"0.offsets": value, "2.offsets": value / 2})


def test_a_convolution_as_the_root_has_the_key_of_its_parameter(move):
    layer = move(ACUConv2d(2, 4, 3, position_groups=2))
    state = acu_state_dict(layer)
    assert list(state) == ["offsets"]
    other = load_acu_state_dict(ACUConv2d(2, 4, 3, position_groups=2), state)
    assert torch.equal(other.positions, layer.positions)


def test_layers_without_positions_stay_where_they_are_if_not_strict(model):
    before, state = positions(model), acu_state_dict(model)
    del state["stem.offsets"]
    load_acu_state_dict(model, {key: value / 2 for key, value in state.items()}, strict=False)
    after = positions(model)
    assert torch.equal(after["stem"], before["stem"])
    assert not any(torch.equal(after[name], before[name]) for name in before.keys() - {"stem"})


def test_a_free_centre_does_not_load_where_it_is_fixed_but_the_other_way_round(net, move):
    free = move(convert_to_acu(copy.deepcopy(net), kernel_sizes=SIZES, fixed_centre=False))
    fixed = move(convert_to_acu(net, kernel_sizes=SIZES))
    with pytest.raises(ValueError, match=r"5 with a centre that has moved.*fixed_centre=False: stem\.offsets"):
        load_acu_state_dict(fixed, acu_state_dict(free))
    load_acu_state_dict(free, acu_state_dict(fixed))
    assert all(torch.equal(free.get_submodule(n).positions, p) for n, p in positions(fixed).items())


def test_everything_that_is_wrong_is_in_one_message_and_nothing_is_loaded(model):
    before, state = positions(model), acu_state_dict(model)
    state["layer1.0.conv2.offsets"] = torch.zeros(4)  # plain
    state["head.offsets"] = torch.zeros(4)  # unknown
    state["stem.offsets"] = torch.zeros(18)  # of one position group
    state["layer2.xconv1.offsets"] = state["layer2.xconv1.offsets"].index_fill(0, torch.tensor(1), torch.nan)
    state["layer1.1.conv1.offsets"].zero_()
    del state["layer1.0.conv1.offsets"]
    with pytest.raises(ValueError, match="nothing was loaded") as raised:
        load_acu_state_dict(model, state)
    for text in (
        r"1 missing in `state`; pass strict=False to leave these layers unchanged: layer1.0.conv1.offsets",
        r"1 of convolutions that are plain in the model; convert these too: layer1.0.conv2.offsets",
        r"1 of layers that the model does not have (its own have names like stem.offsets): head.offsets",
        r"stem.offsets: 18 numbers where the model has 36 with position_groups=2 and a 3x3 kernel",
        r"1 with numbers that are not finite: layer2.xconv1.offsets",
    ):
        assert text in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in positions(model).items())


def test_many_problems_of_a_kind_are_counted(model):
    state = {f"model.{key}": value for key, value in acu_state_dict(model).items()}
    with pytest.raises(ValueError, match=r"5 missing.* and 2 more\n  5 of layers .* and 2 more$"):
        load_acu_state_dict(model, state)


def test_a_model_that_is_not_converted_says_what_to_do(net, model):
    plain = nn.Sequential(nn.Conv2d(2, 2, 3))
    with pytest.raises(ValueError, match=r"`model` \(=Sequential\) has no active convolution.*convert_to_acu"):
        acu_state_dict(plain)
    with pytest.raises(ValueError, match=r"call convert_to_acu\(model\) with the same arguments first"):
        load_acu_state_dict(plain, acu_state_dict(model))


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([1], TypeError, r"`state` \(=\[1\]\) must map names to tensors"),
        ({3: torch.zeros(1)}, TypeError, "`state` has the key 3"),
        ({"stem.offsets": [0.0]}, TypeError, r"`state` has a list \(=\[0.0\]\) as 'stem.offsets'"),
        ({}, ValueError, r"`state` \(0 keys\) has no positions"),
        ({"stem.weight": torch.zeros(1)}, ValueError, r"`state` \(1 keys\) has no positions"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_state_of_positions_is_refused(state, error, message, strict, model):
    with pytest.raises(error, match=message):
        load_acu_state_dict(model, state, strict=strict)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"`model` must be an nn.Module, got dict"):
        acu_state_dict({})
    with pytest.raises(TypeError, match=r"`model` must be an nn.Module, got dict"):
        load_acu_state_dict({}, {})
