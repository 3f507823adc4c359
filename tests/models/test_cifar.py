"""The paper's networks for CIFAR: sizes, names, and what timm's users expect of a model."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, create_model, load_acu, save_acu
from lightning_acu.models.cifar import BasicBlock

PLAIN = ["acu_plain", "acu_plain_d2", "acu_plain_f5"]
ALL = [*PLAIN, "acu_resnet32"]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def by_hand(convs, head):
    """Weights of convolutions (in, out, kernel size) with batch norm's two numbers for each output, and of the head."""
    return sum(i * o * k * k + 2 * o for i, o, k in convs) + head[0] * head[1] + head[1]


@pytest.mark.parametrize(("name", "last"), [("acu_plain", 3), ("acu_plain_d2", 3), ("acu_plain_f5", 5)])
def test_parameters_of_the_plain_networks(name, last):
    widths = [(3, 16, 1), (16, 48, 3), (48, 48, 3), (48, 96, 3), (96, 96, 3), (96, 192, last), (192, 192, last)]
    expected = by_hand([*widths, (192, 1000, 1)], (1000, 10))
    assert count(timm.create_model(name)) == expected
    # The poster's 0.82 M and 1.66 M, with 2^20 for M.
    assert round(expected / 2**20, 2) == {3: 0.82, 5: 1.66}[last]


def test_parameters_of_the_residual_network():
    stages = [(16, 16)] * 10 + [(16, 32)] + [(32, 32)] * 9 + [(32, 64)] + [(64, 64)] * 9
    expected = by_hand([(3, 16, 3), *((i, o, 3) for i, o in stages)], (64, 10))
    assert count(timm.create_model("acu_resnet32")) == expected
    assert round(expected / 1e6, 2) == 0.46  # as He et al. count it


@pytest.mark.parametrize(
    ("name", "kernel_sizes", "moving"),
    [("acu_plain", [3], 6 * 8), ("acu_plain_f5", [3, 5], 4 * 8 + 2 * 24), ("acu_resnet32", [3], 31 * 8)],
)
def test_a_3x3_has_8_taps_that_move(name, kernel_sizes, moving):
    model = timm.create_model(name)
    before = count(model)
    layers = [layer for _, layer in acu_layers(convert_to_acu(model, kernel_sizes=kernel_sizes))]
    assert sum(int(layer.movable.sum()) for layer in layers) == moving
    assert count(model) - before == sum(2 * layer.kernel_size[0] ** 2 for layer in layers)


def test_the_layers_are_the_papers():
    convs = {name: m for name, m in timm.create_model("acu_plain").named_modules() if isinstance(m, nn.Conv2d)}
    found = {name: (m.out_channels, m.kernel_size[0], m.stride[0]) for name, m in convs.items()}
    assert found == {
        "conv1.0.conv": (16, 1, 1),
        "conv1.1.conv": (48, 3, 1),
        "conv1.2.conv": (48, 3, 1),
        "conv2.1.conv": (96, 3, 2),
        "conv2.2.conv": (96, 3, 1),
        "conv3.1.conv": (192, 3, 2),
        "conv3.2.conv": (192, 3, 1),
        "conv4.conv": (1000, 1, 1),
    }
    assert all(m.bias is None for m in convs.values())


def test_the_variants_differ_in_conv3_only():
    convs = [
        {
            name: (m.kernel_size, m.dilation)
            for name, m in timm.create_model(net).named_modules()
            if hasattr(m, "dilation")
        }
        for net in PLAIN
    ]
    for variant, expected in ((convs[1], ((3, 3), (2, 2))), (convs[2], ((5, 5), (1, 1)))):
        changed = {name: value for name, value in variant.items() if value != convs[0][name]}
        assert changed == dict.fromkeys(["conv3.1.conv", "conv3.2.conv"], expected)


def test_c23_by_preset_is_c23_by_name():
    by_preset = convert_to_acu(timm.create_model("acu_plain"), kernel_sizes=[3], preset="C23")
    by_name = convert_to_acu(timm.create_model("acu_plain"), kernel_sizes=[3], exclude_modules=r"conv1\..*")
    names = [name for name, _ in acu_layers(by_preset)]
    assert names == [name for name, _ in acu_layers(by_name)]
    assert names == ["conv2.1.conv", "conv2.2.conv", "conv3.1.conv", "conv3.2.conv"]


@pytest.mark.parametrize("name", ALL)
def test_shapes(name):
    model = timm.create_model(name, num_classes=7, in_chans=2).eval()
    x = torch.randn(3, 2, 32, 24)
    features = model.forward_features(x)
    assert features.shape == (3, model.num_features, 8, 6)
    assert model.forward_head(features, pre_logits=True).shape == (3, model.num_features)
    assert torch.equal(model.forward_head(features), model(x))
    assert model(x).shape == (3, 7)


@pytest.mark.parametrize("name", ALL)
def test_the_classifier_can_be_changed(name):
    model = timm.create_model(name, num_classes=5).eval()
    assert model.get_classifier().out_features == model.num_classes == 5
    model.reset_classifier(11)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 11)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, model.num_features, 4, 4)


@pytest.mark.parametrize("name", ALL)
def test_features_of_each_stage(name):
    model = timm.create_model(name, features_only=True)
    shapes = [tuple(x.shape[1:]) for x in model(torch.randn(2, 3, 32, 16))]
    expected = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert shapes == [(channels, 32 // reduction, 16 // reduction) for channels, reduction in expected]


@pytest.mark.parametrize("name", ALL)
def test_what_timm_knows_of_them(name):
    assert timm.is_model(name)
    model = timm.create_model(name)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    with pytest.raises(ValueError, match="has no weights called 'no_such_tag'; it has none"):
        create_model(f"{name}.no_such_tag")


@pytest.mark.parametrize(("name", "depth"), [("acu_plain", 8), ("acu_plain_f5", 8), ("acu_resnet32", 16)])
def test_layer_wise_learning_rates(name, depth):
    model = timm.create_model(name)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {names[p]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(set(scales.values())) == [0.5**k for k in reversed(range(depth + 1))]
    in_order = [scales[name] for name, _ in model.named_parameters()]
    assert in_order == sorted(in_order)
    assert scales["conv1.0.conv.weight" if name != "acu_resnet32" else "conv1.conv.weight"] == 0.5**depth
    by_stage = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert len(by_stage) == (6 if name != "acu_resnet32" else 5)  # with stem and classifier


@pytest.mark.parametrize("name", ALL)
def test_checkpointing_changes_no_gradient(name):
    model = convert_to_acu(timm.create_model(name)).double()
    x, gradients = torch.randn(2, 3, 12, 8, dtype=torch.double), []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_names_that_are_nearly_right_are_suggested():
    with pytest.raises(ValueError, match="acu_plain"):
        create_model("acu_plane")


@pytest.mark.parametrize("name", ALL)
def test_initialised_by_the_fan_in(name):
    for module in timm.create_model(name).modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 4000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels():
    block = BasicBlock(2, 6, stride=2).eval()
    nn.init.zeros_(block.conv2.conv.weight)
    x = torch.rand(1, 2, 5, 6)
    expected = torch.zeros(1, 6, 3, 3)
    expected[:, 2:4] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_a_residual_network_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"`blocks` \(=0\)"):
        timm.create_model("acu_resnet32", blocks=0)
    assert count(timm.create_model("acu_resnet32", blocks=3)) == 269_722  # ResNet-20


def test_saved_and_loaded_as_any_timm_model(tmp_path):
    model = convert_to_acu(timm.create_model("acu_plain_f5", num_classes=4)).eval()
    with torch.no_grad():
        for _, layer in acu_layers(model):
            layer.offsets.uniform_(-1, 1)
    save_acu(model, tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_acu(tmp_path / "model.safetensors").eval()(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize(("imported", "known"), [("lightning_acu", False), ("lightning_acu.models", True)])
def test_registered_when_models_is_imported_and_not_before(imported, known):
    """In a process of its own: this one has imported everything."""
    code = f"import {imported}, timm; print(timm.is_model('acu_plain'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == str(known)
