"""The operator against a plain convolution and its relatives, on the layers of well-known networks.

    python benchmarks/bench_acu_conv2d.py                     # CPU: 1 and 2 threads, 1 and 16 images; 8 GB
    python benchmarks/bench_acu_conv2d.py --quick             # a layer of each kind, one image, one thread: seconds
    python benchmarks/bench_acu_conv2d.py --memory            # peak memory instead of times
    python benchmarks/bench_acu_conv2d.py --device cuda --batch 32 --dtype bfloat16

"plain" is F.conv2d of the same layer without offsets; "ours" is ``acu_conv2d`` with ``--backend``; "dense" is
``acu_conv2d(backend="dense")``; "dcls" is Dcls2d of the package dcls, version "v1"; "deform" is
``torchvision.ops.deform_conv2d`` with the offsets at every pixel. All compute the same but plain: their outputs and
gradients are compared before they are timed. "forward" is without autograd; "forward+backward" has the gradients of
input, weight and positions. Ratios are to plain's median in the same rounds.

The 8 GB are those of dcls with 512 channels; it and deform take most of the time, and ``--methods plain ours dense``
leaves them out. With as many threads as cores the machine has to be idle: threads that wait for a busy core multiply
all times.
"""

import argparse
import csv
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from layers import KINDS, LAYERS, METHODS, Case, build, prepare
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from timing import device_name, in_turns, peak_memory, slug

from lightning_acu.ops import available_backends

FORWARD, BOTH = PASSES = "forward", "forward+backward"
COLOURS = {"ours": "#0072b2", "dense": "#999999", "dcls": "#e69f00", "deform": "#cc79a7"}
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
console = Console(width=None if sys.stdout.isatty() else 150)


def make_case(options, layer, batch):
    dtype, memory_format = getattr(torch, options.dtype), MEMORY_FORMATS[options.memory_format]
    return Case(layer, batch, options.device, dtype, memory_format, options.seed)


def measure(options, layer, threads, batch, problems):
    """A row for each pass and method."""
    torch.set_num_threads(threads)
    methods, grads, differences = prepare(make_case(options, layer, batch), options.methods, options.backend, problems)
    rows = []
    for what in PASSES:
        if what == FORWARD:
            calls = {name: method.forward for name, method in methods.items()}
        else:
            calls = {name: lambda m=method, g=grads[name]: m.step(g) for name, method in methods.items()}
        least = {name: 1 if name in ("dcls", "deform") else min(3, options.samples) for name in calls}
        with torch.set_grad_enabled(what != FORWARD):
            times = in_turns(calls, options.device, options.budget, options.samples, least)
        medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
        for name, median in medians.items():
            ratio = median / medians["plain"] if "plain" in medians else float("nan")
            rows.append(
                describe(options, layer, threads, batch)
                | {"pass": what, "method": name, "backend": options.backend if name == "ours" else ""}
                | {"milliseconds": round(median, 4), "ratio": round(ratio, 4), "samples": len(times[name])}
                | {"difference": f"{differences.get(name, 0):.1e}"}
            )
    return rows


def describe(options, layer, threads, batch):
    """What every row of a CSV file says first."""
    return {
        "device": device_name(options.device),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "memory_format": options.memory_format,
        "kind": layer.kind,
        "layer": layer.name,
        "threads": threads,
        "batch": batch,
    }


def measure_memory(options, layer, problems):
    """A row for each method, from a process of its own: peaks of one would hide those of the next."""
    threads, batch = max(options.threads), max(options.batch)
    found = {}
    for name in options.methods:
        command = [sys.executable, __file__, "--memory-of", layer.name, "--methods", name, "--backend", options.backend]
        command += ["--device", options.device, "--dtype", options.dtype, "--memory-format", options.memory_format]
        command += ["--threads", str(threads), "--batch", str(batch), "--seed", str(options.seed)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            found[name] = int(done.stdout.split()[-1])
        else:
            problems[f"{name} cannot run: {done.stderr.strip().splitlines()[-1][:200]}"] = None
    return [
        describe(options, layer, threads, batch)
        | {"pass": BOTH, "method": name, "backend": options.backend if name == "ours" else ""}
        | {"megabytes": round(peak / 1e6, 2), "ratio": round(peak / max(found.get("plain", 0), 1), 4)}
        for name, peak in found.items()
    ]


def print_memory_of(options, name):
    """In a process of its own: bytes of the second forward+backward of the layer; the first loads libraries."""
    torch.set_num_threads(max(options.threads))
    layer = next(layer for layer in LAYERS if layer.name == name)
    case = make_case(options, layer, max(options.batch))
    method = build(options.methods[0], case, options.backend)
    method.step(case.grad)
    print(peak_memory(lambda: method.step(case.grad), options.device))


def table(rows, value):
    """A line for each layer, threads and batch: plain's value, and ratios to it."""
    passes = [what for what in PASSES if any(row["pass"] == what for row in rows)]
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    columns = [(what, name) for what in passes for name in methods]
    made = Table(title=f"plain: {value}; others: ratio to plain", pad_edge=False)
    for text in ("layer", "threads", "batch"):
        made.add_column(text, no_wrap=text == "layer", justify="left" if text == "layer" else "right")
    for what, name in columns:
        made.add_column(f"{what.replace('forward', 'fwd').replace('backward', 'bwd')}\n{name}", justify="right")
    lines = {}
    for row in rows:
        key = row["layer"], str(row["threads"]), str(row["batch"])
        number = f"{row[value]:.2f}" if row["method"] == "plain" else f"{row['ratio']:.2f}"
        lines.setdefault(key, {})[row["pass"], row["method"]] = number
    for key, cells in lines.items():
        made.add_row(*key, *(cells.get(column, "") for column in columns))
    return made


def ratios(rows, **wanted):
    return [row["ratio"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def summary(rows):
    """The median ratio of each kind of layer, pass and method."""
    made = Table(title="median ratio to plain", pad_edge=False)
    methods = [name for name in METHODS[1:] if ratios(rows, method=name)]
    for text in ("kind", "pass", *methods):
        made.add_column(text, justify="right" if text in methods else "left")
    for kind in KINDS:
        for what in PASSES:
            found = [ratios(rows, kind=kind, method=name, **{"pass": what}) for name in methods]
            if any(found):
                made.add_row(kind, what, *(f"{statistics.median(r):.2f}" if r else "" for r in found))
    return made


def slower_than_dense(rows):
    """Sentences that count the layers, medians over threads and batches."""
    for what in PASSES:
        layers = dict.fromkeys(row["layer"] for row in rows if row["pass"] == what)
        pairs = [[ratios(rows, layer=at, method=m, **{"pass": what}) for m in ("ours", "dense")] for at in layers]
        speeds = [statistics.median(ours) / statistics.median(dense) for ours, dense in pairs if ours and dense]
        if speeds:
            slower, clearly = (sum(speed > limit for speed in speeds) for limit in (1, 1.05))
            yield f"{what}: ours is slower than dense on {slower} of {len(speeds)} layers, on {clearly} by over 5 %"


def chart(rows, path):
    """Bars of ratios to plain, a group for each layer: the median over threads and batches."""
    passes = [what for what in PASSES if any(row["pass"] == what for row in rows)]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    methods = [name for name in COLOURS if ratios(rows, method=name)]
    figure = Figure(figsize=(max(9, 2.5 + 0.5 * len(layers)), 3.6 * len(passes) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(passes), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / max(len(methods), 1)
    for axis, what in zip(axes, passes, strict=True):
        for place, name in enumerate(methods):
            found = [ratios(rows, layer=layer, method=name, **{"pass": what}) for layer in layers]
            heights = [statistics.median(r) if r else float("nan") for r in found]
            at = [index + (place - (len(methods) - 1) / 2) * width for index in range(len(layers))]
            axis.bar(at, heights, width, color=COLOURS[name], label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(ylabel=f"{what}, x plain (log scale)", xlim=(-0.6, len(layers) - 0.4))
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#dddddd")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=max(len(methods), 1), loc="outside upper center")
    axes[-1].set_xticks(range(len(layers)), layers, rotation=45, ha="right", fontsize=8)
    first, what = rows[0], "peak memory" if "megabytes" in rows[0] else "time"
    axes[0].set_title(f"{what} against F.conv2d: {first['device']}, {first['dtype']}, {first['memory_format']}")
    figure.savefig(path, dpi=120)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="auto", help=f"of ours: {', '.join(available_backends())}")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2 on the CPU, 1 on CUDA")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 16")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--memory-format", default="channels_last", choices=list(MEMORY_FORMATS))
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--only", default="", help="a regular expression that finds something in a layer's name")
    parser.add_argument("--budget", type=float, help="seconds for each number (default 0.6; 0.1 if --quick)")
    parser.add_argument("--samples", type=int, help="at most as many for each number (default 15; 3 if --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of offsets and images")
    parser.add_argument("--quick", action="store_true", help="other defaults: few numbers of little precision")
    parser.add_argument("--memory", action="store_true", help="peak memory of forward+backward, not times")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of CSV and chart")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    options.threads = options.threads or ([1] if options.quick or options.device == "cuda" else [1, 2])
    options.batch = options.batch or ([1] if options.quick else [1, 16])
    options.budget = options.budget or (0.1 if options.quick else 0.6)
    options.samples = options.samples or (3 if options.quick else 15)
    options.layers = [layer for layer in LAYERS if layer.kind in options.kind and re.search(options.only, layer.name)]
    if options.quick and not options.only:
        options.layers = list({layer.kind: layer for layer in reversed(options.layers)}.values())[::-1]
    if not options.layers and options.memory_of is None:
        parser.error(f"--kind and --only leave none of: {', '.join(layer.name for layer in LAYERS)}")
    return options


def main():
    options = arguments()
    if options.device == "cuda":  # all at their best, and matrix products as precise as cuDNN's convolutions: TF32
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if options.memory_of is not None:
        return print_memory_of(options, options.memory_of)

    options.out.mkdir(parents=True, exist_ok=True)
    parts = ["acu_conv2d", *["memory"] * options.memory, slug(device_name(options.device)), options.dtype]
    path = options.out / ("_".join([*parts, options.memory_format, *["quick"] * options.quick]) + ".csv")
    rows, problems = [], {}
    with path.open("w", newline="") as file:
        for index, layer in enumerate(options.layers):
            print(f"{index + 1}/{len(options.layers)} {layer.name}", file=sys.stderr, flush=True)
            if options.memory:
                new = measure_memory(options, layer, problems)
            else:
                pairs = [(threads, batch) for threads in options.threads for batch in options.batch]
                new = [row for pair in pairs for row in measure(options, layer, *pair, problems)]
            if new and not rows:
                writer = csv.DictWriter(file, new[0])
                writer.writeheader()
            if new:
                writer.writerows(new)
                file.flush()  # what was measured stays, should a run be stopped
            rows += new
    if rows:
        console.print(table(rows, "megabytes" if options.memory else "milliseconds"), summary(rows))
        for sentence in [] if options.memory else slower_than_dense(rows):
            print(sentence)
        chart(rows, path.with_suffix(".png"))
        print(f"{path} and {path.with_suffix('.png').name} written")
    for problem in problems:
        print(problem)
    return None


if __name__ == "__main__":
    main()
