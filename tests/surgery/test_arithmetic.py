"""Multiply-accumulates of convolutions, and the sizes of their outputs."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu, report_acu
from lightning_acu.surgery.arithmetic import (
    default_input_size,
    folded_macs_per_pixel,
    fractional_fold_macs_per_pixel,
    macs_per_pixel,
    output_sizes,
)


def counted_macs(model, input_size):
    """What torch counts of convolutions in a forward pass: 2 floating-point operations for each MAC."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size))
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for operator, flops in counts.items() if "convolution" in str(operator)) // 2


@pytest.mark.parametrize(("name", "size"), [("resnet18", (3, 224, 224)), ("coat_lite_tiny", (3, 224, 224))])
def test_totals_are_what_torch_counts_before_and_folded(name, size):
    model = timm.create_model(name)
    plain = counted_macs(model, size)
    assert plain == report_acu(model, size).macs > 1e7
    convert_to_acu(model)
    report = report_acu(model, size)
    assert report.macs == report.folded_macs == plain
    for _, layer in acu_layers(model):
        nn.init.constant_(layer.offsets, 0.5)  # a kernel grows by as much on the other side
    moved = report_acu(model, size)
    assert moved.folded_macs == moved.fractional_fold_macs == report.fractional_fold_macs > plain == moved.macs
    assert moved.folded_macs == counted_macs(fold_acu(model), size)


CONVS = {
    "plain": (nn.Conv2d(4, 6, 3, padding=1), 25),
    "5x5": (nn.Conv2d(4, 6, 5, padding=2), 49),
    "1x7": (nn.Conv2d(4, 6, (1, 7), padding=(0, 3)), 27),
    "even": (nn.Conv2d(4, 6, 2), 16),
    "dilated": (nn.Conv2d(4, 6, 3, padding=2, dilation=2), 49),
    "far": (nn.Conv2d(4, 6, 3, padding=9, dilation=9), 36),  # 9 kernels of 2x2
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), 25),
    "stride": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), 25),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 25),
}


@pytest.mark.parametrize(("conv", "cells"), CONVS.values(), ids=CONVS)
def test_one_layer_at_one_pixel_and_in_an_image(conv, cells):
    conv = copy.deepcopy(conv)
    each = conv.weight[0, 0].numel()
    taps = conv.weight.numel() // each
    assert macs_per_pixel(conv) == conv.weight.numel()
    assert counted_macs(conv, (4, 30, 26)) == report_acu(conv, (4, 30, 26)).macs
    convert_to_acu(conv, kernel_sizes=[conv.kernel_size])
    assert folded_macs_per_pixel(conv) == macs_per_pixel(conv) == taps * each
    assert fractional_fold_macs_per_pixel(conv) == taps * cells
    with torch.no_grad():
        conv.offsets += 0.5
    folded = counted_macs(conv.fold(), (4, 30, 26))
    assert folded == report_acu(conv, (4, 30, 26)).folded_macs
    assert folded_macs_per_pixel(conv) == taps * cells  # moved to one side, a kernel grows on both


def test_taps_that_cannot_move_cost_nothing_more():
    layer = ACUConv2d(4, 6, 1)
    assert fractional_fold_macs_per_pixel(layer) == 24
    assert fractional_fold_macs_per_pixel(ACUConv2d(4, 6, 1, fixed_centre=False)) == 24 * 9


def test_a_free_shape_is_measured_from_where_it_starts():
    cross = ACUConv2d.from_positions(2, 2, [(-1, 0), (0, -1), (0, 0), (0, 1), (1, 0)])
    assert macs_per_pixel(cross) == 4 * 5
    assert folded_macs_per_pixel(cross) == 4 * 9
    assert fractional_fold_macs_per_pixel(cross) == 4 * 25
    between = ACUConv2d.from_positions(2, 2, [(-1.5, -1.5), (1.25, 1.75)])
    assert fractional_fold_macs_per_pixel(between) == folded_macs_per_pixel(between) == 4 * 25


def test_positions_that_cannot_be_folded_have_no_cost():
    layer = ACUConv2d(2, 4, 3)
    nn.init.constant_(layer.offsets, torch.inf)
    assert folded_macs_per_pixel(layer) is None
    assert folded_macs_per_pixel(ACUConv2d(2, 4, 3, device="meta")) is None
    report = report_acu(layer, (2, 8, 8))
    assert (report.folded_macs, report.macs, report.fractional_fold_macs) == (None, 72 * 36, 200 * 36)


def test_sizes_of_every_call_in_order():
    shared = nn.Conv2d(4, 4, 3, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), shared, nn.ReLU(), shared)
    unused = nn.Conv2d(1, 1, 1)
    model.unused = nn.ModuleList([unused])
    model.forward = lambda image: shared(shared(model[0](image)))
    assert output_sizes(model, (3, 33, 21)) == {model[0]: [(33, 21)], shared: [(16, 10), (7, 4)], unused: []}
    assert report_acu(model, (3, 33, 21)).rows[1].output_sizes == ((16, 10), (7, 4))


def test_patches_in_the_batch_count_all():
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(nn.Unflatten(2, (2, 8)), conv)
    model.forward = lambda image: conv(image.unfold(2, 8, 8).permute(0, 2, 1, 4, 3).flatten(0, 1))
    [row] = report_acu(model, (3, 16, 12)).rows
    assert (row.output_sizes, row.pixels) == (((6, 10),), 2 * 6 * 10)


def test_a_model_that_takes_a_list_of_images():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            assert isinstance(images, list)
            return [self.conv(image) for image in images]

    model = Listed()
    assert output_sizes(model, (3, 9, 8)) == {model.conv: [(7, 6)]}


def test_a_detection_model():
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    report = report_acu(convert_to_acu(model), (3, 320, 320))
    rows = {row.name: row for row in report.rows}
    assert rows["backbone.body.0.0"].output_sizes == ((160, 160),)
    assert len(rows["rpn.head.conv.0.0"].output_sizes) == 3  # one for each level of the pyramid
    assert report.macs < report.fractional_fold_macs


@pytest.mark.parametrize("size", [(3, 64, 64), (5, 64, 64)])
def test_the_model_stays_as_it_was(size):
    model = convert_to_acu(timm.create_model("resnet18")).train()
    model.layer1.eval()
    model.layer2[0].conv1.eval()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    if size[0] == 3:
        report_acu(model, size)
    else:
        with pytest.raises(ValueError, match=r"`input_size` \(=\(5, 64, 64\)\): the forward pass failed: .*; give"):
            report_acu(model, size)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_does_something_at_eval_is_not_asked_to(net):
    net.train = None  # as one that merges its weights there, or freezes some of its layers
    assert output_sizes(net, (3, 33, 33))[net.stem] == [(16, 16)]
    assert net.training


def test_the_image_has_the_model_s_precision():
    for dtype in (torch.float64, torch.bfloat16):
        conv = nn.Conv2d(3, 4, 3, dtype=dtype)
        assert output_sizes(conv, (3, 5, 6)) == {conv: [(3, 4)]}


@pytest.mark.parametrize("size", [(3, 8), (3, 8, 8, 8), (3, 0, 8), (3, -8, 8)])
def test_an_input_size_that_is_none(size):
    with pytest.raises(ValueError, match=r"`input_size` \(=.*must be \(channels, height, width\)"):
        report_acu(nn.Conv2d(3, 4, 3), size)


def test_an_input_size_of_fractions():
    with pytest.raises(TypeError, match=r"`input_size` \(=\(3, 8\.5, 8\)\) must be"):
        report_acu(nn.Conv2d(3, 4, 3), (3, 8.5, 8))


def test_parameters_not_initialised_yet_stay_so():
    model = nn.LazyConv2d(4, 3)
    with pytest.raises(ValueError, match=r"`model` \(=LazyConv2d\) has lazy parameters that are not initialised yet"):
        report_acu(model, (3, 8, 8))
    assert report_acu(model).rows[0].macs == 0


def test_the_default_size_is_timm_s_with_the_model_s_channels():
    assert default_input_size(timm.create_model("resnet18")) == (3, 224, 224)
    assert default_input_size(timm.create_model("resnet18", in_chans=1)) == (1, 224, 224)
    assert default_input_size(nn.Sequential(timm.create_model("efficientnet_b1", in_chans=4))) == (4, 240, 240)
    assert default_input_size(nn.Sequential(nn.Conv2d(7, 4, 3))) == (7, 224, 224)
    assert default_input_size(nn.Linear(2, 2)) == (3, 224, 224)
