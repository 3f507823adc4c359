"""Depthwise layers with a set of positions for each channel, larger kernels, and active shifts: time over plain's.

Each row is a depthwise layer of a known network; a number is the processor time divided by that of ``F.conv2d`` on the
same tensors, both in turns, medians. (Processor time, not time on the clock: other programs on the machine disturb it
less.) "one set" and "channels" are ``position_groups`` 1 and "channels", with taps uniform within a pixel of the grid;
"dense" is "channels" without the compiled kernels. "shift" is an ActiveShift2d of the same channels, and "shift+1x1"
that and a 1x1 convolution over the layer and a 1x1 convolution (3x3 rows only).

    python benchmarks/depthwise.py --batch 1 16
"""

from __future__ import annotations

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_acu import acu_conv2d

#: (network, channels, image side, kernel side, stride)
LAYERS = [
    ("MobileNetV2", 32, 112, 3, 1),
    ("MobileNetV2", 96, 112, 3, 2),
    ("MobileNetV2", 144, 56, 3, 1),
    ("EfficientNet", 480, 14, 3, 1),
    ("EfficientNet", 240, 28, 5, 1),
    ("EfficientNet", 1152, 7, 5, 1),
    ("ConvNeXt-atto", 40, 56, 7, 1),
    ("ConvNeXt-atto", 80, 28, 7, 1),
    ("ConvNeXt-atto", 160, 14, 7, 1),
    ("ConvNeXt-atto", 320, 7, 7, 1),
    ("(wide)", 96, 28, 9, 1),
    ("(wide)", 96, 28, 11, 1),
    ("RepLKNet", 128, 28, 31, 1),  # (its 31x31 layers see 56x56)
]
METHODS = ["one set", "channels", "dense", "shift", "shift+1x1"]
PASSES = ["forward", "forward+backward"]

Step = tuple[Callable[[], Tensor], list[Tensor]]


def steps_of(channels: int, side: int, kernel: int, stride: int, batch: int, methods: list[str]) -> dict[str, Step]:
    """Of each method, and of plain: what computes the output, and the tensors that get gradients."""
    image = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels, 1, kernel, kernel).requires_grad_()
    pointwise = torch.randn(channels, channels, 1, 1).requires_grad_()
    ones = torch.ones(channels, 1, 1, 1)

    def offsets(groups: int, taps: int) -> Tensor:
        return (torch.rand(groups, taps, 2) * 2 - 1).requires_grad_()

    one, each, shifts = offsets(1, kernel**2), offsets(channels, kernel**2), offsets(channels, 1)
    own = {"stride": stride, "padding": kernel // 2, "groups": channels}

    def plain() -> Tensor:
        return F.conv2d(image, weight, **own)

    def active(positions: Tensor, backend: str = "auto") -> Callable[[], Tensor]:
        return lambda: acu_conv2d(image, weight, positions, backend=backend, **own)

    def shift() -> Tensor:
        return acu_conv2d(image, ones, shifts, stride=stride, groups=channels)

    for positions in (one, each):
        torch.testing.assert_close(active(positions)(), active(positions, "dense")(), rtol=1e-4, atol=1e-3)
    steps = {
        "plain": (plain, [image, weight]),
        "one set": (active(one), [image, weight, one]),
        "channels": (active(each), [image, weight, each]),
        "dense": (active(each, "dense"), [image, weight, each]),
    }
    if kernel == 3:
        steps["shift"] = (shift, [image, shifts])
        steps["plain+1x1"] = (lambda: F.conv2d(plain(), pointwise), [image, weight, pointwise])
        steps["shift+1x1"] = (lambda: F.conv2d(shift(), pointwise), [image, pointwise, shifts])
    wanted = {"plain", *methods} | ({"plain+1x1"} if "shift+1x1" in methods else set())
    return {name: step for name, step in steps.items() if name in wanted}


def without_gradients(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return forward()

    return call


def in_turns(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Median processor time of a call, in seconds; a sample lasts 5 ms at least, all samples of a call ``budget``."""

    def sample(call: Callable[[], object], repeats: int) -> float:
        began = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - began) / repeats

    for call in calls.values():  # warm up
        call()
    repeats = {name: max(1, round(5e-3 / sample(call, 2))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, shuffle = list(calls), random.Random(0).shuffle
    for turn in range(25):
        shuffle(names)
        for name in names:
            if turn < 3 or sum(times[name]) * repeats[name] < budget:
                times[name].append(sample(calls[name], repeats[name]))
    return {name: statistics.median(samples) for name, samples in times.items()}


def ratios(steps: dict[str, Step], budget: float) -> dict[str, dict[str, float]]:
    """{pass: {method: time over that of plain, plain's own in milliseconds}}."""
    grads = {name: torch.randn_like(forward()) for name, (forward, _) in steps.items()}
    calls = {
        PASSES[0]: {name: without_gradients(forward) for name, (forward, _) in steps.items()},
        PASSES[1]: {
            name: lambda f=forward, own=leaves, g=grads[name]: torch.autograd.grad(f(), own, g)
            for name, (forward, leaves) in steps.items()
        },
    }
    found = {}
    for direction, own in calls.items():
        times = in_turns(own, budget)
        over = {name: "plain+1x1" if name == "shift+1x1" else "plain" for name in times}
        found[direction] = {name: times[name] / times[over[name]] for name in METHODS if name in times}
        found[direction]["plain, ms"] = times["plain"] * 1e3
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--only", default="", help="a part of the names of layers, such as ConvNeXt or 7x7")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of processor time for each number")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for network, *sizes in LAYERS:
            channels, side, kernel, stride = sizes
            name = f"{network} {channels}@{side} {kernel}x{kernel}" + (f" s{stride}" if stride > 1 else "")
            if options.only not in name:
                continue
            for batch in options.batch:
                torch.manual_seed(0)
                found = ratios(steps_of(*sizes, batch, options.methods), options.budget)
                rows += [
                    {"layer": name, "threads": threads, "batch": batch, "pass": direction}
                    | {column: f"{own[column]:.2f}" if column in own else "" for column in (*METHODS, "plain, ms")}
                    for direction, own in found.items()
                ]
    if not rows:
        parser.error(f"--only {options.only!r} is in no layer's name; names are like 'ConvNeXt-atto 40@56 7x7'")
    table = Table(title=f"processor time over that of plain, torch {torch.__version__}")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "depthwise.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
