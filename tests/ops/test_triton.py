"""The Triton backend against the closed form: on a GPU where there is one, otherwise in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fast_oracle import NEAR, each, run

from lightning_acu import acu_conv2d
from lightning_acu.ops import triton_gpu

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"  # a program takes a millisecond there, so cases are small; on a GPU, each is compiled
SEEDS = [range(first, first + 25) for first in range(5_000_000, 5_000_075, 25)]
#: More pixels and channels than one program has.
LARGE = [
    {"channels": (40, 72, 1), "size": (11, 9), "batch": 1, "positions": 2, "stride": (2, 2)},
    {"channels": (34, 136, 2), "size": (9, 10), "batch": 1, "positions": 1, "stride": (1, 1)},
    {"channels": (80, 80, 80), "size": (9, 8), "batch": 1, "positions": 1},
]


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    """float32 products without TF32, and memory that nobody wrote full of NaN."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    for owner, name, function in (
        (torch, "empty", empty), (torch, "empty_like", empty_like), (torch.Tensor, "new_empty", new_empty)
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *args, function=function, **kw: _poison(function(*args, **kw)))


def _poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(2**24)


@pytest.mark.parametrize("seeds", SEEDS, ids=lambda seeds: str(seeds.start))
def test_output_and_gradients_equal_the_closed_form(seeds):
    each(seeds, lambda seed, one: one.check(run(one, "triton", DEVICE)), dtype=torch.float32, small=INTERPRETED)


@pytest.mark.parametrize("fixed", LARGE, ids=lambda fixed: "x".join(map(str, fixed["channels"])))
def test_layers_larger_than_any_block_equal_the_closed_form(fixed):
    each(range(1), lambda seed, one: one.check(run(one, "triton", DEVICE)), dtype=torch.float32, small=True, **fixed)


def test_half_precision_is_as_close_as_its_rounding():
    def body(seed, one):
        *given, direction = [t if t is None else t.half() for t in (*one.tensors, one.direction)]
        given[2] = one.tensors[2]
        one.tensors, one.direction = given, direction
        one.check(run(one, "triton", DEVICE))

    each(range(5_001_000, 5_001_015), body, dtype=torch.float32, small=True, kinds=NEAR)


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


def test_where_it_cannotrun(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.zeros(9, 2)
    with pytest.raises(
        RuntimeError, match=r"`backend` \(='triton'\) cannot run here: it runs on GPUs, and `input` is on"
    ):
        acu_conv2d(*tensors, backend="triton")
    monkeypatch.setattr(triton_gpu, "_missing", lambda: "Triton is not installed")
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        acu_conv2d(*tensors, backend="triton")


def test_what_it_does_not_know():
    tensors = (t.to(DEVICE).double() for t in (torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.zeros(9, 2)))
    with pytest.raises(RuntimeError, match=r"it knows float32, bfloat16 and float16, and `input` is torch.float64"):
        acu_conv2d(*tensors, backend="triton")


def test_kernels_compile_without_spills_for_an_h100():
    """One product and one depthwise layer; `scripts/compile_kernels.py` has more of both, and other chips."""
    script = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "--targets", "sm_90", "--layers", "1", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton_cells._input_kernel" in done.stdout
    assert "triton_channelwise._weight_kernel" in done.stdout
