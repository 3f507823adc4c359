"""fold_acu and round_acu: a whole model in place."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_acu import ACUConv2d, FoldedConv2d, acu_layers, convert_to_acu, fold_acu, report_acu, round_acu
from lightning_acu.folded import ReshapedConv2d


@pytest.fixture
def model(net, move):
    """Converted, with every tap between pixels."""
    return move(convert_to_acu(net, position_groups=2), 2.0)


def test_a_folded_model_computes_the_same_from_plain_convolutions(model, image, active):
    modules, expected = dict(model.named_modules()), model(image)
    assert fold_acu(model) is model
    assert_close(model(image), expected)
    assert active(model) == set()
    assert not any("offsets" in name for name, _ in model.named_parameters())
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert {type(module) for module in model.modules()} >= {nn.Conv2d, FoldedConv2d}  # the circular one has a border


def test_a_rounded_model_has_whole_offsets_and_folds_into_the_same(model, image):
    before = {name: (layer.offsets, layer.offsets.detach().clone()) for name, layer in acu_layers(model)}
    assert round_acu(model) is model
    for name, layer in acu_layers(model):
        parameter, value = before[name]
        assert layer.offsets is parameter
        assert torch.equal(parameter, value.round())
    expected = model(image)
    assert_close(fold_acu(model)(image), expected)


def test_taps_that_did_not_move_fold_into_the_state_dict_of_the_original(net):
    original = copy.deepcopy(net.state_dict())
    del net.layer2  # a border other than zeros keeps it from being one convolution
    folded = fold_acu(convert_to_acu(net)).state_dict()
    assert set(folded) == {name for name in original if not name.startswith("layer2")}
    assert all(torch.equal(value, original[name]) for name, value in folded.items())


def test_models_without_active_convolutions_stay_as_they_are(net, image):
    expected, parameters = net(image), list(net.parameters())
    for surgery in (fold_acu, round_acu):
        assert torch.equal(surgery(net)(image), expected)
    assert all(new is old for new, old in zip(net.parameters(), parameters, strict=True))


@pytest.mark.parametrize("far", [False, True])
def test_a_convolution_as_the_root_is_folded_in_place(far, move):
    layer = move(ACUConv2d(2, 4, 3, padding=1, dilation=9 if far else 1), 0.9)
    x = torch.randn(1, 2, 24, 21)
    expected = layer(x)
    assert fold_acu(layer) is layer
    assert type(layer) is (FoldedConv2d if far else ReshapedConv2d)
    assert_close(layer(x), expected, 1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_shared_convolutions_stay_shared(move):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model, x = nn.Sequential(conv, nn.ReLU(), conv), torch.randn(1, 4, 7, 9)
    expected = move(convert_to_acu(model))(x)
    fold_acu(model)
    assert model[0] is model[2] is conv
    assert type(conv) is ReshapedConv2d
    assert_close(model(x), expected, 1e-6)


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda module, args, output: seen.append(output.shape)),
    "forward with keywords": lambda m, seen: m.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(sorted(kwargs)), with_kwargs=True
    ),
    "forward always": lambda m, seen: m.register_forward_hook(
        lambda module, args, output: seen.append(output.shape), always_call=True
    ),
    "forward pre": lambda m, seen: m.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
    "full backward": lambda m, seen: m.register_full_backward_hook(
        lambda module, inputs, outputs: seen.append((inputs[0].shape, len(inputs), outputs[0].shape))
    ),
    "full backward pre": lambda m, seen: m.register_full_backward_pre_hook(
        lambda module, outputs: seen.append(outputs[0].shape)
    ),
    "state_dict": lambda m, seen: m.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: seen.append(prefix)
    ),
    "state_dict pre": lambda m, seen: m.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(prefix)),
    "load pre": lambda m, seen: m.register_load_state_dict_pre_hook(lambda module, *args: seen.append(args[1])),
    "load post": lambda m, seen: m.register_load_state_dict_post_hook(lambda module, keys: seen.append(len(keys))),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called_after_the_fold_as_before(kind):
    model, seen = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 4, 3)), []
    handle = HOOKS[kind](model[1], seen)
    convert_to_acu(model)

    def use():
        seen.clear()
        x = torch.randn(1, 2, 6, 7, requires_grad=True)
        model(x).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(seen)

    before = use()
    assert len(before) == 1
    fold_acu(model)
    assert use() == before
    handle.remove()
    assert use() == []


def test_parameters_are_new_and_an_optimizer_keeps_the_old_ones(model, image):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    fold_acu(model)
    model(image).sum().backward()
    before = model.stem.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.stem.weight, before)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_frozen_weights_are_kept(model, training):
    model.train(training).stem.weight.requires_grad_(False)
    fold_acu(model)
    assert all(module.training == training for module in model.modules())
    assert not model.stem.weight.requires_grad
    assert all(parameter.requires_grad for parameter in model.layer1.parameters())


def test_positions_that_are_not_finite_name_the_layer_and_nothing_is_folded(model, active):
    before = active(model)
    model.layer1[1].conv1.offsets.data[3] = torch.nan
    with pytest.raises(
        ValueError, match=r"layer1\.1\.conv1: positions are not finite: tap 1 of position group 0; the t"
    ):
        fold_acu(model)
    assert active(model) == before
    assert "offsets" in model.stem.state_dict()


def test_a_folded_model_can_be_converted_again(model, image):
    expected = fold_acu(model)(image)
    convert_to_acu(model, kernel_sizes=[3, 5, 7])
    assert report_acu(model).converted
    assert_close(model(image), expected)


def test_a_parametrized_weight_is_folded_in(move):
    model, x = move(convert_to_acu(nn.Sequential(nn.Conv2d(2, 4, 3)))), torch.randn(1, 2, 6, 7)
    parametrizations.weight_norm(model[0])
    expected = model(x)
    fold_acu(model)
    assert type(model[0]) is ReshapedConv2d
    assert_close(model(x), expected, 1e-6)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_a_hook_recomputes_has_to_be_made_permanent_first(name, move):
    model, x = move(convert_to_acu(nn.Sequential(nn.Conv2d(2, 4, 3)))), torch.randn(1, 2, 6, 7)
    prune.random_unstructured(model[0], name, 0.5)
    expected = model(x)
    with pytest.raises(ValueError, match=f"0: .*{name}.* recomputed"):
        fold_acu(model)
    assert torch.equal(model(x), expected)
    prune.remove(model[0], name)
    assert_close(fold_acu(model)(x), expected, 1e-6)


@pytest.mark.slow
def test_a_model_compiled_in_place_is_traced_anew(model, image):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.eval().compile(backend="aot_eager")
        expected = model(image)
        assert_close(fold_acu(model)(image), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_that_are_not_finite_are_not_rounded(value):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3))
    convert_to_acu(model)
    with torch.no_grad():
        model[0].offsets[0] = 0.3
        model[1].offsets[0] = value
    with pytest.raises(ValueError, match=r"positions are not finite: tap 0 of 1; the training has diverged"):
        round_acu(model)
    assert model[0].offsets[0] == torch.tensor(0.3)
