"""create_model: timm's and torchvision's models by name, with published weights or without."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum

from lightning_acu import create_model


@pytest.fixture
def published(monkeypatch):
    """Makes random weights the published ones of every torchvision model; gives them."""

    def publish(name, **arguments):
        state = torchvision.models.get_model(name, weights=None, **arguments).state_dict()
        monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: dict(state))
        return state

    return publish


@pytest.mark.parametrize(
    ("name", "module"), [("resnet18", "timm.models.resnet"), ("torchvision/resnet18", "torchvision.models.resnet")]
)
def test_the_prefix_chooses_the_library(name, module):
    model = create_model(name, num_classes=7, in_chans=2)
    assert type(model).__module__ == module
    assert model.eval()(torch.randn(1, 2, 32, 40)).shape == (1, 7)


def test_names_may_carry_a_tag_and_models_their_own_arguments():
    model = create_model("resnet18.a1_in1k", num_classes=0, drop_path_rate=0.2, global_pool="")
    assert model.eval()(torch.randn(1, 3, 64, 96)).shape == (1, 512, 2, 3)
    block = create_model("torchvision/resnet18", norm_layer=nn.Identity).layer1[0]
    assert type(block.bn1) is nn.Identity


@pytest.mark.parametrize(
    "name", ["vgg11", "mobilenet_v2", "densenet121", "squeezenet1_1", "shufflenet_v2_x0_5", "convnext_tiny", "vit_b_32"]
)
def test_the_first_convolution_of_torchvision_models_takes_any_number_of_channels(name):
    with torch.device("meta"):
        model = create_model(f"torchvision/{name}", in_chans=5, num_classes=4)
        assert model.eval()(torch.empty(1, 5, 224, 224)).shape == (1, 4)


def test_a_widened_first_convolution_is_initialised_and_keeps_its_bias():
    first = create_model("torchvision/vgg11", in_chans=6).features[0]
    assert first.in_channels == 6
    assert first.bias is not None
    # Kaiming's for the fan out, 64 * 3 * 3, and ReLU.
    assert first.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert first.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"`model` \(='resnet81'\).*did you mean .*'resnet"),
        ("vgg11_nb", "did you mean .*'vgg11_bn'"),
        ("torchvision/resnet81", "did you mean .*'torchvision/resnet"),
        ("googlenet", "is a torchvision model, not a timm model; write 'torchvision/googlenet'"),
        ("torchvision/resnetv2_50", r"'torchvision/resnetv2_50'"),
        ("no such thing at all", r"timm.list_models\(\)"),
        ("", "is neither"),
    ],
)
def test_an_unknown_name_suggests_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        create_model(name)


def test_a_model_without_a_2d_convolution_is_built_or_refused_with_its_name():
    assert create_model("torchvision/r3d_18", num_classes=5).fc.out_features == 5
    with pytest.raises(ValueError, match=r"`in_chans` \(=1\).*r3d_18"):
        create_model("torchvision/r3d_18", in_chans=1)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet", "resnet18"])
def test_models_are_built_without_warnings(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.device("meta"):
            create_model(f"torchvision/{name}", num_classes=3)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("resnet18", {}, 64),
        ("mobilenet_v3_small", {}, 64),
        # These two are published for images scaled in another way, and rescale them.
        ("inception_v3", {"init_weights": False}, 96),
        ("googlenet", {"init_weights": False}, 64),
    ],
)
def test_published_weights_compute_what_torchvision_does_with_them(published, name, arguments, size):
    published(name, **arguments)
    expected = torchvision.models.get_model(name, weights="DEFAULT").eval()
    x = torch.randn(2, 3, size, size)
    actual = create_model(f"torchvision/{name}", pretrained=True, **arguments).eval()
    assert torch.equal(actual(x), expected(x))


def test_published_weights_fit_another_number_of_classes(published):
    state = published("resnet18")
    model = create_model("torchvision/resnet18", pretrained=True, num_classes=10)
    own = model.state_dict()
    assert own["fc.weight"].shape == (10, 512)
    assert all(torch.equal(own[key], state[key]) for key in state if not key.startswith("fc."))


@pytest.mark.parametrize("in_chans", [1, 6])
def test_published_weights_fit_another_number_of_channels(published, in_chans):
    state = published("resnet18")
    model = create_model("torchvision/resnet18", pretrained=True, in_chans=in_chans)
    x = torch.randn(2, 1, 64, 64)
    expected = torchvision.models.resnet18()
    expected.load_state_dict(state)
    # As timm does: grey images look as they did in three channels; more channels share the colours' weights.
    grey = expected.eval()(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.eval()(x.expand(-1, in_chans, -1, -1)), grey, rtol=1e-4, atol=1e-4)


def test_timms_weights_fit_other_classes_and_channels(tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt")}
    model = create_model("resnet18", pretrained=True, num_classes=10, in_chans=1, pretrained_cfg_overlay=overlay)
    own = model.state_dict()
    assert own["fc.weight"].shape == (10, 512)
    torch.testing.assert_close(own["conv1.weight"], state["conv1.weight"].sum(1, keepdim=True))
    same = [key for key in state if not key.startswith("fc.") and key != "conv1.weight"]
    assert all(torch.equal(own[key], state[key]) for key in same)
