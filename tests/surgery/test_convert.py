"""convert_to_acu: which convolutions it takes, what it leaves as it was, and what it refuses."""

import copy
import warnings

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import ACUConv2d, ConvertConfig, convert_to_acu, fold_acu, report_acu, round_acu
from lightning_acu.surgery import NoEffectWarning

EVERY = {"stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv10", "layer2.xconv1"}
SQUARE = EVERY - {"layer1.0.conv1", "layer1.0.conv2"}  # 3x3 and 5x5
SIZES = [1, 3, (3, 5), 5]


def test_the_output_and_every_identity_stay(net, image, active):
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    expected = net(image)
    assert convert_to_acu(net, position_groups=2, fixed_centre=False, backend="dense") is net
    assert_close(net(image), expected)
    assert active(net) == SQUARE
    assert all(modules[name] is module for name, module in net.named_modules())
    assert {name for name, _ in net.named_parameters()} - set(parameters) == {f"{name}.offsets" for name in SQUARE}
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert {(net.get_submodule(name).position_groups, net.get_submodule(name).backend) for name in SQUARE} == {
        (2, "dense")
    }
    assert net.stem.movable.all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, EVERY),
        ({"kernel_sizes": (3, 5)}, SQUARE),
        ({"kernel_sizes": [(3, 5), 1]}, {"layer1.0.conv1", "layer1.0.conv2"}),
        ({"kernel_sizes": [(5, 3)]}, set()),
        # One regular expression, for the whole name.
        ({"target_modules": r"layer1\..*"}, {name for name in EVERY if name.startswith("layer1")}),
        ({"target_modules": r"layer1\.\d+\.conv1"}, {"layer1.0.conv1", "layer1.1.conv1"}),
        ({"target_modules": "conv1"}, set()),
        ({"target_modules": "stem|layer2.*"}, {"stem", "layer2.xconv1"}),
        # Names or their endings, at dots.
        ({"target_modules": ["conv1"]}, {"layer1.0.conv1", "layer1.1.conv1"}),
        ({"target_modules": ("0.conv1", "stem")}, {"layer1.0.conv1", "stem"}),
        ({"target_modules": ["layer1"]}, set()),
        ({"target_modules": ["layer1.*"]}, set()),
        ({"target_modules": []}, set()),
        ({"exclude_modules": "layer1.*"}, {"stem", "layer2.xconv1"}),
        ({"exclude_modules": ["conv1", "conv2"]}, {"stem", "layer1.1.conv10", "layer2.xconv1"}),
        ({"target_modules": "layer1.*", "exclude_modules": ["conv1"]}, {"layer1.0.conv2", "layer1.1.conv10"}),
        ({"filter_fn": lambda module, name: module.stride == (2, 2) and "." in name}, {"layer1.1.conv10"}),
        ({"depthwise": False}, EVERY - {"layer1.1.conv1"}),
        ({"grouped": False}, EVERY - {"layer2.xconv1"}),
        ({"depthwise": False, "grouped": False}, EVERY - {"layer1.1.conv1", "layer2.xconv1"}),
    ],
)
@pytest.mark.filterwarnings("ignore::lightning_acu.surgery.NoEffectWarning")
def test_selects_by_size_name_filter_and_groups(net, active, arguments, expected):
    convert_to_acu(net, **{"kernel_sizes": SIZES} | arguments)
    assert active(net) == expected
    assert {row.name for row in report_acu(net).skipped} == EVERY - expected
    assert all(row.reason for row in report_acu(net).skipped)


def test_a_configuration_converts_as_its_arguments_would(net, active):
    config = ConvertConfig(kernel_sizes=[3], exclude_modules=["stem"], grouped=False, position_groups=4)
    assert config.apply(net) is net
    assert active(net) == {"layer1.1.conv10"}
    assert net.layer1[1].conv10.position_groups == 4
    assert active(ConvertConfig().apply(net)) == SQUARE  # with the default sizes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": "layer1.("}, r"`target_modules` \(='layer1.\('\) is not a regular expression"),
        ({"exclude_modules": "*"}, "`exclude_modules`"),
        ({"kernel_sizes": [3, 0]}, "`kernel_sizes` has 0"),
        ({"kernel_sizes": [(3, -1)]}, "`kernel_sizes`"),
        ({"kernel_sizes": [(3, 3, 3)]}, "`kernel_sizes`"),
        ({"position_groups": 8}, r"`position_groups` \(=8\).*stem \(=4\)"),
        ({"position_groups": 0}, "`position_groups`"),
        ({"backend": "fast"}, "`backend`"),
    ],
)
def test_an_argument_that_cannot_be_meant_leaves_the_model_untouched(net, arguments, message):
    def everything():
        return [(type(module), sorted(vars(module)), list(module._parameters)) for module in net.modules()]

    before = everything()
    with pytest.raises(ValueError, match=message):
        convert_to_acu(net, **arguments)
    assert everything() == before


class DistributedDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class FSDPModule:
    """What FSDP2 adds to the bases of a module's class."""


class FSDPNet(FSDPModule, DistributedDataParallel):
    pass


@pytest.mark.parametrize("surgery", [convert_to_acu, fold_acu])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        DistributedDataParallel,
        FSDPNet,
        lambda net: nn.Sequential(DistributedDataParallel(net)),
    ],
)
def test_wrapped_models_are_refused(net, surgery, wrap):
    with pytest.raises(
        TypeError, match=r"contains a (OptimizedModule|D\w*DataParallel|DataParallel|FSDPModule); convert the"
    ):
        surgery(wrap(net))
    assert type(net.stem) is nn.Conv2d


@pytest.mark.parametrize("surgery", [convert_to_acu, fold_acu, round_acu])
def test_what_is_no_module_is_refused(surgery):
    with pytest.raises(TypeError, match=r"`model` must be an nn.Module, got str"):
        surgery("resnet18")


def test_converting_twice_changes_nothing_and_keeps_what_was_learned(net, active, move):
    move(convert_to_acu(net))
    before = copy.deepcopy(net.state_dict())
    convert_to_acu(net, position_groups=2, fixed_centre=False)
    assert active(net) == SQUARE
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.stem.fixed_tap == 4


def test_a_later_wider_conversion_adds_layers(net, active):
    convert_to_acu(net, target_modules=["stem"])
    convert_to_acu(net, target_modules=["conv1"], kernel_sizes=SIZES, position_groups=4)
    assert active(net) == {"stem", "layer1.0.conv1", "layer1.1.conv1"}
    assert (net.stem.position_groups, net.layer1[0].conv1.position_groups) == (1, 4)


@pytest.mark.parametrize(
    ("model", "arguments", "why"),
    [
        (nn.Conv2d(2, 2, 7), {}, "converted nothing in Conv2d: kernel size 7x7 not among kernel_sizes"),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), {"target_modules": ["conv1"]}, "not among target_modules"),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), {"filter_fn": lambda module, name: False}, "filter_fn returned False"),
    ],
)
def test_nothing_matched_warns_and_says_why(model, arguments, why):
    with pytest.warns(NoEffectWarning, match=why):
        assert convert_to_acu(model, **arguments) is model


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU())])
def test_a_model_without_convolutions_is_an_error(model):
    with pytest.raises(ValueError, match=rf"`model` \(={type(model).__name__}\) has no 2-D convolution"):
        convert_to_acu(model)


def test_a_convolution_as_the_root_is_converted(active):
    conv = nn.Conv2d(2, 4, 3)
    assert convert_to_acu(conv) is conv
    assert type(conv) is ACUConv2d
    assert active(conv) == {""}


def twice(conv):
    """One convolution under the names a.conv and b.again."""
    return nn.ModuleDict({"a": nn.ModuleDict({"conv": conv}), "b": nn.ModuleDict({"again": conv})})


def test_a_shared_convolution_is_converted_once():
    model = convert_to_acu(twice(nn.Conv2d(2, 4, 3)))
    assert model["a"]["conv"] is model["b"]["again"]
    assert [name for name, _ in model.named_parameters() if "offsets" in name] == ["a.conv.offsets"]


@pytest.mark.parametrize("name", ["conv", "again"])
def test_a_shared_convolution_answers_to_each_of_its_names(name, active):
    assert active(convert_to_acu(twice(nn.Conv2d(2, 4, 3)), target_modules=[name])) == {"a.conv"}
    with pytest.warns(NoEffectWarning, match="exclude_modules"):
        convert_to_acu(twice(nn.Conv2d(2, 4, 3)), exclude_modules=[name])


def test_an_optimizer_from_before_still_holds_the_old_parameters(net, image):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    convert_to_acu(net)
    net(image).square().sum().backward()
    weight, offsets = net.stem.weight.detach().clone(), net.stem.offsets.detach().clone()
    optimizer.step()
    assert not torch.equal(net.stem.weight, weight)
    assert torch.equal(net.stem.offsets, offsets)  # has to be added
    assert net.stem.offsets.grad.any()


def test_hooks_and_frozen_parameters_survive(net, image):
    seen = []
    net.stem.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    net.stem.weight.requires_grad_(False)
    convert_to_acu(net)(image)
    assert seen == [(2, 4, 8, 10)]
    assert not net.stem.weight.requires_grad
    assert not net.stem.offsets.requires_grad  # a frozen layer stays frozen
    assert net.layer1[1].conv1.offsets.requires_grad


class Pyramid(nn.Module):
    """Has a layer, not a method, of the name under which other models merge their weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.fuse = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.fuse(self.conv(x))


@pytest.mark.parametrize("kernel_sizes", [[3], [1, 3]])
def test_a_layer_called_fuse_goes_on_working(kernel_sizes):
    model, x = Pyramid(), torch.randn(1, 2, 6, 7)
    expected = model(x)
    assert_close(convert_to_acu(model, kernel_sizes=kernel_sizes)(x), expected, 1e-6)
    assert_close(fold_acu(model)(x), expected, 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.9, in its compiler
def test_a_model_compiled_in_place_is_traced_anew(net, image, move):
    torch._dynamo.reset()
    net.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        before = net.eval()(image)
        move(convert_to_acu(net))
        assert_close(net(image), net.forward(image))
        assert not torch.allclose(net(image), before, rtol=0.01)


@pytest.mark.parametrize(
    "arguments",
    [{"target_modules": ["conv", "conv_stm"]}, {"exclude_modules": "conv_stm"}, {"exclude_modules": ["conv_stm"]}],
)
def test_a_pattern_that_matches_no_convolution_warns(arguments):
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 1, 3))
    with pytest.warns(NoEffectWarning, match=f"`{next(iter(arguments))}`: 'conv_stm' matches no convolution"):
        convert_to_acu(model, **arguments)
