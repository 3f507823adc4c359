"""PEFT's LoRA around convolutions: right where it can be, refused where merging would be wrong."""

import copy

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu

# What peft.tuners.lora.layer.Conv2d does, in a module of peft.
STAND_IN = """
import torch
from torch import nn


class Conv2d(nn.Module):
    def __init__(self, base_layer, r=2):
        super().__init__()
        self.base_layer, self.merged = base_layer, False
        conv_layer = type(base_layer)
        self.lora_A = conv_layer(base_layer.in_channels, r, base_layer.kernel_size, base_layer.stride,
                                 base_layer.padding, bias=False)
        self.lora_B = conv_layer(r, base_layer.out_channels, (1, 1), (1, 1), groups=base_layer.groups, bias=False)

    def get_delta_weight(self):
        weight = nn.functional.conv2d(self.lora_A.weight.transpose(0, 1), self.lora_B.weight)
        return weight.transpose(0, 1)

    def merge(self, safe_merge=False, adapter_names=None):
        self.base_layer.weight.data += self.get_delta_weight()
        self.merged = True

    def forward(self, x):
        result = self.base_layer(x)
        return result if self.merged else result + self.lora_B(self.lora_A(x))
"""


def adapter(name="peft.tuners.lora.layer"):
    namespace = {"__name__": name}
    exec(STAND_IN, namespace)
    return namespace["Conv2d"]


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 9, 8)


def moved(model):
    convert_to_acu(model)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.9, 0.9)
    return model


def active_timm_layer():
    timm = pytest.importorskip("timm.layers")
    return moved(timm.StdConv2d(3, 4, 3, padding=1))


@pytest.mark.parametrize("make", [lambda: moved(nn.Conv2d(3, 4, 3, padding=1)), active_timm_layer])
def test_an_adapter_of_an_active_convolution_is_refused_before_it_is_trained(make):
    layer = make()
    with pytest.raises(TypeError, match=r"LoRA builds its branch as another ACU.*target_modules, or fold the model"):
        adapter()(layer)
    assert type(layer)(3, 4, 3).kernel_size == (3, 3)  # anyone else may


def test_an_adapter_of_a_fold_is_right_with_the_plain_convolution_in_its_place(image):
    model = moved(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)))
    fold_acu(model)
    with pytest.raises(TypeError, match=r"as another ReshapedConv2d .*set_submodule\(name, layer\.plain\(\)\)"):
        adapter()(model[0])
    expected = model(image)
    model.set_submodule("0", model[0].plain())
    assert torch.equal(model(image), expected)
    adapted = adapter()(model[0])
    expected = adapted(image)
    adapted.merge()
    assert_close(adapted(image), expected, 1e-5)


def test_more_layers_of_the_type_of_a_fold_are_ordinary_convolutions():
    folded = fold_acu(moved(nn.Conv2d(3, 4, 3, padding=1)))
    for other in (
        type(folded)(3, 5, 3, padding="same", bias=False),
        type(folded)(in_channels=3, out_channels=5, kernel_size=1),
    ):
        assert type(other) is nn.Conv2d
        assert other(torch.randn(1, 3, 6, 7)).shape == (1, 5, 6, 7)


def test_an_adapter_that_was_there_before_the_conversion_cannot_be_merged(image):
    model = nn.Sequential(adapter()(nn.Conv2d(3, 4, 3, padding=1)))
    merged = copy.deepcopy(model)
    merged[0].merge()
    assert_close(merged(image), model(image), 1e-5)
    moved(model)
    assert isinstance(model[0].lora_A, ACUConv2d)
    expected, weight = model(image), model[0].base_layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"Conv2d.merge\(\) merges weights of active convolutions \(0.base_layer"):
        model[0].merge()
    assert torch.equal(model[0].base_layer.weight, weight)
    fold_acu(model)  # both into 5x5, which can be added
    model[0].merge()
    assert not torch.equal(model[0].base_layer.weight[..., 1:4, 1:4], weight)
    assert_close(model(image), expected, 1e-5)


def test_peft_itself(image):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    with pytest.raises(TypeError, match="LoRA builds its branch"):
        peft.get_peft_model(moved(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))), config)
    early = peft.get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), config)
    moved(early)
    with pytest.raises(RuntimeError, match="merges weights of active convolutions"):
        early.merge_and_unload()
    folded = fold_acu(moved(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))))
    folded.set_submodule("0", folded[0].plain())
    model = peft.get_peft_model(folded, config).eval()
    expected = model(image)
    assert_close(model.merge_and_unload()(image), expected, 1e-5)
