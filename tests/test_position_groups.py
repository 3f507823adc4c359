"""position_groups="channels": one set of positions for each channel of a depthwise layer, from layer to file."""

import copy
import warnings

import pytest
import torch
from helpers.oracle import acu_conv2d_loops, assert_close
from torch import nn

from lightning_acu import ACUConv2d, acu_conv2d, acu_layers, convert_to_acu, create_model, fold_acu, load_acu, save_acu
from lightning_acu.callbacks import ConvertToACU
from lightning_acu.expansion import expand_kernel, expand_kernel_backward, plan_windows
from lightning_acu.geometry import ConvGeometry, resolve_padding
from lightning_acu.ops import backends
from lightning_acu.surgery import Activation, ConvertConfig, NoEffectWarning, activate, report_acu

BACKENDS = ["reference", "dense", "cython", "auto"]

#: Every one tells rows from columns.
CONFIGURATIONS = [
    {"kernel_size": (3, 5), "padding": (1, 2)},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1), "dilation": (2, 1)},
    {"kernel_size": (2, 4), "padding": "same"},
    {"kernel_size": (5, 3), "stride": (1, 3), "padding": (3, 0)},
    {"kernel_size": (1, 4), "padding": "same", "dilation": (1, 2)},
]


def depthwise(multiplier=1, spread=1.5, **configuration):
    own = {"position_groups": "channels", "fixed_centre": False, "dtype": torch.float64}
    layer = ACUConv2d(3, 3 * multiplier, groups=3, **own, **configuration)
    nn.init.uniform_(layer.offsets, -spread, spread)
    return layer


def loops(layer, image):
    """The layer by the independent oracle; four sides of padding are zeros around the image."""
    top, left, bottom, right = layer.geometry.padding
    padded = nn.functional.pad(image, (left, right, top, bottom))
    parameters = layer.weight.detach(), layer.offsets.detach().view(3, -1, 2), layer.bias.detach()
    return acu_conv2d_loops(padded, *parameters, layer.geometry.stride, (0, 0), layer.geometry.dilation, 3)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_every_channel_has_its_own_positions(configuration, backend, multiplier):
    layer = depthwise(multiplier, backend=backend, **configuration)
    assert layer.position_groups == 3  # the attribute is a number
    assert layer.offsets.numel() == 3 * layer.geometry.taps * 2
    image = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    assert_close(layer(image), loops(layer, image))


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("spread", [1.5, 5.0])
def test_it_folds_into_one_depthwise_convolution(configuration, spread):
    layer, image = depthwise(spread=spread, **configuration), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    folded = layer.fold()
    parts = [folded] if isinstance(folded, nn.Conv2d) else list(folded.convs)  # (a sum of one where sides differ)
    assert [part.groups for part in parts] == [3]
    assert_close(folded(image), loops(layer, image), 1e-10)


@pytest.mark.parametrize("backend", ["dense", "cython"])
@pytest.mark.parametrize("whole", [False, True])
def test_gradients_equal_those_of_the_formula(backend, whole):
    image, weight = torch.randn(2, 5, 6, 7).double(), torch.randn(10, 1, 3, 2).double()
    offsets = torch.randn(5, 6, 2).double() * 2
    tensors = [image, weight, offsets.round() if whole else offsets]
    direction = torch.randn(2, 10, 3, 6).double()
    grads = []
    for name in ("reference", backend):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = acu_conv2d(*leaves, None, (2, 1), (1, 0), groups=5, backend=name)
        grads.append(torch.autograd.grad(output, leaves, direction))
    for ours, expected in zip(grads[1], grads[0], strict=True):
        assert_close(ours, expected)


def test_auto_takes_the_compiled_kernels_unless_the_taps_form_a_plain_convolution():
    image, geometry = torch.randn(2, 8, 9, 9), ConvGeometry((3, 3), (1, 1), (1,) * 4, (1, 1), 8)
    weight, offsets = torch.randn(8, 1, 3, 3), torch.rand(8, 9, 2)

    def chosen(offsets, needs=None):
        module = backends._select("auto", image, weight, offsets, geometry, needs)
        return next(name for name, backend in backends.BACKENDS.items() if backend is module)

    assert chosen(offsets) == "cython"
    assert chosen(offsets, (True, True, True)) == "cython"
    assert chosen(torch.zeros_like(offsets)) == "dense"
    apart = torch.zeros_like(offsets)
    apart[3, 0, 1] = -1  # one tap of one channel is beside the 3x3 of all others
    assert chosen(apart) == "cython"
    assert chosen(torch.tensor([0.0, 1.0]).expand(8, 9, 2).contiguous()) == "cython"  # unequal padding
    swapped = torch.zeros_like(offsets)
    swapped[2, 0], swapped[2, 8] = 2, -2  # within it: another plain kernel
    assert chosen(swapped) == "dense"


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_a_kernel_is_expanded_weight_by_weight_as_by_a_matrix(inputs):
    """Few weights a position group take another way; both against the definition, in loops."""
    geometry = ConvGeometry((2, 3), (1, 1), resolve_padding((1, 0), (2, 3), (1, 1), (1, 1)), (1, 1), 4)
    weight, offsets = torch.randn(8, inputs, 2, 3).double(), torch.randn(4, 6, 2).double()
    plan = plan_windows(offsets, geometry, gradient=True)
    (window,) = plan.windows
    expected = torch.zeros(8, inputs, window.height, window.width).double()
    leaves = weight.clone().requires_grad_(), offsets.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    direction = torch.randn(8, inputs, window.height, window.width).double()
    for channel in range(8):
        for tap, (row, column) in enumerate(geometry.grid()):
            place = torch.tensor([row - window.top, column - window.left])
            y, x = (offsets[channel // 2, tap] + place).tolist()
            dy, dx = leaves[1][channel // 2, tap] - offsets[channel // 2, tap]  # zeros with a gradient
            for r in range(window.height):
                for s in range(window.width):
                    if abs(y - r) < 1 and abs(x - s) < 1:
                        share = (1 - abs(y - r)) * (1 - abs(x - s))
                        expected[channel, :, r, s] += share * weight[channel, :, tap // 3, tap % 3]
                        sign = -1 if y > r else 1, -1 if x > s else 1
                        live = (1 - abs(y - r) + sign[0] * dy) * (1 - abs(x - s) + sign[1] * dx)
                        weights = leaves[0][channel, :, tap // 3, tap % 3]
                        total = total + (live * weights * direction[channel, :, r, s]).sum()
    assert_close(expand_kernel(weight, offsets, plan).view_as(expected), expected)
    ours = expand_kernel_backward(weight, offsets, plan, direction.flatten(2))
    for gradient, wanted in zip(ours, torch.autograd.grad(total, leaves), strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ACUConv2d(4, 8, 3, position_groups="channels"), r"`groups` \(=1\).* its `in_channels` \(=4\)"),
        (lambda: ACUConv2d(4, 8, 3, groups=2, position_groups="channels"), r"\(='channels'\) needs a depthwise"),
        (lambda: ACUConv2d(4, 4, 3, groups=4, position_groups="channel"), r"\(='channel'\).*or be 'channels'"),
        (lambda: ACUConv2d(4, 4, 3, groups=4, position_groups=2.0), r"`position_groups` \(=2.0\)"),
        (lambda: ACUConv2d.adopt(nn.Conv2d(4, 8, 3), position_groups="channels"), "needs a depthwise"),
        (lambda: ACUConv2d.from_positions(2, 4, [(0, 1)], position_groups="channels"), "needs a depthwise"),
        (
            lambda: activate(net := nn.Sequential(nn.Conv2d(2, 4, 3)), {net[0]: Activation("channels")}),
            r"the `groups` of 0 \(=1\).*or exclude it",
        ),
    ],
)
def test_it_needs_a_depthwise_layer(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_layers_made_from_others():
    plain = nn.Conv2d(4, 8, (3, 5), groups=4)
    assert ACUConv2d.from_conv2d(plain, position_groups="channels").position_groups == 4
    assert ACUConv2d.adopt(plain, position_groups="channels").offsets.numel() == 4 * 15 * 2
    free = ACUConv2d.from_positions(3, 3, [(0, 1), (2, 0.5)], groups=3, position_groups="channels")
    assert free.positions.tolist() == [[[0, 1], [2, 0.5]]] * 3


def small():
    """A dense stem, a depthwise and a grouped layer, and one that no rule can convert."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2), groups=4),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=8)),
    )
    return net.double()


def test_conversion_skips_what_is_not_depthwise_with_a_reason():
    net, image = small(), torch.randn(1, 3, 9, 9, dtype=torch.float64)
    expected = net(image)
    with pytest.warns(NoEffectWarning, match="3 of 4 selected.*2 because: position_groups='channels' needs"):
        convert_to_acu(net, kernel_sizes=[3, (3, 5)], position_groups="channels")
    assert [(name, layer.position_groups) for name, layer in acu_layers(net)] == [("1", 4)]
    assert torch.equal(net(image), expected)
    reasons = {row.name: row.reason for row in report_acu(net).skipped}
    assert reasons["0"] == reasons["2"] == "position_groups='channels' needs a depthwise convolution"
    assert "parametrized" in reasons["3"]
    with pytest.warns(NoEffectWarning, match="1 of 3 selected"):
        convert_to_acu(net)  # and the rest, with one set each
    assert [(name, layer.position_groups) for name, layer in acu_layers(net)] == [("0", 1), ("1", 4), ("2", 1)]


def test_conversion_may_refuse_what_is_not_depthwise():
    net = small()
    with pytest.raises(ValueError, match="these cannot be converted: 0: position_groups='channels' needs a depthwise"):
        convert_to_acu(net, position_groups="channels", on_unsupported="error")
    assert not any(acu_layers(net))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_acu(net, kernel_sizes=[(3, 5)], position_groups="channels", on_unsupported="error")
    with pytest.warns(NoEffectWarning, match="converted nothing.*needs a depthwise convolution"):
        convert_to_acu(nn.Conv2d(3, 4, 3), position_groups="channels")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_it_is_saved_and_folded(tmp_path, suffix):
    model = create_model("test_efficientnet", num_classes=3).eval()
    convert_to_acu(model, position_groups="channels", filter_fn=lambda conv, _: conv.groups > 1)
    convert_to_acu(model)
    assert {layer.position_groups for _, layer in acu_layers(model) if layer.groups == 1} == {1}
    assert all(layer.position_groups == layer.in_channels for _, layer in acu_layers(model) if layer.groups > 1)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    save_acu(model, tmp_path / f"model{suffix}")
    loaded, image = load_acu(tmp_path / f"model{suffix}"), torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(image), model(image))
    model, image = copy.deepcopy(model).double(), image.double()
    expected = model(image)
    assert_close(fold_acu(model, image)(image), expected, 1e-10)


def test_callbacks_and_configurations_take_it():
    assert ConvertToACU(position_groups="channels").config.position_groups == "channels"
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    ConvertConfig(position_groups="channels").apply(net)
    assert net[0].position_groups == 4
