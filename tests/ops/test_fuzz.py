"""Random cases of the fast backends against the closed form of `fast_oracle.py`; a failure says which `case` it was."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.fast_oracle import LARGE, NAMES, NEAR, acu_conv2d_closed_form, case, each, run
from helpers.oracle import GEOMETRY, acu_conv2d_loops
from torchvision.ops import deform_conv2d

from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops.cpu import _vectors
from lightning_acu.ops.cpu import backend as cpu_backend

pytestmark = pytest.mark.slow

BACKENDS = ["cython", "dense"]
SEEDS = {"cython": [range(first, first + 500) for first in range(0, 10_000, 500)], "dense": [range(300)]}
OTHER_SEEDS = range(1_000_000, 1_000_100)
backends = pytest.mark.parametrize("backend", BACKENDS)
chunks = pytest.mark.parametrize(
    ("backend", "seeds"),
    [pytest.param(backend, seeds, id=f"{backend}-{seeds.start}") for backend in BACKENDS for seeds in SEEDS[backend]],
)
large = pytest.mark.parametrize("fixed", LARGE, ids=lambda fixed: "x".join(map(str, fixed["channels"])))


@chunks
def test_output_and_gradients_equal_the_closed_form(backend, seeds):
    each(seeds, lambda seed, one: one.check(run(one, backend)))


@backends
@large
def test_layers_larger_than_any_block_equal_the_closed_form(backend, fixed):
    each(range(2), lambda seed, one: one.check(run(one, backend)), **fixed)


@pytest.fixture(params=_vectors.supported())
def instruction_set(request):
    before = _vectors.current()
    _vectors.use(request.param)
    yield
    _vectors.use(before)


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_equals_the_closed_form():
    each(range(2_000_000, 2_000_200), lambda seed, one: one.check(run(one, "cython")))
    for fixed in LARGE:
        each(range(2, 3), lambda seed, one: one.check(run(one, "cython")), **fixed)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("route", ["planar", "product"])
def test_every_route_equals_the_closed_form_where_the_rule_takes_another(monkeypatch, route):
    rule = cpu_backend._route

    def chosen(image, weight, output, cell, geometry):
        # Planes of a tap that is far away would fill the memory; and nothing is computed without pixels.
        possible = 0 not in (*image.shape, *output) and abs(cell).max() < 200
        return route if possible else rule(image, weight, output, cell, geometry)

    monkeypatch.setattr(cpu_backend, "_route", chosen)
    each(range(3_000_000, 3_000_250), lambda seed, one: one.check(run(one, "cython")))
    for fixed in LARGE:
        each(range(4, 5), lambda seed, one: one.check(run(one, "cython")), **fixed)
    monkeypatch.setattr(cpu_backend, "_THREAD_WORK", 0)
    each(range(20), _check_threads)


@pytest.mark.parametrize("size", [(67, 131), (300, 9), (5, 700)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_planes_of_large_images_are_cut_into_bands(size, stride):
    fixed = {"channels": (3, 5, 1), "size": size, "batch": 2, "positions": 1, "stride": stride}
    each(range(3), lambda seed, one: one.check(run(one, "cython")), **fixed)
    each(range(2), _check_threads, **fixed)


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`name` \(='sse9'\) must be one of baseline"):
        _vectors.use("sse9")


@large
def test_one_thread_equals_many_threads_bit_for_bit(fixed):
    each(range(3), _check_threads, **fixed)


def test_one_thread_equals_many_threads_bit_for_bit_in_small_cases(monkeypatch):
    monkeypatch.setattr(cpu_backend, "_THREAD_WORK", 0)  # below it, one thread does it all
    each(range(60), _check_threads)


def _check_threads(seed, one):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(one, "cython"))
    finally:
        torch.set_num_threads(before)
    for name, alone in results[0].items():
        assert all(torch.equal(alone, others[name]) for others in results[1:]), name


@backends
def test_non_finite_pixels_reach_the_outputs_that_read_them_and_no_others(backend):
    def body(seed, one):
        input, weight = one.tensors[:2]
        spoilt = torch.zeros(input.shape, dtype=torch.bool)
        spoilt.view(-1)[np.random.default_rng(seed).integers(0, input.numel(), 2)] = True
        count = {"input": spoilt, "weight": np.ones(weight.shape), "bias": np.zeros(len(weight))}
        read = one.oracle(**count)[0] > 0
        if backend == "cython" and one.arguments["groups"] == 1 and min(weight.shape[:2]) > 2:
            touched = one.oracle(**count, magnitude=True)[0] > 0  # by any of the 4 neighbours, whatever its weight
        else:  # kernels expanded over a box of cells spread it through the box
            touched = one.oracle(**count | _box(one, symmetric=backend == "dense"))[0] > 0

        one.tensors[0] = input.masked_fill(spoilt, (torch.nan, torch.inf, -torch.inf)[seed % 3])
        output = run(one, backend)["output"]
        assert not output[torch.from_numpy(read)].isfinite().any()
        one.tensors[0] = input.masked_fill(spoilt, 0)
        one.check({"output": output}, where=~touched)

    each(OTHER_SEEDS, body, kinds=NEAR, batch=2)


def _box(one, symmetric):
    """What makes of the oracle a convolution over the bounding box of all neighbours of all taps."""
    weight, (kh, kw), (dy, dx) = one.tensors[1], one.tensors[1].shape[2:], one.arguments["dilation"]
    top, left, bottom, right = one.sides
    grid = np.array([(i * dy - top, j * dx - left) for i in range(kh) for j in range(kw)])
    cells = np.floor(one.tensors[2].numpy()) + grid
    low, high = cells.min((0, 1)).astype(int), cells.max((0, 1)).astype(int) + 1
    if symmetric:  # dense takes a plain convolution that pads both sides alike: -pad to pad + lost
        lost = np.array([dy * (kh - 1) - top - bottom, dx * (kw - 1) - left - right])
        pad = np.maximum(np.maximum(-low, high - lost), np.maximum(0, -(lost // 2)))
        low, high = -pad, pad + lost
    size = high - low + 1
    ones, still = np.ones((*weight.shape[:2], *size)), np.zeros((1, size.prod(), 2))
    return {"weight": ones, "offsets": still, "corner": -low, "dilation": (1, 1)}


def _spoil_one_offset(one, seed, value):
    """Put `value` into one coordinate; returns its position group, its tap, and the offsets as they were."""
    exact, one.tensors[2] = one.tensors[2], one.tensors[2].clone()
    group, tap = seed % len(exact), seed % exact.shape[1]
    one.tensors[2][group, tap, seed // 2 % 2] = value
    return group, tap, exact


@backends
def test_a_nan_offset_makes_all_outputs_of_its_position_group_nan(backend):
    def body(seed, one):
        group, _, exact = _spoil_one_offset(one, seed, torch.nan)
        assert run(one, backend)["output"].unflatten(1, (len(exact), -1))[:, group].isnan().all()

    each(OTHER_SEEDS, body, batch=2)


@backends
def test_a_nan_offset_leaves_other_position_groups_alone(backend):
    def body(seed, one):
        group, _, exact = _spoil_one_offset(one, seed, torch.nan)
        output = run(one, backend)["output"]
        one.tensors[2] = exact
        others = np.arange(output.shape[1]) * len(exact) // output.shape[1] != group
        one.check({"output": output}, where=others[:, None, None])

    each(OTHER_SEEDS, body, batch=2)


@backends
def test_an_infinite_offset_contributes_nothing_and_gets_no_gradient(backend):
    def body(seed, one):
        group, tap, exact = _spoil_one_offset(one, seed, (torch.inf, -torch.inf)[seed // 4 % 2])
        one.needs = [True] * 4
        actual = run(one, backend)
        one.check(actual)
        assert not actual["weight"].flatten(2).unflatten(0, (len(exact), -1))[group, ..., tap].any()
        assert not actual["offsets"][group, tap].any()

    each(OTHER_SEEDS, body, kinds=NEAR, batch=2)


@backends
@pytest.mark.parametrize(("input_scale", "weight_scale"), [(1e30, 1), (1, 1e30), (1e30, 1e-30), (1e-30, 1e30)])
def test_huge_float32_numbers_do_no_harm_where_the_result_is_representable(backend, input_scale, weight_scale):
    def body(seed, one):
        one.tensors = [t if t is None else t.float() for t in one.tensors]
        one.tensors[:2] = one.tensors[0] * input_scale, one.tensors[1] * weight_scale
        one.direction = one.direction.float()
        one.check(run(one, backend))

    each(OTHER_SEEDS[:50], body)


def test_the_closed_form_equals_explicit_loops():
    geometry = {name: GEOMETRY[name] for name in ("stride", "dilation", "groups")} | {"corner": GEOMETRY["padding"]}
    for offsets in (torch.randn(3, 6, 2) * 2, torch.randint(-2, 3, (3, 6, 2)), torch.randn(3, 6, 2) * 9):
        tensors = [torch.randn(2, 4, 5, 4), torch.randn(6, 2, 3, 2), offsets.double(), torch.randn(6)]
        expected = acu_conv2d_loops(*tensors, **GEOMETRY)
        output = acu_conv2d_closed_form(*tensors, torch.zeros(expected.shape), **geometry)[0]
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("positions", "groups"), [(1, 1), (1, 2), (3, 1)])
def test_the_closed_form_has_the_gradients_of_torchvision_off_the_lattice(positions, groups):
    shapes = (2, 4, 7, 6), (6, 4 // groups, 3, 2), (positions, 6, 2), (6,)
    input, weight, offsets, bias = leaves = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    each_group = zip(offsets * 2, weight.chunk(positions), bias.chunk(positions), strict=True)
    everywhere = [(taps.flatten()[None, :, None, None].expand(2, -1, 3, 6), *own) for taps, *own in each_group]
    output = torch.cat([deform_conv2d(input, *arguments, (2, 1), (1, 1), (2, 2)) for arguments in everywhere], 1)
    direction = torch.randn_like(output)
    expected = [output, *torch.autograd.grad(output, leaves, direction)]
    expected[3] = expected[3] / 2  # of offsets * 2
    arrays = [input.detach(), weight.detach(), offsets.detach() * 2, bias.detach(), direction]
    actual = acu_conv2d_closed_form(*arrays, (2, 1), (1, 1), (2, 2), groups)
    for name, one, other in zip(NAMES, actual, expected, strict=True):
        np.testing.assert_allclose(one, other.detach(), rtol=0, atol=1e-11, err_msg=name)


def test_the_closed_form_has_the_derivative_to_the_right_on_the_lattice():
    one = case(0, kinds=["whole"], batch=2)
    here, gradient, *_ = np.array(one.oracle()[0]), one.oracle()[3]
    for at in np.ndindex(gradient.shape):
        moved = one.tensors[2].double().numpy(force=True).copy()
        moved[at] += 0.5  # bilinear interpolation is linear up to the next pixel
        change = ((one.oracle(offsets=moved)[0] - here) * one.direction.numpy()).sum()
        np.testing.assert_allclose(gradient[at], change / 0.5, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("weight", "size", "groups", "positions", "kind", "expected"),
    [
        ((12, 12), 32, 1, 1, torch.float32, "planar"),
        ((32, 3), 32, 1, 1, torch.float32, "planar"),
        ((3, 64), 32, 1, 1, torch.float32, "planar"),
        ((128, 4), 14, 32, 1, torch.float32, "planar"),
        ((64, 64), 14, 1, 1, torch.float32, "product"),
        ((24, 24), 7, 1, 1, torch.float32, "product"),  # as many zeros as pixels
        ((24, 24), 28, 1, 1, torch.float32, "planar"),
        ((24, 24), 28, 1, 1, torch.float64, "product"),
        ((64, 1), 14, 64, 1, torch.float32, "channelwise"),
        ((64, 64), 28, 1, 8, torch.float32, "planar"),  # runs of 8 outputs
        ((12, 12), 0, 1, 1, torch.float32, "product"),
    ],
)
@pytest.mark.skipif(_vectors.supported()[-1] != "avx512", reason="thresholds count in vectors of AVX-512")
def test_the_route_of_a_layer(weight, size, groups, positions, kind, expected):
    weight = torch.empty(*weight, 9, dtype=kind)
    geometry = ConvGeometry((3, 3), padding=(1,) * 4, groups=groups)
    cell = np.array([[(y - 1, x - 1) for y in range(3) for x in range(3)]] * positions)
    image = torch.empty(2, weight.shape[1] * groups, size, size)
    assert cpu_backend._route(image, weight, (2, len(weight), size, size), cell, geometry) == expected


def test_what_reaches_far_goes_by_the_product():
    weight, image = torch.empty(4, 4, 9), torch.empty(2, 4, 99, 99)
    cell = np.array([[(y - 1, x - 1) for y in range(3) for x in range(3)]])
    geometry = ConvGeometry((3, 3), padding=(1,) * 4)
    assert cpu_backend._route(image, weight, (2, 4, 99, 99), cell, geometry) == "planar"
    assert cpu_backend._route(image, weight, (2, 4, 99, 99), cell * 20, geometry) == "product"
    assert (
        cpu_backend._route(image, weight, (2, 4, 9, 9), cell, dataclasses.replace(geometry, stride=(11, 11)))
        == "product"
    )
