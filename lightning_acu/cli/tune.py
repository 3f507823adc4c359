"""``lightning-acu tune``: measure which tiles and which backend each layer of a model takes on this machine."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from ..models import create_model
from ..ops.autoselect import Call, Selector, Verdict, selector_of
from ..ops.autoselect.verdicts import Store
from ..ops.triton.tiles import tuned_tiles
from ..ops.triton.tune import layers_of
from ..ops.triton.tune import tune as tune_tiles
from ..surgery import convert_to_acu
from ..tuning import model_calls, tune_calls
from .errors import Parser

__all__ = ["dry_run_selector", "make_parser", "run", "verdict_table"]

_MODELS = ("resnet50", "efficientnet_b0")


def make_parser() -> Parser:
    """The options."""
    parser = Parser("tune", "measure which backend is fastest for each layer, and keep it for later processes")
    parser.add_argument("--model", nargs="+", default=_MODELS, metavar="NAME", help="default: " + " ".join(_MODELS))
    parser.add_argument("--input_size", type=int, nargs=3, default=(3, 224, 224), metavar=("C", "H", "W"))
    parser.add_argument("--batch", type=int, default=32, metavar="N")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--channels_last", action="store_true", help="images in that memory format")
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    parser.add_argument(
        "--only",
        choices=["tiles", "backends"],
        help="default: both; tiles are those of Triton's kernels, on a GPU alone",
    )
    parser.add_argument(
        "--tile_seconds", type=float, default=300, metavar="S", help="try no further tile after that (default: 300)"
    )
    parser.add_argument(
        "--dry_run", choices=sorted(_FAKE), metavar="KIND", help=f"nothing runs; a made-up GPU: {', '.join(_FAKE)}"
    )
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu tune [--model NAME ...]``."""
    parser = make_parser()
    options = parser.parse_args(words[1:])
    if options.batch < 1:
        parser.error(f"--batch (={options.batch}) must be at least 1")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.dry_run is None and device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no GPU here")
    if options.dry_run is not None:
        selector = dry_run_selector(options.dry_run)
    else:
        selector = selector_of(device)
        if selector.mode == "off":
            parser.error("LIGHTNING_ACU_AUTO=off: choices would be neither kept nor used")
    if options.only == "tiles" and selector.device.type != "cuda":
        parser.error(f"--only tiles: Triton's kernels run on GPUs, and the device is {selector.device.type}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    every = {name: _calls(name, options, selector.device) for name in options.model}
    if options.only != "backends" and selector.device.type == "cuda":  # first: backends are compared with these tiles
        _tune_tiles(itertools.chain(*every.values()), options, selector.device)
    for name, calls in {} if options.only == "tiles" else every.items():
        found = []
        for number, (call, verdict) in enumerate(tune_calls(calls, selector, options.again), 1):
            print(f"\r{name}: {number} of {len(calls)}", end="", file=sys.stderr, flush=True)
            found.append((call, verdict))
        print(file=sys.stderr)
        console.print(verdict_table(name, found))
    if options.dry_run is not None:
        print("nothing was run or kept")
    elif options.only != "tiles":
        print(f"kept in {selector.store.path}")


def _tune_tiles(calls: Iterable[Call], options: argparse.Namespace, device: torch.device) -> None:
    """Measure the tiles of all classes of layers among ``calls`` and say where they are kept."""
    layers = layers_of(calls)
    if options.dry_run is not None:
        for (c_in, c_out), size, groups in layers:
            kind = "depthwise" if groups > 1 else "3x3"
            print(f"tiles: would be measured for {kind}, {c_in}->{c_out}, {size}x{size} pixels")
        return
    path = tuned_tiles()
    tune_tiles(device, [getattr(torch, options.dtype)], path, options.tile_seconds, layers)
    print(f"tiles kept in {path}")


def _calls(name: str, options: argparse.Namespace, device: torch.device) -> list[Call]:
    """The calls of a training step of a model on ``device``, found by a pass of one image on the CPU."""
    model = convert_to_acu(create_model(name))
    on_gpu = device.type == "cuda"
    seen = model_calls(model, torch.zeros(1, *options.input_size, dtype=torch.float32, device="cpu"))
    calls = [
        call._replace(
            device=device.type,
            dtype=options.dtype,
            channels_last=options.channels_last,
            input=(options.batch, *call.input[1:]),
            threads=0 if on_gpu else call.threads,
        )
        for call in seen
    ]
    return list({call.signature: call for call in calls}.values())


def verdict_table(title: str, found: Sequence[tuple[Call, Verdict]]) -> Table:
    """A row for each call: its choice, and the times it rests on."""
    table = Table("call", "backend", "milliseconds", "why", title=title, pad_edge=False)
    for call, verdict in found:
        times = ", ".join(f"{name} {1e3 * seconds:.3f}" for name, seconds in verdict.seconds.items())
        why = "; ".join(filter(None, [verdict.outcome, verdict.detail]))
        table.add_row(call.signature, verdict.backend or "by the rule", times, why)
    return table


#: Made-up GPUs: what Triton does there. "estimated" has the bounds that compiled code gives (ops/triton/README.md).
_FAKE = {
    "estimated": "measured",
    "wrong": "wrong",
    "crash": "crashed",
    "memory": "out of memory",
}


def dry_run_selector(kind: str) -> Selector:
    """A selector of a made-up GPU, whose times follow from a call's arithmetic; nothing runs and nothing is kept.

    Args:
        kind: "estimated" (Triton as fast as estimated), "wrong", "crash" or "memory" (what happens to Triton).
    """

    def measure(call: Call, device: torch.device, rule: str, positions: object) -> Verdict:
        seconds = {"triton": _estimate(call, "triton"), "dense": _estimate(call, "dense")}
        outcome = _FAKE[kind]
        if outcome == "out of memory":
            return Verdict(None, outcome)
        if outcome != "measured":
            return Verdict("dense", outcome, {"dense": seconds["dense"]})
        return Verdict("triton" if seconds["triton"] <= 0.95 * seconds["dense"] else "dense", outcome, seconds)

    return Selector(torch.device("cuda"), Store(None, f"made-up GPU {kind}"), measure, "measure")


def _estimate(call: Call, backend: str) -> float:
    """Seconds on a chip of 500 TFLOP/s: plain, times what the backend adds to it.

    Triton's factors are the bounds of ops/triton/README.md over a plain convolution's at 65 % of the chip's rate (788
    clocks for 2^20 multiply-adds): 2592 and 1664 forward, 672 to 832 and the traffic through L2 from 256 channels on,
    and 696 x 25/9 for the weight.
    """
    batch, c_in, height, width = call.input
    pixels = batch * height * width / (call.geometry.stride[0] * call.geometry.stride[1])
    plain = 2 * pixels * call.weight[0] * (c_in // call.geometry.groups) * call.geometry.taps / 5e14
    forward = 3.3 if c_in <= 64 else 2.1 if c_in < 256 else 1.35
    if backend == "dense":
        factor = (call.geometry.kernel_size[0] + 2) ** 2 / call.geometry.taps
    else:
        factor = forward if call.needs is None else (forward + 2.45) / 2
    return plain * factor * (1 if call.needs is None else sum(call.needs[:2]))
