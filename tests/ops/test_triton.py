"""The Triton backend against the closed form: on a GPU where there is one, otherwise in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fast_oracle import NEAR, each, run
from helpers.oracle import assert_close
from helpers.triton_cases import DEVICE, SMALL, exact  # noqa: F401

from lightning_acu import acu_conv2d
from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops.triton import backend as triton_backend
from lightning_acu.ops.triton.tiles import Tile, set_interpolation

pytest.importorskip("triton")
# Triton 3.6's interpreter does what NumPy 1.25 deprecated.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
triton_cells = pytest.importorskip("lightning_acu.ops.triton.cells")
triton_gemm = pytest.importorskip("lightning_acu.ops.triton.gemm")
triton_product = pytest.importorskip("lightning_acu.ops.triton.product")
SEEDS = [range(first, first + 5) for first in range(5_000_000, 5_000_200, 5)]
#: More pixels and channels than one program has.
LARGE = [
    {"channels": (40, 72, 1), "size": (11, 9), "batch": 1, "positions": 2, "stride": (2, 2)},
    {"channels": (34, 136, 2), "size": (9, 10), "batch": 1, "positions": 1, "stride": (1, 1)},
    {"channels": (80, 80, 80), "size": (9, 8), "batch": 1, "positions": 1},
]


@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: str(seeds.start))
def test_output_and_gradients_equal_the_closed_form(seeds):
    each(seeds, lambda seed, one: one.check(run(one, "triton", DEVICE)), dtype=torch.float32, small=SMALL)


@pytest.mark.parametrize("fixed", LARGE, ids=lambda fixed: "x".join(map(str, fixed["channels"])))
def test_layers_larger_than_any_block_equal_the_closed_form(fixed):
    each(range(1), lambda seed, one: one.check(run(one, "triton", DEVICE)), dtype=torch.float32, small=True, **fixed)


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(70, (1, 1), (2, 1)), (34, (3, 2), (1, 1))])
def test_channels_with_positions_of_their_own_equal_the_formula(channels, kernel, stride):
    """As position_groups="channels" has them; with one tap, an ActiveShift2d. More channels than one program has."""
    image, weight = torch.randn(1, channels, 5, 6), torch.randn(channels, 1, *kernel)
    tensors, direction = [image, weight, torch.randn(channels, weight[0].numel(), 2) * 1.5], None
    results = []
    for backend, device, dtype in (("reference", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        leaves = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
        output = acu_conv2d(*leaves, None, stride, (kernel[0] // 2, 0), groups=channels, backend=backend)
        direction = torch.randn(output.shape) if direction is None else direction
        grads = torch.autograd.grad(output, leaves, direction.to(device, dtype))
        results.append([tensor.detach().cpu().double() for tensor in (output, *grads)])
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("needs_offsets", [False, True])
@pytest.mark.parametrize(("channels", "groups"), [((20, 18), 1), ((18, 18), 18)])
def test_gradients_of_weights_over_several_steps(channels, groups, needs_offsets):
    """More pixels than a step has, of rows shorter than a step; taps at whole pixels, far outside, and between."""
    (c_in, c_out), geometry = channels, {"stride": (2, 1), "padding": (1, 2), "groups": groups}
    image, weight = torch.randn(3, c_in, 13, 5), torch.randn(c_out, c_in // groups, 3, 2)
    offsets = torch.tensor([[0, 0], [1, -1], [400, 0], [0, -7e8], [0.25, -1.5], [-0.75, 2]])
    leaves, direction, results = (image, weight, offsets), None, []
    for backend, device, dtype in (("reference", "cpu", torch.float64), ("triton", DEVICE, torch.float32)):
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in leaves]
        tensors[2].requires_grad_(needs_offsets)
        output = acu_conv2d(*tensors, **geometry, backend=backend)
        direction = torch.randn(output.shape) if direction is None else direction
        needed = [tensor for tensor in tensors if tensor.requires_grad]
        results.append(torch.autograd.grad(output, needed, direction.to(device, dtype)))
    for ours, expected in zip(*reversed(results), strict=True):
        assert_close(ours.cpu().double(), expected, 1e-5)


@pytest.mark.parametrize("tile", [(16, 16, 16, 4, 1), (32, 32, 16, 4, 3), (128, 128, 64, 8, 3)])
def test_any_tile_of_a_weights_gradient_gives_the_same(tile):
    """From one cell in a program to four, more than the layer's last program has; channels that fill no block."""
    torch.manual_seed(0)
    geometry = ConvGeometry((2, 2), (1, 2), (1, 1, 1, 1), (1, 1), 1)
    image, weight = torch.randn(2, 19, 7, 9, device=DEVICE), torch.randn(21, 19, 2, 2, device=DEVICE)
    offsets = torch.rand(1, 4, 2, device=DEVICE) - 0.5
    grad = torch.randn(2, 21, *geometry.output_size((7, 9)), device=DEVICE)
    image, grad = (t.contiguous(memory_format=torch.channels_last) for t in (image, grad))
    found = triton_cells.weight_gradient(grad, image, weight, offsets, geometry, Tile(*tile))
    leaves = [t.double().requires_grad_() for t in (weight, offsets)]
    output = acu_conv2d(image.double(), *leaves, None, (1, 2), 1, backend="reference")
    for ours, expected in zip(found, torch.autograd.grad(output, leaves, grad.double()), strict=True):
        assert_close(ours.double(), expected, 1e-5)


def test_half_precision_is_as_close_as_its_rounding():
    each(range(5_001_000, 5_001_025), in_half_precision, dtype=torch.float32, small=True, kinds=NEAR)


def in_half_precision(seed, one):
    *given, direction = [t if t is None else t.half() for t in (*one.tensors, one.direction)]
    given[2] = one.tensors[2]
    one.tensors, one.direction = given, direction
    one.check(run(one, "triton", DEVICE))


def test_interpolation_in_half_precision():
    set_interpolation("half")
    try:
        each(range(5_003_000, 5_003_015), in_half_precision, dtype=torch.float32, small=True, kinds=NEAR)
    finally:
        set_interpolation("float32")
    with pytest.raises(ValueError, match=r"`precision` \(='bfloat16'\) must be 'float32' or 'half'"):
        set_interpolation("bfloat16")


@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_many_channels_are_interpolated_first(monkeypatch, stride):
    """The route of 512 channels and more, here from 3 on, its samples made in parts."""
    taken, product = [], triton_gemm.product
    monkeypatch.setattr(triton_product, "gemm_from", lambda dtype, device: 3)
    monkeypatch.setattr(triton_gemm, "_BYTES", 4_000)
    monkeypatch.setattr(triton_gemm, "product", lambda *args, **kw: taken.append(product(*args, **kw)))

    def body(seed, one):
        one.needs = [True] * 4
        taken.clear()
        one.check(run(one, "triton", DEVICE))
        assert len(taken) == 1 + (stride == (1, 1)) or not one.direction.numel()  # forward, and the input's gradient

    fixed = {"channels": (5, 7, 1), "positions": 1, "stride": stride}
    each(range(5_004_000, 5_004_012), body, dtype=torch.float32, small=True, **fixed)


def test_the_same_bits_every_time():
    def body(seed, one):
        first, second = (run(one, "triton", DEVICE) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    each(range(5_002_000, 5_002_005), body, dtype=torch.float32, small=True, kinds=NEAR)


def test_a_lost_offset_reaches_its_position_group_and_no_other():
    input, weight, offsets = torch.randn(1, 3, 5, 4), torch.randn(4, 3, 3, 3), torch.rand(2, 9, 2)
    offsets[1, 0, 0] = torch.nan
    output = acu_conv2d(*(t.to(DEVICE) for t in (input, weight, offsets)), padding=1, backend="triton")
    assert output[:, 2:].isnan().all()
    assert output[:, :2].isfinite().all()


def test_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.zeros(9, 2)
    with pytest.raises(
        RuntimeError,
        match=r"`backend` \(='triton'\) cannot run here: it runs on GPUs of NVIDIA and AMD, and `input` is on",
    ):
        acu_conv2d(*tensors, backend="triton")
    monkeypatch.setattr(triton_backend, "_missing", lambda: "Triton is not installed")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        acu_conv2d(*tensors, backend="triton")


def test_what_it_does_not_know():
    tensors = (t.to(DEVICE).double() for t in (torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.zeros(9, 2)))
    with pytest.raises(RuntimeError, match=r"it supports float32, bfloat16 and float16, and `input` is torch.float64"):
        acu_conv2d(*tensors, backend="triton")


ALL = ["bfloat16", "float16", "float32"]


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [("sm_80", ALL), ("sm_90", ALL), ("gfx942", ALL), ("gfx950", ["bfloat16"]), ("gfx1100", ["bfloat16"])],
)
def test_kernels_compile_without_spills(target, dtypes):
    """Without a GPU, as layers of networks launch them; in one process, which compiles equal kernels once."""
    script = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "--targets", target, "--dtypes", *dtypes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for dtype in dtypes:
        for kernel in ("_product_kernel", "cells._input_kernel", "channelwise._weight_kernel"):
            assert f"{target} {dtype} {kernel}: " in done.stdout
