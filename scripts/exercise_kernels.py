"""Runs the compiled CPU kernels over random small layers, for a memory checker to watch; `check_memory.sh` calls it.

Every case runs with each instruction set and with 1 and 2 threads, and must equal the reference backend: in memory that
was never written, or that belongs to another buffer, a wrong number is often all there is to see.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lightning_acu
from lightning_acu import acu_conv2d
from lightning_acu.ops.cpu import _vectors  # type: ignore[attr-defined]
from lightning_acu.ops.cpu import backend as cpu_backend

#: (C_in, C_out, groups); channels around multiples of 4, 8, 16 and 32, both ways through the kernels.
PRODUCT = [(3, 8, 1), (16, 16, 1), (17, 33, 1), (32, 31, 1), (8, 24, 2), (10, 15, 5), (5, 64, 1), (70, 12, 2)]
DEPTHWISE = [(1, 1, 1), (1, 3, 1), (3, 3, 3), (15, 15, 15), (16, 16, 16), (17, 17, 17), (33, 33, 33), (64, 64, 64)]
SMALL_GROUPS = [(4, 8, 4), (8, 4, 4), (5, 20, 5), (18, 18, 9), (20, 10, 10), (66, 66, 33), (21, 7, 7), (4, 1, 1)]
#: More pixels, columns or depth than a block of the matrix product holds, more pixels than a band.
LARGE = [((2, 13, 11), (40, 30, 1)), ((1, 5, 5), (300, 5, 1)), ((1, 4, 5), (3, 520, 1)), ((1, 40, 61), (33, 33, 33))]
SIZES = [(1, 1), (1, 1), (1, 7), (9, 1), (2, 2), (3, 4), (5, 4), (7, 9), (8, 13), (12, 5)]
KINDS = ["whole", "near", "near", "near", "wide", "outside", "mixed", "far", "nan"]


@dataclass
class Case:
    """One layer and its input; `direction` is the gradient of the output, `needs` the gradients asked for."""

    tensors: list[Tensor | None]  # input, weight, offsets, bias
    arguments: dict[str, Any]
    needs: list[bool]
    kind: str

    def __str__(self) -> str:
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in self.tensors]
        return f"{shapes}, {self.arguments}, gradients {self.needs}, {self.kind} offsets"

    def run(self, backend: str) -> dict[str, Tensor]:
        """The output and the gradients that are asked for."""
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip(self.tensors, self.needs, strict=True)
        ]
        output = acu_conv2d(*leaves, **self.arguments, backend=backend)  # type: ignore[arg-type]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        found = torch.autograd.grad(output, wanted, direction) if wanted else ()
        names = [
            name
            for name, leaf in zip(("input", "weight", "offsets", "bias"), leaves, strict=True)
            if leaf is not None and leaf.requires_grad
        ]
        return {"output": output.detach(), **dict(zip(names, found, strict=True))}

    @property
    def features(self) -> Iterator[str]:
        """What the case covers."""
        input, weight, offsets, _ = self.tensors
        assert input is not None
        assert weight is not None
        assert offsets is not None
        yield str(input.dtype).removeprefix("torch.")
        yield f"{self.kind} offsets"
        yield from ["empty batch"] * (len(input) == 0)
        yield from ["1x1 image"] * (input.shape[2:] == (1, 1))
        yield from ["strided"] * (self.arguments["stride"] != (1, 1))
        yield from ["groups"] * (self.arguments["groups"] > 1)
        yield from ["position groups"] * (len(offsets) > 1)
        yield from ["channels not a multiple of 16"] * bool(weight.shape[0] % 16)


def make(seed: int) -> Case:
    """The case of a number, always the same."""
    pick, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    if seed < len(LARGE):
        (batch, *image), (c_in, c_out, groups) = LARGE[seed]
        size = tuple(image)
        kernel = (3, 3)
    else:
        c_in, c_out, groups = pick.choice((PRODUCT, PRODUCT, DEPTHWISE, SMALL_GROUPS)[seed % 4])
        batch, size = pick.choice([0, 1, 1, 2, 3]), pick.choice(SIZES)
        kernel = pick.choice([(3, 3), (3, 3), (1, 1), (2, 3), (1, 5), (5, 5)])
    dilation = (pick.choice([0, 1, 1, 2]), pick.choice([0, 1, 1, 2]))
    padding = [pick.randint(0, 3) for _ in range(4)]  # left, right, top, bottom
    for axis in range(2):  # at least one output pixel
        missing = dilation[axis] * (kernel[axis] - 1) + 1 - size[axis] - sum(padding[2 - 2 * axis : 4 - 2 * axis])
        padding[2 - 2 * axis] += max(missing, 0)
    stride = (pick.choice([1, 1, 2, 3]), pick.choice([1, 1, 2, 3]))
    positions = pick.choice([count for count in (1, 2, 3, 4, c_out) if c_out % count == 0])
    dtype = pick.choice([torch.float32, torch.float64])
    kind = KINDS[seed % len(KINDS)]
    input = torch.randn(batch, c_in, *size, generator=numbers, dtype=dtype)
    if pick.random() < 0.7:  # read where it is; others are converted first
        input = input.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in // groups, *kernel, generator=numbers, dtype=dtype)
    offsets = _offsets(kind, (positions, kernel[0] * kernel[1], 2), numbers)
    bias = torch.randn(c_out, generator=numbers, dtype=dtype) if pick.random() < 0.5 else None
    arguments = {"stride": stride, "padding": tuple(padding), "dilation": dilation, "groups": groups}
    needs = [True] * 4 if pick.random() < 0.7 else [pick.random() < 0.5 for _ in range(4)]
    return Case([input, weight, offsets, bias], arguments, needs, kind)


def _offsets(kind: str, shape: tuple[int, ...], numbers: torch.Generator) -> Tensor:
    offsets = torch.randn(shape, generator=numbers, dtype=torch.float64)
    if kind == "whole":
        return (offsets * 2).round()
    if kind == "wide":
        return offsets * 8
    if kind == "outside":
        return offsets + 100
    taps = offsets.flatten(0, 1)
    if kind == "mixed":  # a bounding box too large for the table of cells
        taps[::2] *= 40
    if kind == "far":
        taps[0], taps[-1, 1] = float("inf"), -1e9
    if kind == "nan":
        taps[-1, 0] = float("nan")
    return offsets


@contextmanager
def settings(taken: Counter[str]) -> Iterator[None]:
    """Two threads also for little work, and planes for half of what the rule gives to the product.

    ``taken`` counts the routes. Instruction set, threads and rule are as before afterwards.
    """
    isa, threads, limit = _vectors.current(), torch.get_num_threads(), cpu_backend._THREAD_WORK
    rule = cpu_backend._route

    def route(image: Tensor, weight: Tensor, output: Sequence[int], cell: Any, geometry: Any) -> Any:
        found = rule(image, weight, output, cell, geometry)
        if found == "product" and len(weight) % 2 and 0 not in (*image.shape, *output) and abs(cell).max() < 200:
            found = "planar"  # the rule avoids it where images are small, as those here
        taken[found] += 1
        return found

    cpu_backend._THREAD_WORK = 0
    cpu_backend._route = route
    try:
        yield
    finally:
        cpu_backend._route = rule
        _vectors.use(isa)
        torch.set_num_threads(threads)
        cpu_backend._THREAD_WORK = limit


def check(seed: int, one: Case, expected: dict[str, Tensor], what: str) -> None:
    """AssertionError where the kernels' numbers are not the reference's."""
    for name, found in one.run("cython").items():
        like = expected[name]
        if one.kind == "nan" and name != "output":
            continue  # which gradients are NaN is a matter of the tests
        tolerance = 1e-12 if found.dtype == torch.float64 and one.tensors[0].dtype == found.dtype else 3e-5  # type: ignore[union-attr]
        scale = like.nan_to_num().abs().max().clamp(min=1).item() if like.numel() else 1
        if not torch.allclose(found, like.to(found.dtype), rtol=0, atol=tolerance * scale, equal_nan=True):
            error = (found - like).abs().max().item() / scale
            raise AssertionError(f"{name} of case {seed} is wrong by {error:g} with {what}:\n{one}")


def exercise(seeds: range) -> None:
    """Every case, instruction set and number of threads."""
    covered: Counter[str] = Counter()
    calls = 0
    with settings(covered):
        for seed in seeds:
            one = make(seed)
            covered.update(one.features)
            torch.set_num_threads(1)
            expected = double(one).run("reference")
            for isa in _vectors.supported():
                _vectors.use(isa)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    check(seed, one, expected, f"{isa}, {threads} threads")
                    calls += 1
    print("; ".join(f"{feature}: {count}" for feature, count in sorted(covered.items())))
    print(f"{len(seeds)} cases, {calls} runs with {', '.join(_vectors.supported())}, all equal to the reference")


def double(one: Case) -> Case:
    """The case in float64, for the reference."""
    return Case([t if t is None else t.double() for t in one.tensors], one.arguments, one.needs, one.kind)


def resident() -> float:
    """Megabytes of memory that this process holds now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def leaks(calls: int, warm_up: int, limit: float) -> None:
    """AssertionError where a small layer's calls make the process grow by `limit` megabytes or more."""
    found = []
    layers = {"product": (40, 40, 1), "planar": (8, 24, 2), "channelwise": (17, 17, 17)}
    for name, (c_in, c_out, groups) in layers.items():
        tensors = [
            torch.randn(2, c_in, 9, 11).contiguous(memory_format=torch.channels_last),
            torch.randn(c_out, c_in // groups, 3, 3),
            torch.rand(1, 9, 2),
            torch.randn(c_out),
        ]
        arguments = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": groups}
        one = Case([*tensors], arguments, [True] * 4, "near")
        taken: Counter[str] = Counter()
        with settings(taken):
            one.run("cython")
        assert set(taken) == {name}
        for _ in range(warm_up):
            one.run("cython")
        before = resident()
        for _ in range(calls):
            one.run("cython")
        grown = resident() - before
        found.append(f"{name} {grown:+.2f} MB of {before:.0f} MB")
        if grown >= limit:
            raise AssertionError(f"the {name} route leaks: {grown:.2f} MB, {grown * 2**20 / calls:.0f} bytes a call")
    print(f"{', '.join(found)} after {calls} calls forward and backward")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=200, help="how many cases")
    parser.add_argument("--leaks", type=int, metavar="CALLS", help="instead, watch the memory over this many calls")
    parser.add_argument("--built-in", help="fail unless the package is the one in this folder")
    options = parser.parse_args()
    package = Path(lightning_acu.__file__).resolve()
    if options.built_in and not package.is_relative_to(Path(options.built_in).resolve()):
        raise SystemExit(f"{package} is not the package built in {options.built_in}")
    if reason := cpu_backend.why_not(torch.zeros(1, 1, 1, 1)):
        raise SystemExit(f"there are no kernels to check: {reason}")
    if options.leaks:
        leaks(options.leaks, warm_up=500, limit=2)
    else:
        exercise(range(options.first, options.first + options.cases))


if __name__ == "__main__":
    main()
