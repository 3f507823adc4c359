"""Rounding to plain dilated grids: the nearest one, and folds that have exactly the plain price."""

import copy
import pickle

import pytest
import timm
import torch
from helpers.oracle import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from lightning_acu import (
    ACUConv2d,
    FoldedConv2d,
    acu_layers,
    convert_to_acu,
    fold_acu,
    load_acu,
    report_acu,
    round_acu,
    save_acu,
)
from lightning_acu.forms import FORMS
from lightning_acu.grid_fold import SplitConv2d
from lightning_acu.surgery import fold_rule

#: Torch's, of the plain convolution too, where "same" pads the sides differently.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

MODES = ["zeros", "reflect", "replicate", "circular"]


@st.composite
def layers(draw):
    """Any layer with a grid, taps near and far; it runs the formula, not what the fold uses."""
    torch.manual_seed(draw(st.integers(0, 999)))
    stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    layer = ACUConv2d(
        4,
        8,
        draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        stride,
        draw(st.just("same") | st.just(0))
        if stride == (1, 1)
        else draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        groups=draw(st.sampled_from([1, 2, 4])),
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(MODES)),
        dtype=torch.float64,
        position_groups=draw(st.sampled_from([1, 2, 4, 8])),
        fixed_centre=draw(st.booleans()),
        backend="reference",
    )
    assume(layer.geometry.taps > 1 or layer.fixed_tap is not None)
    (kh, kw), scale = layer.kernel_size, 1 + 1.5 * torch.rand(layer.position_groups, 1, 2, dtype=torch.float64)
    centred = torch.tensor([(i - (kh - 1) / 2, j - (kw - 1) / 2) for i in range(kh) for j in range(kw)])
    apart = centred * torch.tensor(layer.dilation) * (scale - 1 - draw(st.sampled_from([0.0, 0.6])))
    noise = draw(st.sampled_from([0.1, 0.8])) * torch.randn(apart.shape, dtype=torch.float64)
    layer.offsets.data.copy_((apart + noise).flatten())
    return layer


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(layers(), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_layers_on_dilated_grids_fold_into_convolutions_of_the_original_size(layer, height, width, batched):
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    x = torch.randn(2, 4, height + (kh - 1) * dh + 3, width + (kw - 1) * dw + 3, dtype=torch.float64)
    x = x if batched else x[0]
    folded = layer.round_(to="dilation").fold()
    assert_close(folded(x), layer(x))
    convs = [folded] if isinstance(folded, nn.Conv2d) else list(folded.convs)
    assert all(type(conv) is nn.Conv2d and conv.kernel_size == layer.kernel_size for conv in convs)
    assert sum(conv.weight.numel() for conv in convs) == layer.weight.numel()
    assert len({conv.dilation for conv in convs}) == len(set(layer.grid_dilations))


def nearest(places, size, own, sides):
    """The dilation of one axis whose grid is nearest to ``places`` (pixels from the first grid point), by trying all.

    ``sides`` is the padding; each dilation pads further so that the output keeps its size, as evenly as possible.
    """
    costs = {}
    for dilation in range(1, 40):
        growth = (dilation - own) * (size - 1)
        firsts = [growth // 2, -(-growth // 2)]  # the smaller, by which the odd pixel goes to the end, comes first
        first = min(firsts, key=lambda first: abs((sides[0] + first) - (sides[1] + growth - first)))
        costs[dilation] = sum((place - (index * dilation - first)) ** 2 for index, place in places)
    return min(costs, key=costs.get)


@settings(max_examples=100, deadline=None)
@given(layers())
def test_the_dilations_are_those_of_the_nearest_grids(layer):
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    offsets = layer.active_offsets().tolist()
    top, left, bottom, right = layer.geometry.padding
    rows = [[(k // kw, k // kw * dh + dy) for k, (dy, _) in enumerate(taps)] for taps in offsets]
    columns = [[(k % kw, k % kw * dw + dx) for k, (_, dx) in enumerate(taps)] for taps in offsets]
    expected = [
        (
            nearest(own_rows, kh, dh, (top, bottom)) if kh > 1 else dh,
            nearest(own_columns, kw, dw, (left, right)) if kw > 1 else dw,
        )
        for own_rows, own_columns in zip(rows, columns, strict=True)
    ]
    assert layer.grid_dilations is None or layer.kernel_size == (1, 1)
    assert layer.round_(to="dilation").grid_dilations == expected
    before = layer.offsets.clone()
    assert torch.equal(layer.round_(to="dilation").offsets, before)  # it is where it stays
    assert torch.equal(layer.round_().offsets, before)  # on whole pixels


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, (2, 3)), (4, (3, 2)), ((2, 5), (2, 4))], ids=str)
def test_same_padding_becomes_that_of_the_dilated_convolution(kernel_size, dilation):
    layer = ACUConv2d(3, 4, kernel_size, padding="same", dtype=torch.float64, fixed_centre=False)
    plain = nn.Conv2d(3, 4, kernel_size, padding="same", dilation=dilation, dtype=torch.float64)
    plain.weight, plain.bias = layer.weight, layer.bias
    with torch.no_grad():  # each tap within half a pixel of where the plain one has it
        grid = torch.tensor([(i, j) for i in range(plain.kernel_size[0]) for j in range(plain.kernel_size[1])])
        before = [(d * (k - 1)) // 2 - (k - 1) // 2 for k, d in zip(plain.kernel_size, dilation, strict=True)]
        moved = grid * (torch.tensor(dilation) - 1) - torch.tensor(before)
        layer.offsets.copy_((moved + torch.rand(moved.shape, dtype=torch.float64) * 0.4 - 0.2).flatten())
    folded, x = layer.round_(to="dilation").fold(), torch.randn(2, 3, 13, 11, dtype=torch.float64)
    assert (type(folded), folded.dilation) == (nn.Conv2d, dilation)
    assert torch.equal(folded.weight, layer.weight)
    assert_close(folded(x), plain(x))
    assert_close(layer(x), plain(x))


def test_a_dilation_of_1_is_found_inside_a_dilated_layer():
    layer = ACUConv2d(2, 3, 3, dilation=3, dtype=torch.float64)
    positions = layer.positions[0] / 3 + 0.2 * torch.rand(9, 2, dtype=torch.float64)
    layer.offsets.data.copy_((positions - layer.positions[0]).flatten())
    folded, x = layer.round_(to="dilation").fold(), torch.randn(1, 2, 9, 8, dtype=torch.float64)
    assert type(folded) is FoldedConv2d  # which crops first: the output is as small as it was
    assert folded.sides == [(-2, -2, -2, -2)]
    assert_close(folded(x), F.conv2d(x[..., 2:-2, 2:-2], layer.weight, layer.bias))


def split(groups=1, dilations=(1, 2, 1, 3), **arguments):
    """A layer of 8 output channels and as many position groups as ``dilations``."""
    layer = ACUConv2d(8, 8, 3, padding=1, groups=groups, position_groups=len(dilations), **arguments)
    layer.offsets.data.copy_(((torch.tensor(dilations) - 1)[:, None, None] * layer.positions[0]).flatten())
    return layer


def moved_to(dilation, layer):
    """``layer`` with its taps on the grid of ``dilation``, exactly."""
    spacing = torch.tensor(dilation) / torch.tensor(layer.dilation) - 1
    layer.offsets.data.copy_((layer.positions * spacing).expand(layer.position_groups, -1, 2).flatten())
    layer.offsets.data.round_()
    assert set(layer.grid_dilations) == {dilation}
    return layer


@pytest.mark.parametrize(
    ("groups", "dilations", "convs"),
    [
        (1, (1, 2, 1, 3), 3),
        (2, (1, 2, 1, 3), 3),
        (4, (1, 2, 1, 3), 3),
        (8, (1, 2, 1, 3), 3),
        (8, (1, 2, 1, 3, 3, 2, 1, 3), 3),
        (2, (1, 1, 2, 2, 1, 2, 2, 2), 4),  # of each dilation 2 or 1, and 2 or 3 channels in the two conv groups
    ],
)
def test_position_groups_of_different_dilations_are_one_convolution_for_each(groups, dilations, convs):
    layer = split(groups, dilations, dtype=torch.float64)
    folded, x = layer.fold(), torch.randn(2, 8, 7, 9, dtype=torch.float64)
    assert type(folded) is SplitConv2d
    assert len(folded.convs) == convs
    for image in (x, x[0]):
        assert_close(folded(image), layer(image))
    assert report_acu(layer).folded_macs is None
    assert report_acu(layer).rows[0].folded_macs == report_acu(layer).rows[0].macs


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_split_folds_can_be_copied_loaded_and_traced(clone):
    layer, x = split(2), torch.randn(1, 8, 6, 7)
    model = nn.Sequential(layer, nn.BatchNorm2d(8))
    expected = model.eval()(x)
    fold_acu(model, x)
    assert model[0] is layer
    assert set(model.state_dict()) >= {"0.convs.0.weight", "0.convs.2.bias"}
    assert not any("inputs" in key or "places" in key for key in model.state_dict())
    twin = clone(model)
    assert torch.equal(twin(x), model(x))
    assert_close(model(x), expected, 1e-6)
    other = nn.Sequential(split(2), nn.BatchNorm2d(8)).eval()
    fold_acu(other).load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    assert_close(exported(x), expected, 1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", [torch.jit.script, fx.symbolic_trace], ids=["script", "fx"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: split(2, (1, 1, 2, 2, 1, 2, 2, 2)),  # parts of the input channels, in another order
        lambda: split(padding_mode="reflect"),
        lambda: moved_to((2, 3), ACUConv2d(8, 4, 3, padding="same")),
        lambda: moved_to((2, 2), ACUConv2d(8, 4, (3, 5), padding="same", dilation=3)),
    ],
    ids=["split", "split reflect", "same", "same inside"],
)
def test_folds_can_be_scripted_and_traced_by_fx(make, way):
    model = nn.Sequential(make().double(), nn.ReLU())
    images = [torch.randn(2, 8, *size, dtype=torch.float64) for size in [(9, 8), (13, 17)]]
    expected = [model(image) for image in images]
    found = way(fold_acu(model))
    for image, value in zip(images, expected, strict=True):
        assert_close(found(image), value)


def test_depthwise_layers_with_positions_of_each_channel():
    layer = ACUConv2d(6, 6, 3, padding=1, groups=6, position_groups="channels", dtype=torch.float64)
    apart = torch.tensor([[0.0, 1.1], [0.9, 0.0], [0.1, 0.9], [1.9, 2.2], [0.1, 0.1], [2.0, 2.0]])
    layer.offsets.data.copy_((apart[:, None] * layer.positions[0]).flatten())
    assert layer.round_(to="dilation").grid_dilations == [(1, 2), (2, 1), (1, 2), (3, 3), (1, 1), (3, 3)]
    folded, x = layer.fold(), torch.randn(2, 6, 7, 9, dtype=torch.float64)
    assert [conv.groups for conv in folded.convs] == [2, 1, 2, 1]
    assert_close(folded(x), layer(x))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_layers_that_compute_as_plain_are_saved_and_loaded(suffix, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    convert_to_acu(model, position_groups=1)
    layers = [layer for _, layer in acu_layers(model)]
    for layer in layers:
        moved_to((2, 1), layer)
    assert all(layer.compute_as_plain() for layer in layers)
    save_acu(model, path := tmp_path / f"model{suffix}")
    loaded = load_acu(path).eval()
    assert report_acu(loaded).dilations == report_acu(model).dilations == {n: (2, 1) for n, _ in acu_layers(model)}
    image = torch.randn(2, 3, 32, 40)
    assert_close(loaded(image), model(image), 1e-5)
    assert all(layer.compute_as_plain() for _, layer in acu_layers(loaded))
    assert torch.equal(loaded(image), model(image))
    assert torch.equal(fold_acu(loaded)(image), fold_acu(model)(image))


def test_folded_models_keep_their_face():
    model = nn.Sequential(ACUConv2d(2, 4, 3, padding=1), ACUConv2d(4, 6, (1, 1)))
    model[0].offsets.data.copy_((model[0].positions[0] * 1.1).flatten())
    fold_acu(round_acu(model, to="dilation"))
    assert (model[0].kernel_size, model[0].padding, model[0].dilation) == ((3, 3), (1, 1), (1, 1))
    assert "folded: kernel_size=(3, 3), padding=(2, 2), dilation=(2, 2)" in repr(model[0])
    assert type(model[1]) is nn.Conv2d


def test_shapes_without_a_grid_and_bad_arguments_are_refused():
    free = ACUConv2d.from_positions(2, 4, [(0.5, 1.0), (-1.0, 0.0)])
    near = ACUConv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"it has one tap, a shift, which no dilation keeps"):
        ACUConv2d(2, 4, 1, fixed_centre=False).round_(to="dilation")
    nn.init.uniform_(near.offsets, -0.4, 0.4)
    before = near.offsets.clone()
    with pytest.raises(ValueError, match=r"1: it has a free shape .*`to`='pixels'"):
        round_acu(nn.Sequential(near, free), to="dilation")
    assert torch.equal(near.offsets, before)
    assert free.grid_dilations is None
    with pytest.raises(ValueError, match=r"`to` \(='grid'\) must be 'pixels' or 'dilation'"):
        round_acu(near, to="grid")
    with pytest.raises(ValueError, match="on the meta device, without values to round with `to`='dilation'"):
        ACUConv2d(2, 2, 3, device="meta").round_(to="dilation")


def test_taps_at_the_edge_of_what_is_representable():
    layer = ACUConv2d(1, 1, 3, padding=1)
    layer.offsets.data.copy_((layer.positions[0] * 1e12).flatten())
    ((dilation, _),) = layer.round_(to="dilation").grid_dilations
    assert 2**19 - 3 < dilation < 2**19
    folded, x = layer.fold(), torch.randn(1, 1, 4, 5)
    assert_close(folded(x), layer(x), 1e-6)


def test_forms_of_a_fold_on_grids_of_several_dilations():
    layer, x = split(2), torch.randn(2, 8, 6, 7)
    expected = layer(x)
    assert type(layer.fold("auto")) is SplitConv2d
    single = layer.fold("single")
    assert type(single) is nn.Conv2d  # one convolution is what was asked for, at the price of a larger kernel
    assert max(single.kernel_size) > 3
    for form in FORMS:
        assert_close(layer.fold(form)(x), expected, 1e-5)
    counted = fold_rule.candidates(layer)
    assert type(counted["auto"]) is SplitConv2d
    assert all(parameter.is_meta for parameter in counted["auto"].parameters())
    assert fold_rule.cheapest_form(layer, ((x.to("meta"),), {}), None) == "auto"
