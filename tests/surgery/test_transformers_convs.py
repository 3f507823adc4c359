"""The convolutions of Hugging Face's transformers, by stand-ins of the same names: BiT's, Perceiver's."""

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

from lightning_acu import ACUConv2d, FoldedConv2d, acu_conv2d, acu_layers, convert_to_acu, fold_acu, round_acu
from lightning_acu.surgery import NoEffectWarning


def same(size, kernel, stride, dilation):
    """(before, after) of one axis, by TensorFlow's documentation."""
    total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class DynamicPad2d(nn.Module):
    def __init__(self, conv, value=0):
        super().__init__()
        self.geometry, self.value = (conv.kernel_size, conv.stride, conv.dilation), value

    def forward(self, x):
        (top, bottom), (left, right) = map(same, x.shape[-2:], *self.geometry)
        return F.pad(x, (left, right, top, bottom), value=self.value)


class WeightStandardizedConv2d(nn.Conv2d):
    def __init__(self, *args, dynamic=False, eps=1e-3, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = DynamicPad2d(self) if dynamic else None
        self.eps = eps

    def forward(self, x):
        x = x if self.pad is None else self.pad(x)
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().mean((1, 2, 3), keepdim=True) + self.eps).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Conv2dSamePadding(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        (kh, kw) = self.kernel_size
        self.zero_pad_2d = nn.ZeroPad2d(((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2))

    def forward(self, x):
        return self._conv_forward(self.zero_pad_2d(x), self.weight, self.bias)


@pytest.fixture(autouse=True)
def _in_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    for name, classes in {"bit": (WeightStandardizedConv2d, DynamicPad2d), "perceiver": (Conv2dSamePadding,)}.items():
        package = types.ModuleType(f"transformers.models.{name}.modeling_{name}")
        monkeypatch.setitem(sys.modules, package.__name__, package)
        for cls in classes:
            monkeypatch.setattr(cls, "__module__", package.__name__)
            monkeypatch.setattr(package, cls.__name__, cls, raising=False)


def expected_output(conv, x):
    """The layer at its positions: the formula in float64, with padding and weight by hand."""
    weight, padding = conv.weight, conv.padding
    if isinstance(conv, WeightStandardizedConv2d):
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.square().mean((1, 2, 3), keepdim=True) + conv.eps).sqrt()
        x = x if conv.pad is None else conv.pad(x)
    else:
        x = conv.zero_pad_2d(x)
    return acu_conv2d(
        x, weight, conv.active_offsets(), conv.bias, conv.stride, padding, conv.dilation, conv.groups,
        backend="reference",
    )  # fmt: skip


CONVS = {
    "BiT": lambda: WeightStandardizedConv2d(4, 6, 3, (2, 1), 1, groups=2),
    "BiT, without padding": lambda: WeightStandardizedConv2d(4, 6, (5, 3), bias=False),
    "BiT, same": lambda: WeightStandardizedConv2d(4, 6, 3, 2, dynamic=True),
    "BiT, same, (3, 5)": lambda: WeightStandardizedConv2d(4, 6, (3, 5), (1, 3), groups=2, dynamic=True),
    "BiT, far": lambda: WeightStandardizedConv2d(4, 6, 3, 1, 9, dilation=9),
    "BiT, far, same": lambda: WeightStandardizedConv2d(4, 6, 3, 2, dilation=9, dynamic=True),
    "Perceiver": lambda: Conv2dSamePadding(4, 6, 3, 2),
    "Perceiver, (4, 5)": lambda: Conv2dSamePadding(4, 6, (4, 5), (2, 1), groups=2, bias=False),
}


@pytest.mark.parametrize("name", CONVS)
def test_they_are_converted_and_folded(name):
    x, other = (torch.randn(2, 4, *size, dtype=torch.float64) for size in [(24, 21), (9, 31)])
    conv = CONVS[name]().double()
    model = nn.Sequential(conv)
    plain = [model(x), model(other)]
    convert_to_acu(model, kernel_sizes=[conv.kernel_size])
    assert isinstance(conv, ACUConv2d)
    assert_close(model(x), plain[0])
    assert_close(model(other), plain[1])
    assert not any(acu_layers(fold_acu(copy.deepcopy(model))))
    assert_close(fold_acu(copy.deepcopy(model))(x), plain[0])  # of the shape it had: not standardised twice

    nn.init.uniform_(conv.offsets, -0.8, 0.8)
    expected = expected_output(conv, x)
    assert_close(model(x), expected)
    loss, by_hand = model(x).square().sum(), expected.square().sum()
    for got, want in zip(*(torch.autograd.grad(each, [*conv.parameters()]) for each in (loss, by_hand)), strict=True):
        assert_close(got, want, 1e-9)
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is type(conv)
    assert torch.equal(again(x), model(x))
    folded = fold_acu(copy.deepcopy(model), x)
    for twin in (folded, pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded)):
        assert_close(twin(x), expected)
        assert_close(twin(other), expected_output(conv, other))
    assert any(type(part) is FoldedConv2d for part in folded) or "far" not in name
    assert_close(fold_acu(round_acu(copy.deepcopy(model)))(x), round_acu(model)(x))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda conv: setattr(conv, "padding", (1, 1)), "it pads twice"),
        (lambda conv: setattr(conv, "padding_mode", "reflect"), "`padding_mode` .='reflect'. is ignored"),
        (lambda conv: setattr(conv.pad, "value", 1.0), "not TensorFlow's zero padding"),
        (lambda conv: setattr(conv, "pad", nn.ReflectionPad2d(1)), "not TensorFlow's zero padding"),
    ],
    ids=["padding", "padding_mode", "value", "another layer"],
)
def test_what_computes_something_else_stays_plain(change, why):
    conv = WeightStandardizedConv2d(4, 6, 3, dynamic=True)
    change(conv)
    with pytest.warns(NoEffectWarning, match=why):
        convert_to_acu(nn.Sequential(conv))


def test_perceivers_that_also_pads_by_itself_stays_plain():
    with pytest.warns(NoEffectWarning, match="it pads twice"):
        convert_to_acu(nn.Sequential(Conv2dSamePadding(4, 6, 3, padding=1)))


def test_a_class_of_that_name_elsewhere_is_not_meant(monkeypatch):
    monkeypatch.setattr(WeightStandardizedConv2d, "__module__", "elsewhere")
    with pytest.warns(NoEffectWarning, match="no rule for the class WeightStandardizedConv2d, which overrides"):
        convert_to_acu(nn.Sequential(WeightStandardizedConv2d(4, 6, 3)))
