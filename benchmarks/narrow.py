"""Layers of few channels: the Cython backend and the dense one against the faster of F.conv2d's two memory formats.

    python benchmarks/narrow.py                # a table on the screen, and a CSV file
    python benchmarks/narrow.py --only 5x5

One thread. For each layer all methods take turns, in both memory formats of the input; CPU time counts. Ratios above 1
are slower than plain. Taps are uniform within a pixel of the grid; outputs are compared first.
"""

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import device_name
from torch import Tensor
from torch.nn import functional as F

from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import dense
from lightning_acu.ops.cpu import backend as cython

#: (channels in, channels out, image side, batch, kernel side, stride, groups)
LAYERS = [
    (4, 4, 28, 64, 3, 1, 1), (8, 8, 14, 64, 3, 1, 1), (16, 16, 7, 64, 3, 1, 1), (12, 12, 32, 64, 3, 1, 1),
    (24, 24, 16, 64, 3, 1, 1), (48, 48, 8, 64, 3, 1, 1), (16, 16, 64, 8, 3, 1, 1),
    (1, 8, 28, 64, 3, 1, 1), (3, 12, 32, 64, 3, 1, 1), (3, 32, 64, 16, 3, 2, 1),
    (4, 8, 28, 64, 3, 2, 1), (8, 16, 14, 64, 3, 2, 1), (12, 24, 32, 64, 3, 2, 1), (24, 48, 16, 64, 3, 2, 1),
    (16, 32, 64, 8, 3, 2, 1),
    (4, 4, 28, 64, 5, 1, 1), (8, 8, 14, 64, 5, 1, 1), (12, 12, 32, 16, 5, 1, 1), (16, 16, 64, 4, 5, 1, 1),
    (24, 24, 16, 32, 5, 1, 1),
    (4, 4, 28, 64, 3, 1, 4), (12, 12, 32, 64, 3, 1, 12), (24, 24, 16, 64, 3, 1, 24), (48, 48, 8, 64, 3, 1, 48),
    (64, 64, 28, 8, 3, 1, 16), (128, 128, 28, 4, 3, 1, 32), (128, 128, 14, 8, 3, 1, 16), (48, 48, 28, 8, 3, 1, 2),
]  # fmt: skip
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Call = Callable[[], object]


def name_of(layer: tuple[int, ...]) -> str:
    """As in the table: 12 -> 24 @32, 3x3, stride 2."""
    c_in, c_out, side, _, kernel, stride, groups = layer
    text = f"{c_in} -> {c_out} @{side}, {kernel}x{kernel}"
    return text + (f", stride {stride}" if stride > 1 else "") + (f", {groups} groups" if groups > 1 else "")


def calls(layer: tuple[int, ...], layout: str) -> dict[str, tuple[Call, Call]]:
    """{method: (forward, backward)} of one layer; backward gives all gradients."""
    c_in, c_out, side, batch, kernel, stride, groups = layer
    torch.manual_seed(0)
    image = torch.randn(batch, c_in, side, side).contiguous(memory_format=FORMATS[layout])
    weight, bias = torch.randn(c_out, c_in // groups, kernel, kernel), torch.randn(c_out)
    offsets = torch.rand(1, kernel * kernel, 2) * 2 - 1
    offsets[:, kernel * kernel // 2] = 0
    geometry = ConvGeometry((kernel, kernel), (stride,) * 2, (kernel // 2,) * 4, groups=groups)
    plain = (weight, bias, stride, kernel // 2, 1, groups)
    grad = torch.randn_like(F.conv2d(image, *plain))
    sides = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups, [True] * 3)

    def ours(backend: object) -> tuple[Call, Call]:
        return (
            lambda: backend.forward(image, weight, offsets, bias, geometry),
            lambda: backend.backward(grad, image, weight, offsets, geometry, (True,) * 3),
        )

    found: dict[str, tuple[Call, Call]] = {
        "plain": (
            lambda: F.conv2d(image, *plain),
            lambda: torch.ops.aten.convolution_backward(grad, image, weight, [c_out], *sides),
        ),
        "cython": ours(cython),
        "dense": ours(dense),
    }
    for direction in range(2):
        results: list[list[Tensor]] = []
        for method in ("cython", "dense"):
            result = found[method][direction]()
            results.append([result] if isinstance(result, Tensor) else list(result))
        for one, other in zip(*results, strict=True):
            if (difference := (one - other).norm() / other.norm()) > 1e-4:
                raise RuntimeError(f"{name_of(layer)}: cython and dense differ by {difference:.1e}")
    return found


def measure(layer: tuple[int, ...], seconds: float) -> dict[str, float]:
    """{method, format, pass: CPU time over that of plain in its faster format}, medians."""
    todo = {(method, layout): pair for layout in FORMATS for method, pair in calls(layer, layout).items()}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in todo}
    began, rounds = time.process_time(), 0
    while rounds < 4 or time.process_time() - began < seconds:
        for key, (forward, backward) in todo.items():
            start = time.process_time()
            forward()
            middle = time.process_time()
            backward()
            if rounds:  # the first one warms up
                times[key].append((middle - start, time.process_time() - start))
        rounds += 1
    ratios: dict[str, float] = {}
    for index, direction in enumerate(("forward", "forward + backward")):
        medians = {key: statistics.median(sample[index] for sample in own) for key, own in times.items()}
        best = min(medians["plain", layout] for layout in FORMATS)
        for method in ("cython", "dense"):
            for layout in FORMATS:
                ratios[f"{method}, {layout}, {direction}"] = round(medians[method, layout] / best, 3)
    return ratios


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="layers whose name contains it")
    parser.add_argument("--seconds", type=float, default=2, help="for a layer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of narrow.csv")
    options = parser.parse_args(argv)
    layers = [layer for layer in LAYERS if options.only in name_of(layer)]
    if not layers:
        parser.error(f"--only {options.only!r}: no layer is called so; there are {', '.join(map(name_of, LAYERS))}")
    torch.set_num_threads(1)
    print(f"{device_name('cpu')}, torch {torch.__version__}, Python {platform.python_version()}")
    lines = []
    for layer in layers:
        ratios = measure(layer, options.seconds)
        lines.append({"layer": name_of(layer), "batch": layer[3], **ratios})
        shown = (
            f"{direction}: "
            + ", ".join(
                f"{method} " + " / ".join(f"{ratios[f'{method}, {layout}, {direction}']:.2f}" for layout in FORMATS)
                for method in ("cython", "dense")
            )
            for direction in ("forward", "forward + backward")
        )
        print(f"{name_of(layer):32} " + "   ".join(shown), flush=True)
    for direction in ("forward", "forward + backward"):
        ours = [line[f"cython, {layout}, {direction}"] for line in lines for layout in FORMATS]
        print(f"cython, {direction}: median {statistics.median(ours):.2f}, at most {max(ours):.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "narrow.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
