"""The fold: an active convolution as plain ones, exactly."""

import copy
import pickle

import pytest
import torch
from helpers.oracle import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_acu import ACUConv2d, FoldedConv2d
from lightning_acu.expansion import pad_or_crop

MODES = ["zeros", "reflect", "replicate", "circular"]


def plain_parts(folded):
    """Every module that computes, in a fold; each has to be exactly an nn.Conv2d."""
    parts = [folded] if isinstance(folded, nn.Conv2d) else list(folded.convs)
    assert all(type(part) is nn.Conv2d for part in parts)
    return parts


@st.composite
def layers(draw):
    """Any layer, with taps on and between pixels, near and far; it runs the formula, not what the fold uses."""
    torch.manual_seed(draw(st.integers(0, 999)))
    stride = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    layer = ACUConv2d(
        4,
        8,
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        stride,
        draw(st.tuples(st.integers(0, 3), st.integers(0, 3)) | st.just("same" if stride == (1, 1) else "valid")),
        draw(st.tuples(st.integers(1, 6), st.integers(1, 6))),
        groups=draw(st.sampled_from([1, 2, 4])),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
        dtype=torch.float64,
        position_groups=draw(st.sampled_from([1, 2, 4, 8])),
        fixed_centre=draw(st.booleans()),
        backend="reference",
    )
    nn.init.uniform_(layer.offsets, -1, 1).data.mul_(draw(st.sampled_from([0.0, 0.7, 2.0, 6.0])))
    whole = torch.rand(layer.offsets.shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    layer.offsets.data[whole] = layer.offsets.data[whole].round()
    return layer


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(layers(), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_any_layer_folds_into_plain_convolutions_that_compute_the_same(layer, height, width, batched):
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    x = torch.randn(2, 4, height + (kh - 1) * dh + 3, width + (kw - 1) * dw + 3, dtype=torch.float64)
    x = x if batched else x[0]
    folded = layer.fold()
    plain_parts(folded)
    assert_close(folded(x), layer(x))


@settings(max_examples=60, deadline=None)
@given(layers(), st.integers(1, 6), st.integers(1, 6))
def test_images_smaller_than_the_offsets_fold_too(layer, height, width):
    layer.padding_mode = "zeros"  # the other modes ask for larger images
    nn.init.uniform_(layer.offsets, -9, 9)
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    assume(min(layer.geometry.output_size(x.shape[2:])) > 0)
    assert_close(layer.fold()(x), layer(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_layers_fold_in_float32(memory_format):
    layer = ACUConv2d(4, 6, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, position_groups=3)
    nn.init.uniform_(layer.offsets, -2, 2)
    layer, x = (each.to(memory_format=memory_format) for each in (layer, torch.randn(2, 4, 7, 9)))
    folded = layer.fold()
    assert folded.weight.dtype == torch.float32
    assert folded.weight.is_contiguous(memory_format=memory_format)
    assert_close(folded(x), layer(x), 1e-6)


def test_low_precision_layers_fold_with_kernels_rounded_once():
    layer = ACUConv2d(4, 6, (3, 2)).bfloat16()
    nn.init.uniform_(layer.offsets, -1, 1)
    exact = copy.deepcopy(layer).double().fold()
    assert torch.equal(layer.fold().weight, exact.weight.bfloat16())


GEOMETRIES = [
    ((3, 2), (2, 1), (1, 0), (2, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (12, 12), (12, 12)),
    ((1, 5), (1, 2), (3, 2), (1, 1)),
    ((7, 3), (2, 2), (0, 4), (1, 3)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
]


@pytest.mark.parametrize(("kernel_size", "stride", "padding", "dilation"), GEOMETRIES, ids=str)
def test_taps_rounded_back_to_the_grid_fold_into_the_original_convolution(kernel_size, stride, padding, dilation):
    plain = nn.Conv2d(4, 6, kernel_size, stride, padding, dilation, groups=2)
    layer = ACUConv2d.from_conv2d(plain, position_groups=3)
    nn.init.uniform_(layer.offsets, -0.49, 0.49)
    folded = layer.round_().fold()
    assert type(folded) is nn.Conv2d
    assert repr(folded) == repr(plain)
    assert torch.equal(folded.weight, plain.weight)
    assert torch.equal(folded.bias, plain.bias)


def test_taps_rounded_onto_a_dilated_grid_are_found_again():
    plain = nn.Conv2d(2, 4, 3, padding=2, dilation=2)
    layer = ACUConv2d(2, 4, 3, padding=1)
    with pytest.warns(UserWarning, match="of a plain model"):
        layer.load_state_dict(plain.state_dict())
    outwards = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2))  # from the 3x3 to every other pixel
    layer.offsets.data.copy_(outwards.flatten())
    folded = layer.fold()
    assert repr(folded) == repr(plain)
    assert torch.equal(folded.weight, plain.weight)


def test_taps_that_meet_add_up():
    layer = ACUConv2d(1, 1, (1, 3), padding=(0, 1), fixed_centre=False)
    layer.offsets.data.copy_(torch.tensor([0, 1, 0, 0, 0, -1.0]))  # both neighbours onto the centre
    folded = layer.fold()
    assert (folded.kernel_size, folded.padding) == ((1, 1), (0, 0))
    assert torch.equal(folded.weight.flatten(), layer.weight.double().sum((2, 3)).float().flatten())


@pytest.mark.parametrize("place", [(-5.0, -7.0), (-6.25, -4.5), (3.5, 9.75), (5.5, -5.25)], ids=str)
def test_a_single_tap_far_from_the_output_pixel_folds(place):
    layer = ACUConv2d.from_positions(2, 3, [place], (2, 1), backend="reference", dtype=torch.float64)
    x = torch.randn(2, 2, 9, 12, dtype=torch.float64)
    assert_close(layer.fold()(x), layer(x))


def test_taps_far_apart_fold_into_small_convolutions():
    layer = ACUConv2d(3, 4, 3, padding=24, dilation=24, dtype=torch.float64)
    nn.init.uniform_(layer.offsets, 0.1, 0.9)
    folded, x = layer.fold(), torch.randn(1, 3, 31, 40, dtype=torch.float64)
    assert type(folded) is FoldedConv2d
    assert [conv.kernel_size for conv in folded.convs] == [(2, 2)] * 9
    assert [conv.bias is not None for conv in folded.convs] == [True] + [False] * 8
    assert_close(folded(x), layer(x))
    assert "sides=" in repr(folded)


@pytest.mark.parametrize("mode", MODES[1:])
def test_other_padding_modes_keep_their_border(mode):
    layer = ACUConv2d(2, 4, (3, 2), (2, 1), (2, 1), padding_mode=mode, dtype=torch.float64)
    nn.init.uniform_(layer.offsets, -2, 2)
    folded, x = layer.fold(), torch.randn(2, 2, 5, 4, dtype=torch.float64)
    kinds = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "circular": nn.CircularPad2d}
    assert type(folded.pad) is kinds[mode]
    assert folded.pad.padding == (1, 1, 2, 2)
    for image in (x, x[0]):
        assert_close(folded(image), layer(image))
    layer.reset_parameters()
    folded = layer.fold()
    assert (type(folded), folded.padding_mode, folded.kernel_size) == (nn.Conv2d, mode, (3, 2))
    assert_close(folded(x), layer(x))


def small():
    return ACUConv2d(4, 6, (3, 2), padding=1)


def scattered():
    return ACUConv2d(4, 6, 3, padding=9, dilation=9)


@pytest.mark.parametrize("make", [small, scattered])
def test_folding_leaves_the_layer_as_it_was(make):
    layer, x = make(), torch.randn(2, 4, 7, 9)
    nn.init.uniform_(layer.offsets, -1, 1)
    before, y = copy.deepcopy(layer.state_dict()), layer(x)
    for parameter in layer.fold().parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("make", [small, scattered])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_fold_keeps_mode_and_requires_grad(make, frozen):
    layer = make().eval()
    nn.init.uniform_(layer.offsets, -1, 1)
    getattr(layer, frozen).requires_grad_(False)
    folded = layer.fold()
    assert not any(module.training for module in folded.modules())
    first, *others = plain_parts(folded)
    assert (first.weight.requires_grad, first.bias.requires_grad) == (frozen == "bias", frozen == "weight")
    assert all(conv.weight.requires_grad == first.weight.requires_grad and conv.bias is None for conv in others)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("make", [small, scattered])
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_folds_can_be_copied_and_loaded(make, clone):
    layer, x = make(), torch.randn(2, 4, 7, 9)
    nn.init.uniform_(layer.offsets, -1, 1)
    folded = layer.fold()
    twin = clone(folded)
    assert torch.equal(twin(x), folded(x))
    other = make()
    other.offsets.data.copy_(layer.offsets)
    twin = other.fold()
    twin.load_state_dict(folded.state_dict())
    assert torch.equal(twin(x), folded(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_positions_that_are_not_finite_cannot_be_folded(bad):
    layer = ACUConv2d(2, 4, 3)
    layer.offsets.data[:3] = bad
    with pytest.raises(ValueError, match=r"positions are not finite: tap 0, tap 1; the training has diverged"):
        layer.fold()


def test_the_fixed_tap_is_folded_at_its_place_whatever_is_stored():
    layer = ACUConv2d(2, 4, 3, padding=1)
    layer.offsets.data[8:10] = torch.nan
    assert torch.equal(layer.fold().weight, layer.weight)


def test_a_fold_without_a_bias_has_none():
    assert ACUConv2d(2, 4, 3, bias=False).fold().bias is None
    assert "bias" not in "".join(ACUConv2d(2, 4, 3, bias=False, dilation=9).fold().state_dict())


def test_any_shape_folds():
    taps = [(0.5, -2.25), (-1.5, 0.0), (3.0, 1.75), (0.0, 0.0)]
    layer = ACUConv2d.from_positions(2, 4, taps, (2, 1), position_groups=2, dtype=torch.float64)
    x = torch.randn(2, 2, 7, 9, dtype=torch.float64)
    assert_close(layer.fold()(x), layer(x))


def test_a_tap_far_beside_the_image_costs_no_memory():
    layer = ACUConv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        layer.offsets[0], layer.offsets[3] = 1e6, -3e5
    folded, x = layer.fold(), torch.randn(1, 1, 5, 8)
    assert_close(folded(x), layer(x), 1e-6)
    assert all(pad_or_crop(x, sides).numel() < 200 for sides in folded.sides)
