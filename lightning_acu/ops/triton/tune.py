"""Measures which tiles and routes of the Triton backend are fastest on this GPU, and keeps them for later.

``lightning-acu tune`` calls it before it compares backends. It writes a table of ``triton_tiles.json``
(:mod:`.tiles`) for the kind of GPU at hand, with one entry for each class of layers. Processes that start later use it;
without a table, or for classes it lacks, the rules of :mod:`.tiles` hold.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...files import write_whole
from ...geometry import ConvGeometry
from ..autoselect import Call
from . import tiles
from .tiles import Tile, dtype_name, rounded, shape_class, tile_for

__all__ = ["LAYERS", "Layer", "candidates", "layers_of", "tune"]


class Layer(NamedTuple):
    """``channels`` in and out of a 3x3 convolution of 64 images of ``size`` x ``size`` pixels.

    ``groups``: 1, or that of the channels.
    """

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
_BATCH = 64  # fewer would leave multiprocessors of large GPUs idle

#: Where the GEMM route begins is settled once a layer of so many channels has been measured.
_SETTLED_AT = 512


def candidates(role: str, dtype: torch.dtype, c_read: int, c_write: int) -> Iterator[Tile]:
    """Tiles to try, none larger than the layer; arguments as in :func:`.tiles.tile_for`."""
    if role == "channelwise":
        yield from (Tile(m, n, 0, warps) for m in (8, 16, 32, 64) for n in (32, 64, 128) for warps in (4, 8))
        return
    stages = (1, 3)  # loads of the next steps overlap with the product of this one
    c_read, c_write = rounded(c_read), rounded(c_write)
    steps = (16, 32, 64) if dtype == torch.float32 else (32, 64, 128)
    if role == "weight":
        sizes = itertools.product({min(m, c_write) for m in (64, 128)}, {min(n, c_read) for n in (64, 128)}, steps[:2])
    else:
        sizes = itertools.product((64, 128), {min(n, c_write) for n in (64, 128, 256)}, {min(k, c_read) for k in steps})
    yield from (Tile(*size, warps, depth) for size in sizes for warps in (4, 8) for depth in stages)


def layers_of(calls: Iterable[Call]) -> tuple[Layer, ...]:
    """A layer for each class that tiles are kept for, of the forward passes among ``calls``.

    Grouped convolutions that are not depthwise share the classes of ordinary ones and are left out.
    """
    found: dict[tuple[int, ...], Layer] = {}
    for call in calls:
        (_, c_in, height, width), c_out, groups = call.input, call.weight[0], call.geometry.groups
        if call.needs is None and groups in (1, c_in):
            layer = Layer((c_in, c_out), max(height, width), groups)
            found.setdefault((groups > 1, rounded(c_in // groups), rounded(c_out)), layer)
    return tuple(found.values())


def _milliseconds(call: Callable[[], Any]) -> float:
    """By the GPU's clock, without the launches: as in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20))


class Work(NamedTuple):
    """What to time for a role: channels as :func:`.tiles.tile_for` takes them, and runs that return their results."""

    c_read: int
    c_write: int
    run: Callable[[Tile], list[Tensor]]
    run_by_gemm: Callable[[], list[Tensor]] | None = None  # the other route, where a layer has the choice


def _work(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Work]:
    """The roles of a layer."""
    from . import cells, channelwise, gemm, product

    (c_in, c_out), size = layer.channels, layer.size

    def image(channels: int, size: int) -> Tensor:
        made = torch.randn(_BATCH, channels, size, size, device=device, dtype=dtype)
        return made.contiguous(memory_format=torch.channels_last)

    geometry = ConvGeometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), layer.groups)
    strided = ConvGeometry((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), layer.groups)
    weight = torch.randn(c_out, c_in // layer.groups, 3, 3, device=device, dtype=dtype)
    offsets = torch.rand(1, 9, 2, device=device, dtype=torch.float32) * 2 - 1
    input, output, grad_input = image(c_in, size), image(c_out, size), image(c_in, size)
    if layer.groups > 1:

        def run_channelwise(tile: Tile) -> list[Tensor]:
            channelwise.forward(input, weight, offsets, None, geometry, output, tile)
            channelwise.input_gradient(output, weight, offsets, geometry, grad_input, tile)
            return [
                output,
                grad_input,
                *channelwise.weight_gradient(output, input, weight, offsets, geometry, tile),
            ]

        return {"channelwise": Work(1, c_out, run_channelwise)}

    grad, strided_grad = image(c_out, size), image(c_out, (size + 1) // 2)

    def run_product(tile: Tile) -> list[Tensor]:
        product.forward(input, weight, offsets, None, geometry, output, tile)
        return [output]

    def run_gemm() -> list[Tensor]:
        packed = product.pack_weight(weight, geometry, mirrored=False)
        gemm.product(input, packed, offsets, None, geometry, output, geometry.stride, mirrored=False)
        return [output]

    def run_weight(tile: Tile) -> list[Tensor]:
        return list(cells.weight_gradient(grad, input, weight, offsets, geometry, tile))

    def run_cells(tile: Tile) -> list[Tensor]:
        cells.input_gradient(strided_grad, weight, offsets, strided, grad_input, tile)
        return [grad_input]

    has_choice = dtype != torch.float32 and c_in == c_out
    return {
        "product": Work(c_in, c_out, run_product, run_gemm if has_choice else None),
        "weight": Work(c_in, c_out, run_weight),
        "cells": Work(c_out, c_in, run_cells),
    }


def _time(
    call: Callable[[], list[Tensor]], expected: list[Tensor], milliseconds: Callable[[Callable[[], Any]], float]
) -> float:
    """Infinite for a kernel that does not compile, does not fit the chip, or computes something else."""
    import triton
    from triton.runtime.errors import TritonError

    try:
        results = call()
    except (TritonError, triton.CompilationError, RuntimeError) as error:  # the last by compiler passes and the driver
        print(f"  left out: {type(error).__name__}")
        return math.inf
    for result, right in zip(results, expected, strict=True):
        off = (result.double() - right.double()).norm() / right.double().norm()
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
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times every tile for every class of ``layers``; the table so far is in ``out`` after each.

    Args:
        device: a GPU.
        dtypes: of the images.
        out: the file to write; other kinds of GPU in it stay.
        seconds: try no further tile after that.
        layers: what to time.
        milliseconds: how long a call takes.
        say: is told of each class, as it is measured.

    Returns:
        The table of this kind of GPU: the one in use, with what was measured.

    Raises:
        OSError: ``out`` cannot be written.
        RuntimeError: the file ``out`` is damaged.
    """
    tiles.read_tables(out)  # an error now, and not when the first class has been measured
    deadline = time.monotonic() + seconds
    arch = tiles.arch_of(device)
    table: dict[str, Any] = {"tiles": {}, "gemm_from": {}} | copy.deepcopy(dict(tiles.table(arch)))
    for dtype in dtypes:
        gemm_is_faster: dict[int, bool] = {}  # by channels
        for layer in layers:
            for role, work in _work(layer, dtype, device).items():
                if time.monotonic() > deadline:
                    say("out of time; the rest keeps its rules")
                    return table
                name = shape_class(role, dtype, work.c_read, work.c_write)
                tuned = table["tiles"].get(name)
                before = Tile(*tuned) if tuned else tile_for(role, dtype, work.c_read, work.c_write, device)
                expected = [result.clone() for result in work.run(before)]
                times: dict[Tile, float] = {}
                for tile in dict.fromkeys([before, *candidates(role, dtype, work.c_read, work.c_write)]):
                    if times and time.monotonic() > deadline:
                        break
                    times[tile] = _time(functools.partial(work.run, tile), expected, milliseconds)
                best = min(times, key=times.__getitem__)
                table["tiles"][name] = list(best)
                say(f"{name}: {times[before]:.4f} ms with {tuple(before)}, {times[best]:.4f} ms with {tuple(best)}")
                if work.run_by_gemm is not None:
                    by_gemm = _time(work.run_by_gemm, expected, milliseconds)
                    say(f"{name}: {by_gemm:.4f} ms interpolated first")
                    gemm_is_faster[work.c_read] = by_gemm < times[best]
                    if max(gemm_is_faster) >= _SETTLED_AT:
                        table["gemm_from"][dtype_name(dtype)] = _gemm_from(gemm_is_faster)
                _write(out, str(arch), table)
    return table


def _gemm_from(is_faster: dict[int, bool]) -> int:
    """From how many channels on the GEMM route has won throughout."""
    gemm_from = 2**31
    for channels in sorted(is_faster, reverse=True):
        if not is_faster[channels]:
            break
        gemm_from = channels
    return gemm_from


def _write(out: Path, arch: str, table: dict[str, Any]) -> None:
    """Other kinds of GPU in the file stay; a reader never sees half of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    tables = tiles.read_tables(out)
    text = json.dumps(tables | {arch: table}, indent=2) + "\n"
    write_whole(out, lambda draft: draft.write_text(text))
