"""Presets of convert_to_acu by name, and what is refused or reported where a conversion is not possible."""

import copy

import pytest
import timm
import torch
from helpers.oracle import assert_close
from helpers.tiny import TinyModule
from timm.layers import CondConv2d
from torch import nn
from torch.nn.utils import prune

from lightning_acu import ConvertConfig, convert_to_acu, create_model, fold_acu, report_acu
from lightning_acu.classifier import ImageClassifier
from lightning_acu.surgery import NoEffectWarning

pytestmark = pytest.mark.slow

REASON = "in the first stage, which preset='C23' leaves plain"

#: Convolutions of 3x3 and 5x5 in each model, and those of them whose output has the highest resolution.
MODELS = {
    "resnet18": (16, [f"layer1.{block}.conv{n}" for block in (0, 1) for n in (1, 2)]),
    "resnet50d": (19, ["conv1.0", "conv1.3", "conv1.6"]),
    "efficientnet_b0": (17, ["conv_stem", "blocks.0.0.conv_dw"]),
    "vgg11": (8, ["features.0"]),
    "torchvision/resnet18": (16, [f"layer1.{block}.conv{n}" for block in (0, 1) for n in (1, 2)]),
}
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def paper_network():
    """The shape of the paper's plain network: conv0 and stages of 48, 96 and 192 channels."""
    channels = [(3, 16, 1, 1), (16, 48, 3, 1), (48, 48, 3, 1), (48, 96, 3, 2), (96, 96, 3, 1), (96, 192, 3, 2)]
    layers = []
    for c_in, c_out, kernel_size, stride in [*channels, (192, 192, 3, 1)]:
        layers += [nn.Conv2d(c_in, c_out, kernel_size, stride, kernel_size // 2, bias=False), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers)


def left_plain(model):
    return [row.name for row in report_acu(model).skipped if row.reason == REASON]


@models
def test_all_converts_every_3x3_and_5x5(name, active):
    model = create_model(name, num_classes=3)
    meant = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size in ((3, 3), (5, 5))}
    assert len(meant) == MODELS[name][0]
    assert active(convert_to_acu(model, preset="all")) == meant
    assert left_plain(model) == []


@models
def test_c23_leaves_the_stage_of_the_highest_resolution(name, active):
    count, first = MODELS[name]
    model = create_model(name, num_classes=3)
    assert all(module.training for module in model.modules())
    hooks = [len(module._forward_hooks) for module in model.modules()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    convert_to_acu(model, preset="C23")
    assert left_plain(model) == first
    assert len(active(model)) == count - len(first)
    assert not active(model) & set(first)
    assert all(type(model.get_submodule(layer)) is nn.Conv2d for layer in first)
    assert all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(buffer, buffers[key]) for key, buffer in model.named_buffers())


def test_c23_of_the_papers_network_leaves_exactly_the_first_two_3x3(active):
    model, x = paper_network().double().eval(), torch.randn(2, 3, 10, 13, dtype=torch.float64)
    expected = model(x)
    convert_to_acu(model, preset="C23")
    assert left_plain(model) == ["2", "4"]
    assert active(model) == {"6", "8", "10", "12"}
    assert_close(model(x), expected)
    assert str(report_acu(model)).count("C23") == 1  # skipped layers by their reason
    moved = [nn.init.uniform_(model.get_submodule(name).offsets, -1, 1) for name in active(model)]
    expected = model(x)
    assert len(moved) == 4
    assert_close(fold_acu(model)(x), expected)


def test_c23_twice_is_c23_once_and_all_takes_the_rest(active):
    model = convert_to_acu(paper_network(), preset="C23")
    once = active(model)
    assert active(convert_to_acu(model, preset="C23")) == once
    assert left_plain(model) == ["2", "4"]
    assert active(convert_to_acu(model)) == once | {"2", "4"}
    assert left_plain(model) == []
    assert active(convert_to_acu(model, preset="C23")) == once | {"2", "4"}  # what is active stays active


def test_c23_goes_with_other_arguments(active):
    model = convert_to_acu(paper_network(), preset="C23", exclude_modules=["8"], position_groups=3)
    assert active(model) == {"6", "10", "12"}
    assert left_plain(model) == ["2", "4"]
    assert model[6].position_groups == 3
    sizes = convert_to_acu(paper_network(), preset="C23", kernel_sizes=[1, 3])
    assert left_plain(sizes) == ["0", "2", "4"]


@pytest.mark.parametrize("preset", ["all", "C23"])
@pytest.mark.parametrize("own", [True, False])
def test_a_configuration_and_a_classifier_know_presets(preset, own, active):
    expected = active(convert_to_acu(create_model("resnet18"), preset=preset))
    config = ConvertConfig(preset=preset)
    assert active(config.apply(create_model("resnet18"))) == expected
    classifier = ImageClassifier("resnet18", convert=config if own else {"preset": preset})
    assert active(classifier.model) == expected


@pytest.mark.parametrize("preset", ["c23", "C14", "", None])
def test_an_unknown_preset_names_those_there_are(preset, active):
    model = paper_network()
    with pytest.raises(ValueError, match=r"`preset` \(=.*\) must be 'all' or 'C23'"):
        convert_to_acu(model, preset=preset)
    assert active(model) == set()


class TakesText(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image, text):
        return self.conv(image) + text


def test_c23_of_a_model_that_takes_no_image_says_what_to_do_instead(active):
    model = TakesText()
    with pytest.raises(ValueError, match=r"`preset`='C23'.*exclude_modules"):
        convert_to_acu(model, preset="C23")
    assert active(model) == set()
    assert active(convert_to_acu(model)) == {"conv"}


def test_c23_of_a_single_stage_leaves_all_and_warns(active):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    with pytest.warns(NoEffectWarning, match="first stage"):
        convert_to_acu(model, preset="C23")
    assert active(model) == set()


class Unknown(nn.Conv2d):
    """No rule knows what it computes."""

    def forward(self, input):
        return super().forward(input)


def pruned():
    return prune.random_unstructured(nn.Conv2d(4, 8, 3), "weight", 0.5)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: CondConv2d(4, 8, 3, num_experts=2), "mixed from several experts for every image"),
        (pruned, "recomputed from other parameters.*pruning"),
        (lambda: Unknown(4, 8, 3), "no rule for the class Unknown"),
    ],
)
def test_what_cannot_be_converted_is_an_error_where_that_is_wanted(make, why, active):
    model = nn.ModuleDict({"first": nn.Conv2d(3, 4, 3), "odd": make()})
    with pytest.raises(ValueError, match=f"`on_unsupported`='error'.*odd: .*{why}"):
        convert_to_acu(model, on_unsupported="error")
    assert active(model) == set()
    assert not any("offsets" in name for name, _ in model.named_parameters())
    convert_to_acu(model, on_unsupported="error", exclude_modules=["odd"])
    assert active(model) == {"first"}
    with pytest.raises(ValueError, match="odd: "):
        ConvertConfig(on_unsupported="error").apply(model)
    with pytest.warns(NoEffectWarning, match=f"1 of 1 selected convolutions of ModuleDict stay plain.*{why}"):
        assert active(convert_to_acu(model)) == {"first"}


def test_a_model_of_routed_convolutions_lists_them_all(active):
    model = timm.create_model("tf_efficientnet_cc_b0_4e")
    routed = [n for n, m in model.named_modules() if isinstance(m, CondConv2d) and m.kernel_size[0] > 1]
    assert routed
    with pytest.raises(ValueError, match="on_unsupported") as caught:
        convert_to_acu(model, on_unsupported="error")
    assert all(f"{name}: " in str(caught.value) for name in routed)
    assert active(model) == set()
    assert active(convert_to_acu(model, on_unsupported="error", exclude_modules=routed))


def test_on_unsupported_is_skip_or_error():
    with pytest.raises(ValueError, match=r"`on_unsupported` \(='ignore'\) must be 'skip' or 'error'"):
        convert_to_acu(paper_network(), on_unsupported="ignore")


def test_a_lightning_module_is_converted_from_inside_or_by_its_callback(active):
    module = TinyModule(convert=False)
    with pytest.raises(TypeError, match=r"TinyModule\) is a LightningModule.*ConvertToACU"):
        convert_to_acu(module)
    assert active(module) == set()
    assert active(ConvertConfig().apply(module)) == {"net.0", "net.2"}


@pytest.mark.parametrize("preset", ["all", "C23"])
@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv1d(2, 2, 3)), nn.ConvTranspose2d(2, 2, 3)])
def test_a_model_without_2d_convolutions_is_an_error(model, preset):
    with pytest.raises(ValueError, match=rf"`model` \(={type(model).__name__}\) has no 2-D convolution"):
        convert_to_acu(model, preset=preset)


def test_the_first_stage_is_the_models_own_whatever_else_is_left_out(active):
    model = convert_to_acu(create_model("resnet18"), preset="C23", exclude_modules=r"layer1\..*")
    assert len(active(model)) == 12
    model = convert_to_acu(create_model("efficientnet_b0"), preset="C23", kernel_sizes=[5])  # from the third stage on
    assert len(active(model)) == 9
