"""The convolutions of EfficientNet-PyTorch, by stand-ins of the same names: they pad as TensorFlow does."""

import copy
import math
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import ACUConv2d, acu_conv2d, convert_to_acu, fold_acu, report_acu
from lightning_acu.surgery import NoEffectWarning


def same(size, kernel, stride, dilation):
    """(before, after) of one axis, by TensorFlow's documentation."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def sides(conv, size):
    (top, bottom), (left, right) = (
        same(n, *each) for n, *each in zip(size, conv.kernel_size, conv.stride, conv.dilation, strict=True)
    )
    return left, right, top, bottom


class Conv2dDynamicSamePadding(nn.Conv2d):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, dilation=1, groups=1, bias=True):
        super().__init__(in_channels, out_channels, kernel_size, stride, 0, dilation, groups, bias)
        self.stride = [*self.stride]  # a list, as there

    def forward(self, x):
        x = F.pad(x, sides(self, x.shape[-2:]))
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2dStaticSamePadding(nn.Conv2d):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, image_size=None, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, stride, **kwargs)
        self.stride = [*self.stride]
        self.static_padding = nn.ZeroPad2d(sides(self, image_size)) if kernel_size != 1 else nn.Identity()

    def forward(self, x):
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.fixture(params=["efficientnet_pytorch.utils", "segmentation_models_pytorch.encoders._efficientnet"])
def package(request, monkeypatch):
    """A module of that name with stand-ins of the two classes."""
    package = types.ModuleType(request.param)
    for cls in (Conv2dDynamicSamePadding, Conv2dStaticSamePadding):
        monkeypatch.setattr(cls, "__module__", request.param)
        monkeypatch.setattr(package, cls.__name__, cls, raising=False)
    monkeypatch.setitem(sys.modules, request.param.partition(".")[0], types.ModuleType(request.param.partition(".")[0]))
    monkeypatch.setitem(sys.modules, request.param, package)
    return package


def moved(layer):
    nn.init.uniform_(layer.offsets, -0.8, 0.8)
    return layer


@pytest.mark.parametrize("kernel", [3, (5, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_they_are_converted_and_folded(package, static, kernel, stride):
    size = (11, 14)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    if static:
        conv = package.Conv2dStaticSamePadding(4, 6, kernel, stride, image_size=size, groups=2)
    else:
        conv = package.Conv2dDynamicSamePadding(4, 6, kernel, stride, groups=2)
    model = nn.Sequential(conv.double())
    expected = model(x)
    convert_to_acu(model, kernel_sizes=[kernel])
    assert isinstance(conv, ACUConv2d)
    assert_close(model(x), expected)
    moved(conv)
    padded = F.pad(x, sides(conv, size))
    expected = acu_conv2d(
        padded, conv.weight, conv.active_offsets(), conv.bias, conv.stride, groups=2, backend="reference"
    )
    assert_close(model(x), expected)
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is type(conv)
    assert torch.equal(again(x), model(x))
    assert "ACUConv2d" in report_acu(model, (4, *size)).converted[0].kind
    assert_close(fold_acu(copy.deepcopy(model))(x), expected)
    if not static:
        other = torch.randn(1, 4, 8, 9, dtype=torch.float64)
        assert_close(fold_acu(copy.deepcopy(model))(other), model(other))


def test_one_that_also_pads_by_itself_stays_plain(package):
    conv = package.Conv2dStaticSamePadding(4, 6, 3, image_size=(8, 8), padding=1)
    with pytest.warns(NoEffectWarning, match="it pads twice"):
        convert_to_acu(nn.Sequential(conv))


def test_classes_of_those_names_elsewhere_are_not_meant():
    with pytest.warns(
        NoEffectWarning, match="no rule for the class Conv2dDynamicSamePadding, which overrides `forward`"
    ):
        convert_to_acu(Conv2dDynamicSamePadding(4, 6, 3))
