"""The dilations a model has learned, and plain models that are built with them."""

import json

import pytest
import timm
import torch
from torch import nn

from lightning_acu import ACUConv2d, apply_dilations, convert_to_acu, fold_acu, report_acu, round_acu


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 4, (3, 5), (2, 1), (1, 2), groups=2),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.Conv2d(6, 6, 1)),
        nn.Conv2d(6, 4, 3),
    )


#: Of the four kernels that are not 1x1.
FOUND = {"0": (2, 2), "1": (1, 2), "2.0": (1, 3), "3": (1, 1)}


def searched():
    """The network, active, with its taps near the dilations of FOUND."""
    model = convert_to_acu(network().double(), kernel_sizes=[3, (3, 5)])
    with torch.no_grad():
        for name, (dy, dx) in FOUND.items():
            layer = model.get_submodule(name)
            own = torch.tensor(layer.dilation)
            apart = layer.positions * (torch.tensor([dy, dx]) / own - 1) + 0.2 * torch.rand_like(layer.positions)
            layer.offsets.copy_(apart.flatten())
    return round_acu(model, to="dilation")


def test_what_was_found_computes_the_same_as_a_plain_model():
    model, x = searched(), torch.randn(2, 2, 15, 14, dtype=torch.float64)
    found = report_acu(model).dilations
    assert found == FOUND
    plain = apply_dilations(network().double(), json.loads(json.dumps(found)))
    assert [plain[1].padding, plain[2][0].padding, plain[3].padding] == [(1, 4), "same", (0, 0)]
    assert all(type(module) is nn.Conv2d for module in plain.modules() if not isinstance(module, nn.Sequential))
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)
    fold_acu(model, x)
    assert report_acu(model).dilations == found  # folded, it is still known
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-12)


def test_a_fractional_layer_and_plain_ones_have_no_dilation():
    model = searched()
    model[0].offsets.data[0] += 0.25
    assert set(report_acu(model).dilations) == {"1", "2.0", "3"}
    assert report_acu(fold_acu(model)).dilations.keys() == {"1", "2.0", "3"}
    assert report_acu(network()).dilations == {}


def test_position_groups_have_a_list_where_they_differ():
    layer = ACUConv2d(4, 4, 3, padding=1, position_groups=2)
    model = nn.Sequential(layer)
    assert report_acu(model).dilations == {"0": (1, 1)}
    layer.offsets.data[18:] = (layer.positions[0] * torch.tensor([1.0, 0.0])).flatten()
    assert report_acu(model).dilations == {"0": [(1, 1), (2, 1)]}
    assert report_acu(fold_acu(model)).dilations == {"0": [(1, 1), (2, 1)]}
    with pytest.raises(ValueError, match=r"'0' has different dilations for its position groups .*position_groups=1"):
        apply_dilations(nn.Sequential(nn.Conv2d(4, 4, 3)), {"0": [(1, 1), (2, 1)]})
    assert apply_dilations(nn.Sequential(nn.Conv2d(4, 4, 3)), {"0": [[2, 1], [2, 1]]})[0].dilation == (2, 1)


def test_a_fold_that_crops_is_known_too():
    layer = ACUConv2d(2, 2, 3, dilation=3)
    layer.offsets.data.copy_((layer.positions[0] * (1 / 3 - 1)).round().flatten())
    model = fold_acu(nn.Sequential(layer))
    assert report_acu(model).dilations == {"0": (1, 1)}


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "Conv2dSame"])
def test_classes_that_pad_by_themselves(name):
    cls = getattr(timm.layers, name)
    padding = {} if name.endswith("Same") else {"padding": 1}
    conv = cls(3, 4, 3, stride=2, **padding)
    x = torch.randn(1, 3, 17, 20)
    before = conv(x).shape
    apply_dilations(conv, {"": 3})
    assert conv.dilation == (3, 3)
    assert conv(x).shape == before
    assert conv(x).shape == (1, 4, 9, 10)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [1, "same"])
def test_other_padding_modes_pad_further_in_their_mode(mode, padding):
    conv = apply_dilations(nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode), {"": (2, 3)})
    plain = nn.Conv2d(2, 3, 3, padding=(2, 3), dilation=(2, 3), padding_mode=mode)
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(1, 2, 9, 8)
    assert torch.equal(conv(x), plain(x))


@pytest.mark.parametrize(
    ("dilations", "message"),
    [
        ({"conv": 2}, r"'conv' is not in the model; convolutions of the model: 0, 1, 2.0 and 4 more"),
        ({"2": 2}, r"'2' is a Sequential, not a plain convolution"),
        ({"1": 1, "0": (0, 1)}, r"that of '0' \(=\(0, 1\)\) must be \(dy, dx\), two whole numbers >= 1"),
        ({"0": (1, 1.5)}, r"that of '0'"),
        ({"0": (1, 2, 3)}, r"that of '0'"),
        ({"0": True}, r"that of '0'"),
        ({"0": "2"}, r"that of '0'"),
        ({"1": 2, "2.0": 1, "4": 1}, r"'4' cannot have \(1, 1\) .* padding of \(-1, -1, -1, -1\)"),
        ({"1": 2, "5": 2}, r"'5' cannot have \(2, 2\) .* padding of \(0, 0, 1, 1\)"),
    ],
)
def test_names_and_values_are_checked_before_anything_is_changed(dilations, message):
    model = network()
    model.append(nn.Conv2d(4, 4, 3, dilation=2))
    model.append(nn.Conv2d(4, 4, 2))
    before = repr(model)
    with pytest.raises(ValueError, match=message):
        apply_dilations(model, dilations)
    assert repr(model) == before


def test_active_and_folded_layers_are_not_plain():
    model = searched()
    with pytest.raises(ValueError, match="'0' is a ACUConv2d, not a plain convolution"):
        apply_dilations(model, {"0": 2})
    with pytest.raises(ValueError, match="'0' is a ReshapedConv2d, not a plain convolution"):
        apply_dilations(fold_acu(model), {"0": 2})
    with pytest.raises(TypeError, match=r"`dilations` \(=\(2, 2\)\) must map names"):
        apply_dilations(model, (2, 2))
    with pytest.raises(TypeError, match=r"`model` must be an nn\.Module"):
        apply_dilations({}, {})
