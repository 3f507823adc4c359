"""ACUConv2d, the module: what it computes and how it is made."""

import math

import pytest
import torch
from helpers.layers import CROSS, RING, TAPS_24, asymmetric, perturbed
from helpers.oracle import acu_conv2d_loops, assert_close
from torch import nn
from torch.nn.utils import prune

from lightning_acu import ACUConv2d


@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "bias": False},
        {"kernel_size": 1, "stride": 3},
        {"kernel_size": (2, 4), "padding": (3, 1), "groups": 2},
        {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": (3, 5), "padding": "valid", "stride": (1, 2)},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": (3, 1), "padding": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": (1, 3), "padding": (1, 2), "padding_mode": "replicate", "stride": 2},
        {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
        {"kernel_size": (3, 2), "padding": (2, 1), "padding_mode": "circular", "groups": 2},
        {"kernel_size": 3, "padding": 6, "dilation": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["NCHW", "channels_last", "CHW", "empty batch"])
def test_zero_offsets_compute_what_conv2d_does_bit_for_bit(arguments, form):
    plain = nn.Conv2d(4, 8, **arguments)
    active = ACUConv2d(4, 8, **arguments)
    with pytest.warns(UserWarning, match="of a plain model"):
        active.load_state_dict(plain.state_dict())
    x = torch.randn(0 if form == "empty batch" else 2, 4, 7, 9)
    if form == "channels_last":
        x, plain, active = (each.to(memory_format=torch.channels_last) for each in (x, plain, active))
    x = x[0] if form == "CHW" else x
    expected, actual = plain(x), active(x)
    reordered = form == "channels_last" and plain.padding_mode == "circular"  # F.pad makes NCHW of it: sums differ
    assert_close(actual, expected, 1e-6 if reordered else 0)
    assert actual.stride() == expected.stride() or not actual.numel()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says that it copies the image
def test_zero_offsets_with_uneven_same_padding_compute_what_conv2d_does():
    plain = nn.Conv2d(4, 8, (4, 2), padding="same", dilation=(1, 3), dtype=torch.float64)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    assert_close(ACUConv2d.from_conv2d(plain)(x), plain(x))


def test_each_position_group_moves_its_own_output_channels():
    layer, x = asymmetric(dtype=torch.float64, fixed_centre=False)
    geometry = {"stride": (2, 1), "padding": (1, 0), "dilation": (2, 1), "groups": 2}
    parameters = layer.weight.detach(), layer.active_offsets().detach(), layer.bias.detach()
    assert_close(layer(x), acu_conv2d_loops(x, *parameters, **geometry))


def test_fixed_centre_gets_no_gradient_and_ignores_what_is_stored():
    layer, x = perturbed(ACUConv2d(2, 4, (3, 5), position_groups=2)), torch.randn(2, 2, 8, 9)
    layer(x).square().sum().backward()
    moved = layer.offsets.grad.view(2, 15, 2).ne(0).all(-1).all(0)
    assert moved.tolist() == layer.movable.tolist() == [tap != 7 for tap in range(15)]
    before = layer(x)
    with torch.no_grad():
        layer.offsets.view(2, 15, 2)[:, 7] = torch.nan
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.positions[:, 7], torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("kernel_size", "fixed_centre", "movable"), [(3, True, 8), (3, False, 9), ((3, 2), True, 6), ((1, 1), True, 0)]
)
def test_only_the_centre_of_an_odd_kernel_is_fixed(kernel_size, fixed_centre, movable):
    assert ACUConv2d(1, 1, kernel_size, fixed_centre=fixed_centre).movable.sum() == movable


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("positions", [CROSS, RING, TAPS_24], ids=["cross", "ring", "24 taps"])
def test_from_positions_reads_the_image_where_it_was_told(positions, stride):
    layer = ACUConv2d.from_positions(2, 3, positions, stride, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    weight, taps = layer.weight.detach(), torch.tensor(positions, dtype=torch.float64)[None]
    # A grid of dilation 0 is one point, the output pixel, from which the positions count.
    expected = acu_conv2d_loops(x, weight, taps, layer.bias.detach(), stride, (0, 0), (0, 0), 1)
    assert_close(layer(x), expected)
    assert tuple(expected.shape[2:]) == (math.ceil(5 / stride[0]), math.ceil(8 / stride[1]))
    assert torch.equal(layer.positions, taps)
    assert not layer.displacement.any()


def test_from_positions_keeps_a_tap_given_at_the_centre_there():
    plus = [(-1.0, 0.0), (0.0, -1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    layer = ACUConv2d.from_positions(1, 2, plus, position_groups=2)
    assert layer.movable.tolist() == [True, True, False, True, True]
    nn.init.constant_(layer.offsets, 0.25)
    assert torch.equal(layer.positions[1, :, 0], torch.tensor([0.25, 0.25, 0, 0.25, 0.25]))
    assert torch.equal(layer.displacement[0, 0], torch.tensor([1.25, 0.25]))
    assert ACUConv2d.from_positions(1, 2, plus, fixed_centre=False).movable.all()


def test_positions_are_counted_from_the_centre_of_the_kernel():
    layer = ACUConv2d(1, 2, (3, 2), dilation=(2, 3), position_groups=2)
    nn.init.constant_(layer.offsets.view(2, 6, 2)[0, :3], 0.5)
    grid = torch.tensor([[-2, -1.5], [-2, 1.5], [0, -1.5], [0, 1.5], [2, -1.5], [2, 1.5]])
    assert torch.equal(layer.positions[1], grid)
    assert torch.equal(layer.positions[0, :3], grid[:3] + 0.5)
    assert torch.equal(layer.displacement[0], torch.tensor([[0.5, 0.5]] * 3 + [[0.0, 0.0]] * 3))


def test_round_moves_every_tap_to_the_nearest_whole_pixel_in_place():
    layer = ACUConv2d(1, 1, 2)
    stored = layer.offsets
    stored.data.copy_(torch.tensor([0.4, -0.6, 1.5, 2.5, -2.51, 3.0, 0.0, -0.2]))
    assert layer.round_() is layer
    assert layer.offsets is stored
    assert stored.tolist() == [0, -1, 2, 2, -3, 3, 0, 0]


def test_resetting_the_parameters_puts_the_taps_back_where_they_started():
    grid, ring = perturbed(ACUConv2d(1, 1, 3)), perturbed(ACUConv2d.from_positions(1, 1, RING, position_groups=1))
    for layer in (grid, ring):
        layer.reset_parameters()
        assert not layer.displacement.any()


def test_from_conv2d_shares_the_parameters_and_leaves_the_original_alone():
    plain = nn.Conv2d(4, 6, (3, 2), (2, 1), "valid", (2, 1), groups=2).eval()
    active = ACUConv2d.from_conv2d(plain, position_groups=3, fixed_centre=False, backend="dense")
    assert type(plain) is nn.Conv2d
    assert list(dict(plain.named_parameters())) == ["weight", "bias"]
    assert active.weight is plain.weight
    assert active.bias is plain.bias
    assert not active.training
    assert (active.position_groups, active.fixed_tap, active.backend) == (3, None, "dense")
    x = torch.randn(2, 4, 7, 9)
    assert torch.equal(active(x), plain(x))


def test_adopting_keeps_the_module_its_parameters_its_hooks_and_its_mode():
    conv, seen = nn.Conv2d(2, 4, 3, bias=False).eval(), []
    conv.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    weight = conv.weight
    active = ACUConv2d.adopt(conv, position_groups=2)
    active(torch.randn(1, 2, 5, 6))
    assert active is conv
    assert active.weight is weight
    assert active.bias is None
    assert not active.training
    assert seen == [ACUConv2d]
    assert [name for name, _ in active.named_parameters()] == ["weight", "offsets"]


@pytest.mark.parametrize("make", [ACUConv2d.from_conv2d, ACUConv2d.adopt])
def test_what_is_not_exactly_a_plain_convolution_is_refused(make):
    class Other(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match=r"Other.*exactly a Conv2d"):
        make(Other(1, 1, 3))


def test_a_weight_that_is_recomputed_from_others_cannot_be_shared():
    normed = prune.identity(nn.Conv2d(1, 1, 3), "weight")  # as weight norm and spectral norm, in a hook
    with pytest.raises((TypeError, ValueError), match="weight"):
        ACUConv2d.from_conv2d(normed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ACUConv2d(2, 4, 3, position_groups=3), r"`position_groups` \(=3\) must divide `out_channels` \(=4\)"),
        (lambda: ACUConv2d(2, 4, 3, position_groups=0), r"`position_groups` \(=0\)"),
        (lambda: ACUConv2d.adopt(nn.Conv2d(2, 4, 3), position_groups=5), r"`position_groups` \(=5\)"),
        (lambda: ACUConv2d(2, 4, 3, backend="fast"), r"`backend` \(='fast'\) is unknown.*dense"),
        (lambda: ACUConv2d.from_positions(2, 4, CROSS, backend="fast"), "`backend`"),
        (lambda: ACUConv2d.from_positions(2, 4, CROSS, position_groups=3), "`position_groups`"),
        (lambda: ACUConv2d.from_positions(2, 4, [[0.0, 1.0, 2.0]]), r"`positions`.*\(K, 2\).*\(1, 3\)"),
        (lambda: ACUConv2d.from_positions(2, 4, torch.zeros(2, 4, 2)), r"\(2, 4, 2\)"),
        (lambda: ACUConv2d.from_positions(2, 4, torch.zeros(0, 2)), r"K >= 1"),
        (lambda: ACUConv2d.from_positions(2, 4, [[0.0, math.nan]]), "`positions`.*finite"),
        (lambda: ACUConv2d.from_positions(2, 4, [[math.inf, 0.0]]), "`positions`.*finite"),
    ],
)
def test_errors_name_the_argument_and_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_refused_adoption_leaves_a_plain_convolution():
    conv = nn.Conv2d(2, 4, 3)
    with pytest.raises(ValueError, match="backend"):
        ACUConv2d.adopt(conv, backend="fast")
    assert type(conv) is nn.Conv2d
    assert "offsets" not in conv.state_dict()


def test_repr_says_what_differs_from_a_plain_convolution():
    assert repr(ACUConv2d(2, 4, 3, padding=1)) == "ACUConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))"
    text = repr(ACUConv2d(2, 4, 3, position_groups=2, fixed_centre=False, backend="dense"))
    assert text.endswith("stride=(1, 1), position_groups=2, fixed_centre=False, backend='dense')")
    ring = ACUConv2d.from_positions(2, 4, RING, 2, groups=2, bias=False)
    assert repr(ring) == "ACUConv2d(2, 4, taps=8, stride=(2, 2), groups=2, bias=False)"


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 4)])
@pytest.mark.parametrize("dilation", [1, 6])
def test_zero_offsets_are_exact_also_where_the_kernel_is_larger_than_the_image(size, dilation):
    plain, x = nn.Conv2d(64, 64, 3, padding=dilation, dilation=dilation), torch.randn(2, 64, *size)
    assert torch.equal(ACUConv2d.from_conv2d(plain)(x), plain(x))


def test_a_layer_from_one_without_bias_folds():
    layer = perturbed(ACUConv2d.from_conv2d(nn.Conv2d(2, 3, 3, bias=False)))
    x = torch.randn(1, 2, 7, 6)
    assert_close(layer.fold()(x), layer(x), 1e-6)
    assert layer.fold().bias is None


def test_a_frozen_convolution_stays_frozen():
    conv = nn.Conv2d(2, 3, 3).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in ACUConv2d.adopt(conv).parameters())
