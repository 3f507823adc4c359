"""Active versions of timm's own convolution classes, against timm's formulas written out by hand."""

import copy
import pickle

import pytest
import torch
from helpers.oracle import acu_conv2d_loops, assert_close
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.padding import pad_same
from torch import nn
from torch.nn.utils import prune
from torchvision.ops import deform_conv2d

from lightning_acu import ACUConv2d, FoldedConv2d, convert_to_acu, fold_acu, round_acu, timm_convs
from lightning_acu.surgery import NoEffectWarning

ACTIVE = {
    Conv2dSame: timm_convs.ACUConv2dSame,
    StdConv2d: timm_convs.ACUStdConv2d,
    StdConv2dSame: timm_convs.ACUStdConv2dSame,
    ScaledStdConv2d: timm_convs.ACUScaledStdConv2d,
    ScaledStdConv2dSame: timm_convs.ACUScaledStdConv2dSame,
}
SAME = [Conv2dSame, StdConv2dSame, ScaledStdConv2dSame]

#: kernel_size, stride, dilation, groups, output channels (of 4): odd, even, not square, depthwise, a stride beyond it.
GEOMETRIES = [
    (3, 1, 1, 1, 6),
    (3, (2, 3), 1, 2, 6),
    (3, 4, 1, 4, 4),
    ((3, 5), (2, 1), (1, 2), 2, 6),
    (5, 2, 2, 4, 8),
    (5, (3, 4), 1, 1, 3),
    (4, 2, 1, 2, 6),
    (4, (1, 3), 2, 1, 3),
]
SIZES = [(13, 16), (16, 17)]

classes = pytest.mark.parametrize("cls", ACTIVE)
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def make(cls, geometry, bias=True, dtype=torch.float64):
    """A layer whose numbers all count, also gains and a large eps."""
    kernel_size, stride, dilation, groups, channels = geometry
    conv = cls(4, channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias).to(dtype)
    if hasattr(conv, "eps"):
        conv.eps = 1e-3
    if hasattr(conv, "gain"):
        nn.init.uniform_(conv.gain, 0.5, 2)
    return conv


def activate(conv, scale=0.0, **arguments):
    convert_to_acu(conv, kernel_sizes=[conv.kernel_size], **arguments)
    nn.init.uniform_(conv.offsets, -scale, scale)
    return conv


def image(size, dtype=torch.float64):
    return torch.randn(2, 4, *size, dtype=dtype)


def weight_by_hand(conv):
    """(C_out, C_in/groups, kh, kw): mean 0 and variance 1 over each output channel, then gain and 1/sqrt(fan-in)."""
    weight = conv.weight.detach()
    if type(conv) is Conv2dSame or isinstance(conv, timm_convs.ACUConv2dSame):
        return weight
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    weight = centred / (centred.square().mean((1, 2, 3), keepdim=True) + conv.eps).sqrt()
    return weight * conv.gain.detach() / conv.weight[0].numel() ** 0.5 if hasattr(conv, "gain") else weight


def padded(conv, x):
    """The image with all the zeros that timm adds around it."""
    if isinstance(conv, tuple(SAME)):
        return pad_same(x, conv.kernel_size, conv.stride, conv.dilation)
    return nn.functional.pad(x, [side for side in conv.padding[::-1] for _ in range(2)])


def deformed(conv, x):
    """The layer at its positions: the same offsets at every pixel, by torchvision, a position group at a time."""
    x, outputs = padded(conv, x), []
    size = [
        (n - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(x.shape[-2:], conv.kernel_size, conv.dilation, conv.stride, strict=True)
    ]
    for offsets in conv.active_offsets().detach():
        everywhere = offsets.reshape(1, -1, 1, 1).expand(len(x), -1, *size)
        outputs.append(deform_conv2d(x, everywhere, weight_by_hand(conv), conv.bias, conv.stride, 0, conv.dilation))
    return torch.cat([part.chunk(len(outputs), 1)[index] for index, part in enumerate(outputs)], 1)


@geometries
@classes
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_stay_when_timms_layers_become_active(cls, geometry, bias):
    plain = make(cls, geometry, bias)
    active = activate(copy.deepcopy(plain))
    assert type(active) is ACTIVE[cls]
    assert isinstance(active, cls)
    for size in SIZES:
        x, y = image(size).requires_grad_(), None
        for conv in (plain, active):
            conv.zero_grad()
            out = conv(x)
            y = torch.randn_like(out) if y is None else y
            out.backward(y)
            conv.seen = out.detach(), x.grad, [parameter.grad for parameter in conv.parameters()]
            x.grad = None
        assert_close(active.seen[0], plain.seen[0])
        assert_close(active.seen[1], plain.seen[1])
        *others, offsets = active.seen[2]
        assert len(others) == len(plain.seen[2])
        for got, expected in zip(others, plain.seen[2], strict=True):
            assert_close(got, expected)
        assert offsets.count_nonzero()


@geometries
@classes
def test_moved_taps_do_what_deform_conv2d_does_with_timms_weight(cls, geometry):
    groups = 2 if geometry[-1] % 2 == 0 else 3
    active = activate(make(cls, geometry), 1.7, position_groups=groups)
    for size in SIZES:
        x = image(size)
        assert_close(active(x), deformed(active, x).detach())
    assert_close(active(x[0]), deformed(active, x)[0].detach())


@classes
def test_moved_taps_do_what_the_loops_do(cls):
    active = activate(make(cls, ((3, 2), (2, 1), (1, 2), 2, 6)), 1.3, position_groups=3)
    x, offsets, bias = image((7, 6)), active.active_offsets().detach(), active.bias.detach()
    weight = weight_by_hand(active)
    assert_close(active(x), acu_conv2d_loops(padded(active, x), weight, offsets, bias, (2, 1), (0, 0), (1, 2), 2))


@geometries
@classes
@pytest.mark.parametrize("scale", [0.7, 2.5])
def test_a_fold_equals_the_layer_at_even_and_odd_sizes(cls, geometry, scale):
    active = activate(make(cls, geometry), scale)
    folded = active.fold()
    assert not isinstance(folded, ACUConv2d)
    for height in range(12, 18):
        x = image((height, 29 - height))
        assert_close(folded(x), active(x))
        assert_close(folded(x[0]), active(x[0]))


@geometries
@classes
def test_taps_back_on_the_grid_fold_into_a_layer_of_the_same_kernel(cls, geometry):
    plain = make(cls, geometry)
    folded = fold_acu(round_acu(activate(copy.deepcopy(plain), 0.49)))
    assert type(folded) is (Conv2dSame if getattr(plain, "same_pad", cls is Conv2dSame) else nn.Conv2d)
    for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(folded, name) == getattr(plain, name)
    assert_close(folded.weight.detach(), weight_by_hand(plain))
    if cls is Conv2dSame:
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in folded.state_dict().items())
        plain.load_state_dict(folded.state_dict())
    for size in SIZES:
        x = image(size)
        assert_close(folded(x), plain(x))


@pytest.mark.parametrize("cls", SAME)
@pytest.mark.parametrize(("stride", "kind"), [(2, Conv2dSame), (3, Conv2dSame), (4, FoldedConv2d)])
def test_a_fold_between_pixels_is_one_larger_layer_unless_the_stride_skips_pixels(cls, stride, kind):
    active = activate(make(cls, (3, stride, 1, 2, 6)), 0.9)
    folded = active.fold()
    assert type(folded) is kind
    assert (folded if kind is Conv2dSame else folded.convs[0]).kernel_size == (5, 5)
    for height in range(3, 18):
        x = image((height, 21 - height))
        assert_close(folded(x), active(x))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), [(3, 2, 1), (3, 3, 1), (5, 4, 1), (3, 2, 2), ((3, 5), 3, 1)]
)
@pytest.mark.parametrize("keep", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("cls", SAME)
def test_taps_drawn_together_fold_right_at_every_size(cls, kernel_size, stride, dilation, keep):
    active = activate(make(cls, (kernel_size, stride, dilation, 1, 3)), 0.0)
    with torch.no_grad():  # all rows, all columns, or both onto the middle: smaller kernels than before
        active.offsets.copy_((active.positions * (torch.tensor(keep) - 1)).flatten())
    folded = active.fold()
    for height in range(9, 15):
        x = image((height, 24 - height))
        assert_close(folded(x), active(x))


@classes
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_pickles_compute_the_same(cls, clone):
    active, x = activate(make(cls, (3, 2, 1, 2, 6)), 1.0, position_groups=2), image((9, 12))
    for layer in (active, active.fold()):
        assert type(clone(layer)) is type(layer)
        assert torch.equal(clone(layer)(x), layer(x))


@classes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_keeps_positions_in_float32(cls, dtype):
    active = activate(make(cls, (3, 2, 1, 2, 6), dtype=torch.float32), 1.0)
    offsets, x = active.offsets.detach().clone(), image((9, 12), dtype)
    active.to(dtype)
    assert (active.weight.dtype, active.offsets.dtype) == (dtype, torch.float32)
    assert torch.equal(active.offsets, offsets)
    assert active(x).dtype == active.fold()(x).dtype == dtype


@classes
def test_channels_last_computes_the_same(cls):
    active, x = activate(make(cls, (3, 2, 1, 2, 6)), 1.0), image((9, 12))
    expected, last = active(x), x.to(memory_format=torch.channels_last)
    active.to(memory_format=torch.channels_last)
    assert_close(active(last), expected)
    assert_close(active.fold()(last), expected)


@classes
def test_made_directly_they_take_timms_arguments(cls):
    torch.manual_seed(1)
    plain = cls(4, 6, 3, stride=2, bias=True, dtype=torch.float64)
    torch.manual_seed(1)
    active = ACTIVE[cls](4, 6, 3, stride=2, bias=True, dtype=torch.float64, position_groups=2, fixed_centre=False)
    x = image((9, 12))
    assert_close(active(x), plain(x))
    assert active.offsets.shape == (2 * 9 * 2,)
    assert active.movable.all()
    nn.init.uniform_(active.offsets, -1, 1)
    assert_close(active(x), deformed(active, x))
    active.reset_parameters()
    assert not active.offsets.any()
    with pytest.raises(ValueError, match=r"`position_groups` \(=4\)"):
        ACTIVE[cls](4, 6, 3, position_groups=4)


@classes
def test_from_conv2d_shares_parameters_and_leaves_the_original(cls):
    plain = make(cls, (3, 2, 1, 2, 6))
    active = ACTIVE[cls].from_conv2d(plain, position_groups=2)
    assert type(plain) is cls
    assert all(dict(active.named_parameters())[name] is p for name, p in plain.named_parameters())
    nn.init.uniform_(active.offsets, -1, 1)
    x = image((9, 12))
    assert_close(active(x), deformed(active, x))
    assert {key: v for key, v in vars(plain).items() if key[0] != "_"}.items() <= vars(active).items()


@classes
def test_each_takes_exactly_its_own_class(cls):
    for other in [nn.Conv2d, *ACTIVE]:
        if other is not cls:
            for take in (ACTIVE[cls].adopt, ACTIVE[cls].from_conv2d):
                with pytest.raises(TypeError, match=f"must be exactly a {cls.__name__}"):
                    take(other(4, 6, 3))
    with pytest.raises(TypeError, match="use ACUConv2d"):
        ACTIVE[cls].from_positions(4, 6, [(0, 1), (1, 0)])
    with pytest.raises(TypeError, match="must be exactly a Conv2d"):
        ACUConv2d.adopt(cls(4, 6, 3))


def test_a_gain_that_is_recomputed_is_refused_by_conversion_and_fold():
    with pytest.warns(NoEffectWarning, match="its gain is recomputed"):
        convert_to_acu(prune.identity(ScaledStdConv2d(2, 4, 3), "gain"))
    active = prune.identity(convert_to_acu(ScaledStdConv2d(2, 4, 3)), "gain")
    with pytest.raises(ValueError, match="gain of this ACUScaledStdConv2d is recomputed"):
        fold_acu(active)


@pytest.mark.slow
def test_same_padding_is_exported_for_any_height_and_width():
    model = convert_to_acu(nn.Sequential(Conv2dSame(3, 4, 3, stride=2), Conv2dSame(4, 4, 5, stride=2))).eval()
    for layer in model:
        nn.init.uniform_(layer.offsets, -0.7, 0.7)
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (torch.randn(2, 3, 33, 40),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for size in ((50, 61), (33, 44), (64, 31)):
        x = torch.randn(3, 3, *size)
        assert_close(program.module()(x), model(x), 1e-6)  # padded in the graph, or by the layer: rounded differently
