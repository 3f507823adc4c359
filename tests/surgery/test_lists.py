"""Convolutions whose numbers others have set as lists (``conv.stride = [2, 2]``) or as one int."""

import copy

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import (
    ACUConv2d,
    convert_to_acu,
    fold_acu,
    model_statistics,
    plot_shapes,
    report_acu,
    round_acu,
)
from lightning_acu.saving import acu_state_dict, load_acu_state_dict

CASES = {
    "stride": ("stride", [2, 1]),
    "dilation": ("dilation", [2, 2]),
    "padding": ("padding", [1, 2]),
    "kernel_size": ("kernel_size", [3, 5]),
    "one int": ("stride", 2),
}


def model(padding_mode, attribute=None, value=None):
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 4, (3, 5), padding=(2, 4), padding_mode=padding_mode, dtype=torch.float64)
    if attribute is not None:
        setattr(conv, attribute, value)
    return nn.Sequential(conv)


def pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


@pytest.mark.parametrize("after", [False, True], ids=["before converting", "after converting"])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("case", CASES)
def test_everything_is_as_with_tuples(case, padding_mode, after):
    attribute, value = CASES[case]
    given = convert_to_acu(model(padding_mode, *(() if after else (attribute, value))), kernel_sizes=[(3, 5)])
    usual = convert_to_acu(model(padding_mode, attribute, pair(value)), kernel_sizes=[(3, 5)])
    if after:
        setattr(given[0], attribute, value)
    nn.init.uniform_(usual[0].offsets, -0.6, 0.6)
    load_acu_state_dict(given, acu_state_dict(usual))
    x = torch.randn(2, 3, 11, 13, dtype=torch.float64)
    expected = usual(x)
    assert torch.equal(given(x), expected)
    assert given[0].geometry == usual[0].geometry
    assert torch.equal(given[0].positions, usual[0].positions)
    assert str(report_acu(given, (3, 11, 13))) == str(report_acu(usual, (3, 11, 13)))
    assert model_statistics(given) == model_statistics(usual)
    plot_shapes(given)
    assert_close(fold_acu(copy.deepcopy(given))(x), expected)
    rounded = round_acu(given, separate=True)(x)
    assert_close(fold_acu(given)(x), rounded)
    fold_acu(round_acu(usual, separate=True))
    assert [type(module) for module in given.modules()] == [type(module) for module in usual.modules()]
    assert all(torch.equal(value, usual.state_dict()[key]) for key, value in given.state_dict().items())


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_on_the_grid_a_fold_is_the_convolution_it_was(padding_mode):
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode)
    conv.kernel_size, conv.stride, conv.dilation = [3, 3], [2, 2], [1, 1]
    folded = ACUConv2d.from_conv2d(conv).fold()
    assert type(folded) is nn.Conv2d
    assert (folded.kernel_size, folded.stride, folded.dilation) == ((3, 3), (2, 2), (1, 1))
    x = torch.randn(1, 3, 8, 9)
    assert_close(folded(x), conv(x), 1e-6)
