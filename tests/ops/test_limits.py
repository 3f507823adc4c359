"""Sizes at their limits: nothing, far more than usual, and what does not fit."""

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle import assert_close

from lightning_acu import acu_conv2d
from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import acu_conv2d_op
from lightning_acu.ops.cpu import backend as cpu_backend

backends = pytest.mark.parametrize("backend", ["cython", "dense", "auto"])


def _both(backend, shapes, *arguments, scale=1.0):
    """Output and gradients by ``backend`` and by the reference, of random float64 tensors."""
    leaves = [torch.randn(shape).double() for shape in shapes]
    leaves[2] *= scale
    results = []
    for name in (backend, "reference"):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        output = acu_conv2d(*given, *arguments, backend=name)
        direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
        results.append([output.detach(), *torch.autograd.grad(output, given, direction)])
    return zip(*results, strict=True)


@pytest.mark.parametrize("backend", ["cython", "auto"])
def test_no_input_channels_leave_the_bias(backend):
    for actual, expected in _both(backend, [(2, 0, 5, 4), (32, 0, 3, 3), (9, 2), (32,)]):
        assert_close(actual, expected)


@pytest.mark.parametrize("backend", ["cython", "dense", "auto", "reference"])
@pytest.mark.parametrize(
    ("image", "groups"), [((2, 4, 0, 5), 1), ((2, 4, 3, 0), 2), ((2, 4, 0, 0), 4), ((2, 0, 3, 4), 1), ((0, 4, 3, 5), 1)]
)
def test_images_without_pixels_leave_the_bias(backend, image, groups):
    """Nothing but padding is read. torch's own convolution refuses most of them, and is wrong without channels."""
    shapes = image, (4, image[1] // groups, 2, 3), (2, 6, 2), (4,)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    output = acu_conv2d(*leaves, padding=(2, 2, 1, 3), groups=groups, backend=backend)
    size = image[2] + 4 - 1, image[3] + 4 - 2
    assert torch.equal(output, leaves[3][:, None, None].expand(image[0], 4, *size))
    towards = torch.randn_like(output)
    grads = torch.autograd.grad(output, leaves, towards)
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    assert not any(g.any() for g in grads[:3])
    torch.testing.assert_close(grads[3], towards.sum((0, 2, 3)))
    with torch.no_grad():
        leaves[2][1, 3, 0] = torch.nan
        spoilt = acu_conv2d(*leaves, padding=(2, 2, 1, 3), groups=groups, backend=backend).isnan()
    assert spoilt[:, 2:].all()
    assert not spoilt[:, :2].any()


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (4, 3, 0, 3), (4, 3, 3, 0)])
def test_no_output_channels_or_no_kernel_are_refused(shape):
    with pytest.raises(ValueError, match=r"`weight` must have output channels and a kernel of at least 1x1"):
        acu_conv2d(torch.randn(1, 3, 5, 5), torch.randn(shape), torch.randn(shape[2] * shape[3], 2), padding=1)


@pytest.mark.parametrize("wrong", ["weight", "offsets", "bias"])
def test_the_operator_itself_refuses_shapes_that_do_not_fit(wrong):
    """Graphs call it without the checks of the function, and compiled kernels would read beyond the tensors."""
    shapes = {"weight": (16, 8, 3, 3), "offsets": (1, 9, 2), "bias": (16,)}
    shapes[wrong] = {"weight": (16, 64, 3, 3), "offsets": (1, 4, 2), "bias": (1,)}[wrong]
    tensors = [torch.randn(shape) for shape in shapes.values()]
    with pytest.raises(ValueError, match="these shapes do not fit each other: `input` \\(1, 8, 5, 5\\)"):
        acu_conv2d_op(torch.randn(1, 8, 5, 5), *tensors, (1, 1), (0, 0, 0, 0), (1, 1), 1, "cython")


@backends
@pytest.mark.parametrize("stride", [(7, 2), (1_000_000, 3), (2**31, 2**32)])
def test_strides_larger_than_the_image(backend, stride):
    for actual, expected in _both(backend, [(2, 20, 5, 6), (20, 1, 3, 3), (9, 2)], None, stride, 1, 1, 20):
        assert_close(actual, expected, 1e-11)


@backends
@pytest.mark.parametrize("dilation", [12, (30, 5)])
def test_depthwise_taps_far_apart(backend, dilation):
    """Bands of rows are lower than what one row of them reads."""
    shapes = [(1, 18, 40, 33), (18, 1, 3, 3), (9, 2)]
    for actual, expected in _both(backend, shapes, None, 1, 30, dilation, 18, scale=2):
        assert_close(actual, expected, 1e-11)


@backends
def test_more_images_than_partial_sums_and_groups_across_position_groups(backend):
    for actual, expected in _both(backend, [(70, 12, 3, 4), (24, 4, 3, 3), (4, 9, 2)], None, 1, 1, 1, 3):
        assert_close(actual, expected, 1e-11)


def test_auto_counts_runs_of_channels_that_share_both_groups():
    """48 channels in 3 groups and 2 position groups make 4 runs: 16, 8, 8, 16."""
    geometry = ConvGeometry((3, 3), groups=3)
    input, weight, offsets = torch.randn(1, 48, 5, 5), torch.randn(48, 16, 3, 3), torch.rand(2, 9, 2)
    assert not cpu_backend.prefers(input, weight, offsets, geometry)
    assert cpu_backend.prefers(input, weight, offsets[:1], geometry)


def test_auto_is_conv2d_bit_for_bit_where_the_taps_form_one():
    input, weight = torch.randn(2, 16, 9, 8), torch.randn(32, 16, 3, 3)
    assert torch.equal(acu_conv2d(input, weight, torch.zeros(9, 2), padding=1), F.conv2d(input, weight, padding=1))
    apart = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)  # a 3x3 stretched to dilation 2
    found = acu_conv2d(input, weight, apart, padding=1)
    assert torch.equal(found, F.conv2d(input, weight, padding=2, dilation=2))
