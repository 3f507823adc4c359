"""Measures which tiles and routes of the Triton backend are fastest on this GPU, and keeps them for later.

    python -m lightning_acu.ops.triton.tune                # some minutes; into the user's cache
    python -m lightning_acu.ops.triton.tune --seconds 60 --dtypes bfloat16 --out triton_tiles.json

A table of ``triton_tiles.json`` (:mod:`.tiles`) for the kind of GPU at hand, one entry for each class of
layers. Never run by a training step: without a table, or for classes it lacks, the rules there hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from . import tiles as choices
from .tiles import Tile, rounded, shape_class, tile_for

__all__ = ["LAYERS", "candidates", "main", "tune"]


class Layer(NamedTuple):
    """``channels`` in and out of a 3x3 convolution of an image of ``size`` x ``size`` pixels, 16 of them."""

    channels: tuple[int, int]
    size: int
    groups: int = 1


#: Those of ResNet and EfficientNet first: where time is short, the rest is left out.
LAYERS = (
    *(Layer((channels, channels), 3584 // channels) for channels in (64, 128, 256, 512)),
    *(Layer((channels, channels), 28, channels) for channels in (144, 480)),
    *(Layer(pair, 28) for pair in itertools.permutations((32, 64, 128, 256), 2)),
    *(Layer((channels, channels), 56) for channels in (16, 32)),
)
_BATCH = 16

#: Whether the GEMM route pays is known once so many channels have been measured.
_MANY = 512


def candidates(role: str, dtype: torch.dtype, depth: int, columns: int) -> Iterator[Tile]:
    """Tiles to try, none larger than the layer."""
    if role == "channelwise":
        yield from (Tile(m, n, 0, warps) for m in (8, 16, 32, 64) for n in (32, 64, 128) for warps in (4, 8))
        return
    depth, columns = rounded(depth), rounded(columns)
    steps = (16, 32, 64) if dtype == torch.float32 else (32, 64, 128)
    if role == "weight":
        sizes = itertools.product({min(n, columns) for n in (64, 128)}, {min(n, depth) for n in (64, 128)}, steps[:2])
    else:
        sizes = itertools.product((64, 128), {min(n, columns) for n in (64, 128, 256)}, {min(k, depth) for k in steps})
    yield from (Tile(*size, warps) for size in sizes for warps in (4, 8))


def _milliseconds(call: Callable[[], Any]) -> float:
    """By the GPU's clock, without the launches: as in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20))


def _calls(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], list[Tensor]]]:
    """What to time for each role; gives what it computed."""
    from . import cells as cell_route
    from . import channelwise as channelwise_route
    from . import product as product_route

    (c_in, c_out), size = layer.channels, layer.size

    def image(channels: int, size: int) -> Tensor:
        made = torch.randn(_BATCH, channels, size, size, device=device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last)

    geometry = ConvGeometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), layer.groups)
    strided = ConvGeometry((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), layer.groups)
    weight = torch.randn(c_out, c_in // layer.groups, 3, 3, device=device, dtype=dtype)
    offsets = torch.rand(1, 9, 2, device=device) * 2 - 1
    source, target, grad_input = image(c_in, size), image(c_out, size), image(c_in, size)
    if layer.groups > 1:

        def channelwise() -> list[Tensor]:
            channelwise_route.forward(source, weight, offsets, None, geometry, target)
            channelwise_route.input_gradient(target, weight, offsets, geometry, grad_input)
            return [target, grad_input, *channelwise_route.weight_gradient(target, source, weight, offsets, geometry)]

        return {"channelwise": channelwise}

    def product() -> list[Tensor]:
        product_route.forward(source, weight, offsets, None, geometry, target)
        return [target]

    def cells() -> list[Tensor]:  # (its depth is the output's channels, its columns are the input's)
        cell_route.input_gradient(half, weight, offsets, strided, grad_input)
        return [grad_input]

    half, grad = image(c_out, (size + 1) // 2), image(c_out, size)
    return {
        "product": product,
        "weight": lambda: list(cell_route.weight_gradient(grad, source, weight, offsets, geometry)),
        "cells": cells,
    }


def _time(
    call: Callable[[], list[Tensor]], expected: list[Tensor], milliseconds: Callable[[Callable[[], Any]], float]
) -> float:
    """Infinite for a kernel that does not compile, does not fit the chip, or computes something else."""
    import triton
    from triton.runtime.errors import TritonError

    try:
        found = call()
    except (TritonError, triton.CompilationError, RuntimeError) as error:  # the last by compiler passes and the driver
        print(f"  left out: {type(error).__name__}")
        return math.inf
    for one, other in zip(found, expected, strict=True):
        off = (one.double() - other.double()).norm() / other.double().norm()
        if not off < 0.02:  # roundings of bfloat16, summed in another order, are below a tenth of that
            print(f"  left out: off by {off:.1e}")
            return math.inf
    return milliseconds(call)


def tune(
    device: torch.device,
    dtypes: list[torch.dtype],
    out: Path,
    seconds: float = math.inf,
    layers: tuple[Layer, ...] = LAYERS,
    milliseconds: Callable[[Callable[[], Any]], float] = _milliseconds,
) -> dict[str, Any]:
    """Times every tile for every class of ``layers``; the table so far is in ``out`` after each.

    Returns:
        The table of this kind of GPU.
    """
    deadline = time.monotonic() + seconds
    arch = str(choices.arch_of(device))
    table = choices.table(choices.arch_of(device))
    tiles, gemm = table.setdefault("tiles", {}), table.setdefault("gemm_from", {})
    faster: dict[str, dict[int, bool]] = {}
    for dtype, layer in itertools.product(dtypes, layers):
        kind = str(dtype).removeprefix("torch.")
        for role, call in _calls(layer, dtype, device).items():
            depth, columns = layer.channels if role != "cells" else layer.channels[::-1]
            depth, columns = (1, columns) if role == "channelwise" else (depth, columns)
            if time.monotonic() > deadline:
                print("out of time; the rest keeps its rules")
                return table
            name = shape_class(role, dtype, depth, columns)
            before = tile_for(role, dtype, depth, columns, device)
            gemm[kind] = 2**31  # the fused product is what is timed
            _try(tiles, name, before)
            expected = [result.clone() for result in call()]
            times: dict[Tile, float] = {}
            for tile in dict.fromkeys([before, *candidates(role, dtype, depth, columns)]):
                if times and time.monotonic() > deadline:
                    break
                _try(tiles, name, tile)
                times[tile] = _time(call, expected, milliseconds)
            best = min(times, key=times.__getitem__)
            _try(tiles, name, best)
            print(f"{name}: {times[before]:.4f} ms with {tuple(before)}, {times[best]:.4f} ms with {tuple(best)}")
            if role == "product" and dtype != torch.float32 and depth == columns:
                gemm[kind] = 1
                by_gemm = _time(call, expected, milliseconds)
                print(f"{name}: {by_gemm:.4f} ms interpolated first")
                faster.setdefault(kind, {})[depth] = by_gemm < times[best]
            _settle(gemm, faster)
            _write(out, arch, table)
    return table


def _try(tiles: dict[str, Any], name: str, tile: Tile) -> None:
    tiles[name] = list(tile)
    tile_for.cache_clear()


def _settle(gemm: dict[str, int], faster: dict[str, dict[int, bool]]) -> None:
    """From how many channels on interpolating first has won throughout; the rule where so many were not measured."""
    gemm.clear()
    for kind, measured in faster.items():
        if max(measured) >= _MANY:
            gemm[kind] = 2**31
            for depth in sorted(measured, reverse=True):
                if not measured[depth]:
                    break
                gemm[kind] = depth


def _write(out: Path, arch: str, table: dict[str, Any]) -> None:
    """Other kinds of GPU in the file stay; a reader never sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(out.read_text()) if out.is_file() else {}
    draft = out.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(known | {arch: table}, indent=2) + "\n")
    draft.replace(out)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seconds", type=float, default=math.inf, help="try no further tile after that")
    parser.add_argument("--out", type=Path, default=choices.tuned_tiles(), help="default: the user's cache")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU here, and there is nothing to tune without one")
    dtypes = [getattr(torch, dtype) for dtype in options.dtypes]
    tune(torch.device("cuda", torch.cuda.current_device()), dtypes, options.out, options.seconds)
    print(f"{options.out} written")


if __name__ == "__main__":
    main()
