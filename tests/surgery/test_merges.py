"""Merging parallel branches whose kernels a fold has enlarged, by stand-ins of ultralytics' blocks."""

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, fold_acu, round_acu
from lightning_acu.folded import ReshapedConv2d
from lightning_acu.surgery.merges import merge_branches


def norm(channels):
    layer = nn.BatchNorm2d(channels).double().eval()
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


class Conv(nn.Module):
    def __init__(self, channels, kernel_size, **arguments):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False, **arguments)
        self.bn = norm(channels)

    def forward(self, x):
        return self.bn(self.conv(x))


class RepVGGDW(nn.Module):
    def __init__(self, channels=4, **arguments):
        super().__init__()
        self.conv = Conv(channels, 7, groups=channels, **arguments)
        self.conv1 = Conv(channels, 3, groups=channels, **arguments)

    def forward(self, x):
        return self.conv(x) + self.conv1(x)

    def forward_fuse(self, x):
        return self.conv(x)

    def fuse(self):
        assert not hasattr(self, "conv1"), "the kernels have other sizes"


class RepConv(nn.Module):
    def __init__(self, channels=4, groups=2, bn=True, **arguments):
        super().__init__()
        self.c1, self.g, self.bn = channels, groups, norm(channels) if bn else None
        self.conv1, self.conv2 = (Conv(channels, size, groups=groups, **arguments) for size in (3, 1))

    def forward(self, x):
        return self.conv1(x) + self.conv2(x) + (0 if self.bn is None else self.bn(x))

    def forward_fuse(self, x):
        return self.conv(x)

    def fuse_convs(self):
        assert hasattr(self, "conv"), "the kernels have other sizes"


class Model(nn.Sequential):
    """Fuses its blocks as ultralytics' models do."""

    def fuse(self):
        for block in self:
            block.fuse() if isinstance(block, RepVGGDW) else block.fuse_convs()
            block.forward = block.forward_fuse
        return self


@pytest.fixture(autouse=True)
def _in_ultralytics(monkeypatch):
    monkeypatch.setattr(RepVGGDW, "__module__", "ultralytics.nn.modules.block")
    monkeypatch.setattr(RepConv, "__module__", "ultralytics.nn.modules.conv")


def moved(model, **arguments):
    convert_to_acu(model.double().eval(), **arguments)
    assert any(acu_layers(model))
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.7, 0.7)
    return model


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("kernel_sizes", [[3], [3, 7]], ids=str)
def test_blocks_are_merged_whatever_the_kernels_sizes(kernel_sizes, with_example):
    model = moved(Model(RepVGGDW(), RepConv(), RepConv(bn=False, groups=1)), kernel_sizes=kernel_sizes)
    x = torch.randn(2, 4, 15, 18, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(RuntimeError, match=r"Model\.fuse\(\)"):
        model.fuse()
    fold_acu(model, x if with_example else None)
    assert model.fuse() is model
    assert [type(block.conv) for block in model] == [nn.Conv2d] * 3
    assert [block.conv.kernel_size for block in model] == [(7 + 2 * (7 in kernel_sizes),) * 2, (5, 5), (5, 5)]
    assert not any(hasattr(block, "conv1") for block in model)
    assert_close(model(x), expected)
    assert model.fuse() is model  # once more changes nothing
    assert_close(model(x), expected)


def test_blocks_are_merged_after_rounding_to_dilations():
    model = moved(Model(RepVGGDW(), RepConv()))
    for _, layer in acu_layers(model):
        layer.offsets.data.add_(layer.positions.flatten() * torch.tensor([0.9, 2.1]).repeat(layer.geometry.taps))
    x = torch.randn(2, 4, 15, 18, dtype=torch.float64)
    expected = fold_acu(round_acu(model, to="dilation"))(x)
    assert [conv.own["dilation"] for conv in model.modules() if isinstance(conv, ReshapedConv2d)] == [(2, 3)] * 2
    model.fuse()
    assert [block.conv.kernel_size for block in model] == [(7, 7), (5, 7)]
    assert_close(model(x), expected)


def test_a_block_with_kernels_of_its_own_sizes_merges_by_itself():
    model = moved(Model(RepVGGDW()))
    for _, layer in acu_layers(model):
        nn.init.zeros_(layer.offsets)
    with pytest.raises(AssertionError, match="the kernels have other sizes"):
        fold_acu(model).fuse()


def test_branches_that_cannot_be_added_are_refused_and_left_alone():
    model = moved(Model(RepConv()))
    model[0].conv2.conv.padding_mode = "circular"
    x = torch.randn(2, 4, 15, 18, dtype=torch.float64)
    expected = fold_acu(model)(x)
    with pytest.raises(RuntimeError, match=r"fails \(ValueError: cannot add the kernels .* Nothing was changed"):
        model.fuse()
    assert_close(model(x), expected)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)], ids=str)
def test_sums_of_any_branches(stride):
    sizes = [
        ((3, 5), (1, 2), (1, 1)),
        ((1, 1), (0, 0), (1, 1)),
        ((5, 1), (2, 0), (1, 3)),
        ((4, 3), (2, 1), (1, 1)),
        ((3, 3), (3, 2), (3, 2)),
    ]
    branches = [
        (nn.Conv2d(4, 6, size, stride, padding, dilation, groups=2, bias=index % 2 == 0).double(), norm(6))
        for index, (size, padding, dilation) in enumerate(sizes)
    ]
    merged = merge_branches(branches)
    assert not merged.weight.requires_grad
    x = torch.randn(2, 4, 12, 13, dtype=torch.float64)
    outputs = [bn(conv(x)) for conv, bn in branches]
    rows = min(output.shape[2] for output in outputs)  # of the even kernel there is one more
    assert_close(merged(x)[:, :, :rows], sum(output[:, :, :rows] for output in outputs))


@pytest.mark.parametrize(
    "change",
    [{"stride": 2}, {"groups": 1}, {"padding": "same"}, {"padding_mode": "circular"}],
    ids=str,
)
def test_what_no_single_kernel_computes_is_an_error(change):
    arguments = {"padding": 1, "groups": 2}
    convs = [nn.Conv2d(4, 4, 3, **arguments), nn.Conv2d(4, 4, 3, **(arguments | change))]
    with pytest.raises(ValueError, match="cannot add the kernels"):
        merge_branches([(conv.double(), norm(4)) for conv in convs])
