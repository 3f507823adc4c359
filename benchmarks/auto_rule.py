"""The Cython backend's time divided by the dense one's, where it is not obvious which is faster.

This is what the rule of ``backend="auto"`` rests on (``lightning_acu/ops/cpu/backend.py``, ``prefers``): narrow groups,
many position groups, positions on the lattice, few channels, low precision.

    python benchmarks/auto_rule.py --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import dense
from lightning_acu.ops.cpu import backend as cpu_backend

#: (C_in, C_out, image side, kernel side, groups, position groups)
LAYERS = [
    (64, 64, 56, 3, 1, 1),
    (256, 256, 14, 3, 1, 1),
    (144, 144, 56, 3, 144, 1),
    (144, 144, 28, 3, 144, 144),
    (32, 64, 28, 3, 32, 1),
    *((64, 64, 28, 3, 1, p) for p in (2, 4, 8, 16)),
    *((256, 256, 14, 3, 1, p) for p in (8, 16, 32, 256)),
    *((128, 128, 28, 3, g, 1) for g in (4, 8, 16, 32)),
    (72, 72, 28, 3, 3, 1),
    (120, 120, 28, 3, 15, 1),
    (3, 32, 112, 3, 1, 1),
    (1, 16, 28, 5, 1, 1),
    (64, 4, 56, 3, 1, 1),
]


def draw_offsets(kind: str, position_groups: int, taps: int) -> torch.Tensor:
    """(P, K, 2) offsets: "zero", whole numbers ("rounded"), or uniform in (-1, 1) ("between")."""
    offsets = torch.rand(position_groups, taps, 2) * 2 - 1
    offsets[:, taps // 2] = 0
    return {"zero": offsets * 0, "rounded": (offsets * 1.5).round(), "between": offsets}[kind]


def ratios(layer: tuple[int, ...], batch: int, kind: str, dtype: torch.dtype, repetitions: int) -> list[float]:
    """Cython over dense: forward, backward, and backward without the gradient of positions."""
    c_in, c_out, side, kernel, groups, position_groups = layer
    input = torch.randn(batch, c_in, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in // groups, kernel, kernel, dtype=dtype)
    offsets = draw_offsets(kind, position_groups, kernel * kernel)
    geometry = ConvGeometry((kernel, kernel), padding=(kernel // 2,) * 4, groups=groups)
    grad = torch.randn_like(dense.forward(input, weight, offsets, None, geometry))
    calls = [
        (backend.forward, (input, weight, offsets, None, geometry)) for backend in (cpu_backend, dense)
    ] + [
        (backend.backward, (grad, input, weight, offsets, geometry, needs))
        for needs in ((True, True, True), (True, True, False))
        for backend in (cpu_backend, dense)
    ]  # fmt: skip
    times: list[list[float]] = [[] for _ in calls]
    for repetition in range(repetitions + 1):
        for (call, arguments), found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(*arguments)
            if repetition:  # the first one warms up
                found.append(time.perf_counter() - start)
    medians = [statistics.median(found) for found in times]
    return [ours / theirs for ours, theirs in zip(medians[::2], medians[1::2], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    table = Table(title=f"cython / dense, {options.dtype}, batch {options.batch}, {options.threads} thread(s)")
    for column in ("layer", "groups", "position groups", "offsets", "forward", "backward", "without positions", "auto"):
        table.add_column(column)
    for layer in LAYERS:
        c_in, c_out, side, kernel, groups, position_groups = layer
        for kind in ("between", "rounded", "zero") if position_groups == 1 and side in (14, 56) else ("between",):
            dtype = getattr(torch, options.dtype)
            found = ratios(layer, options.batch, kind, dtype, options.repetitions)
            geometry = ConvGeometry((kernel, kernel), padding=(kernel // 2,) * 4, groups=groups)
            offsets = draw_offsets(kind, position_groups, kernel * kernel)
            weight = torch.empty(c_out, c_in // groups, kernel, kernel)
            chosen = [
                "cython" if cpu_backend.prefers(weight, weight, offsets, geometry, needs) else "dense"
                for needs in (None, (True, True, True))
            ]
            size = f"{c_in}->{c_out} {kernel}x{kernel} @{side}"
            table.add_row(
                size, str(groups), str(position_groups), kind, *(f"{ratio:.2f}" for ratio in found), "/".join(chosen)
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
