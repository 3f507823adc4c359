"""Gradients of the operator, both backends: against finite differences, each other, and on the lattice."""

import pytest
import torch
from helpers.oracle import GEOMETRY, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_acu import acu_conv2d, convert_to_acu

backends = pytest.mark.parametrize("backend", ["reference", "dense", "cython"])


def projected(function):
    """``function`` to three random sums of its output: as telling, and a backward pass for each of three numbers."""

    def sums(*tensors):
        output = function(*tensors)
        directions = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
        return (output * directions).flatten(1).sum(1)

    return sums


@pytest.mark.slow
@backends
def test_gradcheck_of_all_four_gradients_off_the_lattice(case, backend):
    function = projected(lambda *tensors: acu_conv2d(*tensors, **GEOMETRY, backend=backend))
    assert torch.autograd.gradcheck(function, case)


@backends
def test_gradcheck_where_taps_are_convolutions_of_their_own(case, backend):
    _, weight, offsets, bias = case
    offsets = (offsets.detach() * 9).requires_grad_()  # rows and columns far apart; many taps outside
    wide = torch.randn(1, 4, 30, 25, dtype=torch.float64)
    function = projected(lambda w, o, b: acu_conv2d(wide, w, o, b, **GEOMETRY, backend=backend))
    assert torch.autograd.gradcheck(function, (weight, offsets, bias))


@backends
@pytest.mark.parametrize("scale", [0, 2], ids=["zero", "whole"])
def test_on_the_lattice_the_derivative_is_the_one_to_the_right(backend, scale):
    input, weight = torch.randn(1, 2, 6, 5).double(), torch.randn(3, 2, 3, 3).double()
    offsets = (torch.randn(9, 2).double() * scale).round().requires_grad_()
    direction = torch.randn(1, 3, 3, 5).double()

    def loss(offsets):
        return (acu_conv2d(input, weight, offsets, None, (2, 1), 1, backend=backend) * direction).sum()

    (gradient,) = torch.autograd.grad(loss(offsets), offsets)
    for index in range(18):  # exact for any step up to one pixel: bilinear interpolation is linear along each axis
        step = torch.zeros(18, dtype=torch.float64)
        step[index] = 0.5
        right = (loss(offsets + step.view(9, 2)) - loss(offsets)) / 0.5
        assert_close(gradient.flatten()[index], right.detach(), 1e-10)
    assert (gradient != 0).any()


def test_positions_of_a_converted_network_get_gradients_at_step_0():
    """Weights written as relu(1 - |p - g|) fail this: they have no gradient on the lattice, where training starts."""
    model = convert_to_acu(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 5)))
    model(torch.randn(2, 3, 12, 11)).square().sum().backward()
    for layer in (model[0], model[2]):
        gradient = layer.offsets.grad.view(-1, 2)
        assert (gradient[layer.movable] != 0).all()
        assert (gradient[~layer.movable] == 0).all()


fast_backends = pytest.mark.parametrize("backend", ["dense", "cython"])


@fast_backends
def test_input_gradient_of_whole_pixel_shifts(backend):
    """Tap groups that shift the image without changing its size: dense once forgot to shift the gradient back."""
    leaves = [torch.randn(shape).double().requires_grad_() for shape in ((1, 4, 2, 2), (12, 4, 1, 1))]
    offsets = torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]]).double()
    results = []
    for name in (backend, "reference"):
        output = acu_conv2d(*leaves, offsets, backend=name)
        results.append(torch.autograd.grad(output, leaves[0], torch.linspace(-1, 1, 48).double().view(1, 12, 2, 2))[0])
    assert_close(*results)


@fast_backends
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_each_gradient_alone_equals_the_gradient_among_all(case, needed, backend):
    output = acu_conv2d(*case, **GEOMETRY, backend=backend)
    direction = torch.randn_like(output)
    every = torch.autograd.grad(output, case, direction)
    some = [tensor.detach().requires_grad_(index in needed) for index, tensor in enumerate(case)]
    acu_conv2d(*some, **GEOMETRY, backend=backend).backward(direction)
    for index, tensor in enumerate(some):
        if index in needed:
            assert_close(tensor.grad, every[index])
        else:
            assert tensor.grad is None


@pytest.mark.slow
def test_reference_has_second_derivatives(case):
    function = projected(lambda *tensors: acu_conv2d(*tensors, **GEOMETRY, backend="reference"))
    assert torch.autograd.gradgradcheck(function, case)


@fast_backends
def test_double_backward_of_a_fast_backend_says_what_to_do(case, backend):
    output = acu_conv2d(*case, **GEOMETRY, backend=backend)
    (gradient,) = torch.autograd.grad(output.square().sum(), case[0], create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference' for double backward"):
        gradient.sum().backward()


@fast_backends
def test_no_gradient_is_left_unwritten(case, monkeypatch, backend):
    """torch.empty filled with NaN: whatever a backend forgets to write shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        input, weight, offsets, bias = case
        output = acu_conv2d(input, weight, offsets * 4, bias, **GEOMETRY, backend=backend)
        gradients = torch.autograd.grad(output.sum(), case)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=pairs,
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    groups=st.sampled_from([1, 2, 4]),
    position_groups=st.sampled_from([1, 2, 3]),
    batch=st.integers(0, 2),
    scale=st.sampled_from([0.0, 0.4, 2.0, 30.0, 1e6]),
    whole=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_every_backend_equals_reference_for_any_shape(
    size, kernel, stride, padding, dilation, groups, position_groups, batch, scale, whole, channels_last, seed
):
    if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return  # the kernel does not fit
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    input, weight, bias = draw(batch, 4, *size), draw(12, 4 // groups, *kernel), draw(12)
    offsets = draw(position_groups, kernel[0] * kernel[1], 2) * scale
    if whole:
        offsets = offsets.round()
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    results = []
    for backend in ("reference", "dense", "cython"):
        leaves = [tensor.clone().requires_grad_() for tensor in (input, weight, offsets, bias)]
        output = acu_conv2d(*leaves, stride, padding, dilation, groups, backend=backend)
        direction = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, direction)])
    reference, *others = results
    for other in others:
        for actual, expected in zip(other, reference, strict=True):
            assert_close(actual, expected, 1e-10)
