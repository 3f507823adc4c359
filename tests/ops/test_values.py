"""Values of the operator, every backend, against three oracles: loops, F.conv2d and torchvision's deform_conv2d."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle import GEOMETRY, acu_conv2d_loops, assert_close
from torchvision.ops import deform_conv2d

from lightning_acu import acu_conv2d

BACKENDS = ["reference", "dense", "cython", "auto"]
backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
def test_equals_explicit_loops_on_an_asymmetric_case(case, backend):
    input, weight, offsets, bias = (tensor.detach() for tensor in case)
    expected = acu_conv2d_loops(input, weight, offsets, bias, **GEOMETRY)
    assert_close(acu_conv2d(input, weight, offsets, bias, **GEOMETRY, backend=backend), expected)


@backends
@pytest.mark.parametrize("scale", [0.0, 0.7, 6.0, 40.0], ids=lambda scale: f"offsets~{scale:g}px")
@pytest.mark.parametrize(("stride", "padding", "dilation"), [((1, 1), (1, 1), (1, 1)), ((1, 3), (4, 0), (3, 2))])
def test_equals_explicit_loops_near_and_far(backend, scale, stride, padding, dilation):
    input, weight = torch.randn(1, 3, 7, 6).double(), torch.randn(2, 3, 3, 3).double()
    offsets = torch.randn(1, 9, 2).double() * scale
    expected = acu_conv2d_loops(input, weight, offsets, None, stride, padding, dilation, 1)
    actual = acu_conv2d(input, weight, offsets[0], None, stride, padding, dilation, backend=backend)
    assert_close(actual, expected)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), 1, 1, 1, 1),
        ((5, 3), (2, 1), (2, 0), (1, 3), 2),
        ((2, 4), (1, 2), "valid", 1, 4),
        ((3, 5), 1, "same", (2, 1), 1),
        ((2, 4), 1, "same", 1, 1),  # "same" pads unevenly here
        ((3, 3), 1, 12, 12, 1),
    ],
)
def test_zero_offsets_are_conv2d(backend, dtype, kernel, stride, padding, dilation, groups):
    input = torch.randn(2, 4, 9, 8, dtype=dtype)
    weight, bias = torch.randn(8, 4 // groups, *kernel, dtype=dtype), torch.randn(8, dtype=dtype)
    offsets = torch.zeros(kernel[0] * kernel[1], 2)
    arguments = (stride, padding, dilation, groups)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel")  # torch says that it copies
        expected = F.conv2d(input, weight, bias, *arguments)
    actual = acu_conv2d(input, weight, offsets, bias, *arguments, backend=backend)
    assert_close(actual, expected, 1e-12 if dtype == torch.float64 else 1e-5)


@backends
def test_integer_offsets_are_a_larger_conv2d(backend):
    input, weight = torch.randn(2, 3, 9, 8).double(), torch.randn(4, 3, 3, 2).double()
    offsets = torch.tensor([[-1, 2], [0, 0], [2, -2], [1, 1], [0, -1], [-2, 0]]).double()
    large = torch.zeros(4, 3, 7, 6).double()  # rows -2..4, columns -2..3
    for tap, (dy, dx) in enumerate(offsets.long().tolist()):
        large[:, :, 2 + tap // 2 + dy, 2 + tap % 2 + dx] += weight[:, :, tap // 2, tap % 2]
    expected = F.conv2d(F.pad(input, (3, 3, 3, 3)), large, stride=(2, 1))
    assert_close(acu_conv2d(input, weight, offsets, None, (2, 1), 1, backend=backend), expected)


@backends
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), ((2, 1), (1, 2), (2, 1))])
def test_equals_deform_conv2d_with_the_same_offsets_everywhere(backend, stride, padding, dilation):
    input, weight, bias = torch.randn(2, 4, 9, 7).double(), torch.randn(6, 2, 3, 3).double(), torch.randn(6).double()
    offsets = torch.randn(9, 2).double() * 1.5
    actual = acu_conv2d(input, weight, offsets, bias, stride, padding, dilation, 2, backend=backend)
    everywhere = offsets.flatten()[None, :, None, None].expand(2, -1, *actual.shape[2:])
    assert_close(actual, deform_conv2d(input, everywhere, weight, bias, stride, padding, dilation))


@backends
def test_three_dimensional_input_is_a_batch_of_one(case, backend):
    input, weight, offsets, bias = case
    whole = acu_conv2d(input, weight, offsets, bias, **GEOMETRY, backend=backend)
    assert_close(acu_conv2d(input[0], weight, offsets, bias, **GEOMETRY, backend=backend), whole[0])


@backends
def test_empty_batch_gives_an_empty_output_and_zero_gradients(case, backend):
    input, *rest = case
    output = acu_conv2d(input[:0], *rest, **GEOMETRY, backend=backend)
    assert output.shape == (0, 6, 2, 3)
    for gradient in torch.autograd.grad(output.sum(), rest):
        assert not gradient.any()


@backends
def test_four_sided_padding_is_as_in_f_pad(case, backend):
    input, weight, offsets, bias = case
    expected = acu_conv2d(F.pad(input, (1, 2, 0, 3)), weight, offsets, bias, groups=2, backend=backend)
    assert_close(acu_conv2d(input, weight, offsets, bias, padding=(1, 2, 0, 3), groups=2, backend=backend), expected)


@backends
def test_dilation_zero_lets_offsets_alone_make_the_shape(backend):
    input, weight, cross = torch.randn(1, 2, 6, 5).double(), torch.randn(3, 2, 1, 4).double(), torch.zeros(1, 2, 3, 3)
    positions = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [1.0, 0.0]])
    cross = torch.zeros(3, 2, 3, 3).double()
    cross[:, :, [0, 1, 1, 2], [1, 0, 2, 1]] = weight[:, :, 0]
    actual = acu_conv2d(input, weight, positions, None, (2, 1), 0, (1, 0), backend=backend)
    assert_close(actual, F.conv2d(input, cross, None, (2, 1), 1))


@backends
@pytest.mark.parametrize("value", [1e4, -1e9, float("inf"), -float("inf")])
def test_a_tap_far_outside_contributes_nothing(case, backend, value):
    input, weight, offsets, bias = (tensor.detach() for tensor in case)
    far, without = offsets.clone(), weight.clone()
    far[:, 2] = value
    without[:, :, 1, 0] = 0  # tap 2 of a (3, 2) kernel
    expected = acu_conv2d(input, without, offsets, bias, **GEOMETRY, backend="reference")
    assert_close(acu_conv2d(input, weight, far, bias, **GEOMETRY, backend=backend), expected)


@backends
def test_all_taps_outside_leave_the_bias(case, backend):
    input, weight, offsets, bias = case
    output = acu_conv2d(input, weight, offsets.detach() + 100, bias, **GEOMETRY, backend=backend)
    assert_close(output, bias[:, None, None].expand_as(output))


@backends
def test_nan_offsets_reach_the_output(case, backend):
    input, weight, offsets, bias = (tensor.detach().clone() for tensor in case)
    offsets[1, 0, 0] = float("nan")
    output = acu_conv2d(input, weight, offsets, bias, **GEOMETRY, backend=backend)
    assert output[:, 2:4].isnan().all()  # the channels of position group 1 ...
    assert not output[:, [0, 1, 4, 5]].isnan().any()  # ... and no others


@pytest.mark.parametrize("rows", [5, 6])
def test_one_channel_channels_last_input_of_one_output_column(rows):
    """torch 2.15's float32 CPU convolution is wrong on exactly these strides; ours must not be."""
    input = torch.randn(2, 1, rows, 1).contiguous(memory_format=torch.channels_last)
    input = input.as_strided(input.shape, (rows, 1, 1, 1))
    weight, offsets = torch.randn(8, 1, 3, 3), torch.zeros(9, 2)
    expected = acu_conv2d(input.double(), weight.double(), offsets, None, 2, 1, backend="reference")
    assert_close(acu_conv2d(input, weight, offsets, None, 2, 1, backend="dense").double(), expected, 1e-6)
