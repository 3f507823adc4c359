"""The operator against a plain convolution and its relatives, on the layers of well-known networks.

    python benchmarks/bench_acu_conv2d.py                     # CPU: 1 and 2 threads, 1 and 16 images; 8 GB
    python benchmarks/bench_acu_conv2d.py --quick             # a layer of each kind, one image, one thread: seconds
    python benchmarks/bench_acu_conv2d.py --memory            # peak memory instead of times
    python benchmarks/bench_acu_conv2d.py --device cuda --backend triton --batch 64 --dtype bfloat16

"plain" is F.conv2d of the same layer without offsets; "ours" is ``acu_conv2d`` with ``--backend``; "dense" is
``acu_conv2d(backend="dense")``; "dcls" is Dcls2d of the package dcls, version "v1"; "deform" is
``torchvision.ops.deform_conv2d`` with the offsets at every pixel; with "-autocast" their parameters stay in float32
(``methods.py``). All compute the same but plain: their outputs and gradients are compared with float32 before they are
timed. "forward" is without autograd; "forward+backward" has the gradients of input, weight and positions. Ratios are to
plain's median in the same rounds. On CUDA, launch "graph" replays a CUDA graph, which is the GPU's time alone; "eager"
has the host's in it. float32 there is TF32 unless ``--no-tf32``. Every call has the same tensors: where they fit into a
cache, all methods find them there; 64 images of the first ResNet layer do not fit into an H100's.

What a method cannot do is reported at the end; the exit status is 1 where that is plain, ours or dense.

The 8 GB are those of dcls with 512 channels; it and deform take most of the time, and ``--methods plain ours dense``
leaves them out. With as many threads as cores the machine has to be idle: threads that wait for a busy core multiply
all times.
"""

import argparse
import csv
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from layers import KINDS, LAYERS, Case
from methods import TOLERANCES, build, methods_for, prepare
from tables import BOTH, FORWARD, METHODS, PASSES, PEERS, Problems, brief, layer_tables, slower_than_dense, summary
from timing import CapturedCalls, device_name, in_turns, peak_memory, slug, versions

from lightning_acu.ops import available_backends

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def make_case(options, layer, batch):
    dtype, memory_format = getattr(torch, options.dtype), MEMORY_FORMATS[options.memory_format]
    return Case(layer, batch, options.device, dtype, memory_format, options.seed)


def measure(options, layer, threads, batch, problems):
    """A row for each launch, pass and method."""
    torch.set_num_threads(threads)
    tolerance, case = TOLERANCES[options.precision], make_case(options, layer, batch)
    methods, grads, differences = prepare(case, options.methods, options.backend, tolerance, problems)
    rows = []
    for launch in options.launch if methods else []:
        for what in PASSES:
            if what == FORWARD:
                calls = {name: method.forward for name, method in methods.items()}
            else:
                calls = {name: lambda m=method, g=grads[name]: m.step(g) for name, method in methods.items()}
            with torch.set_grad_enabled(what == BOTH):
                if launch == "graph":
                    calls = captured(calls, layer, problems)
                least = {name: 1 if name in PEERS else min(3, options.samples) for name in calls}
                times = in_turns(calls, options.device, options.budget, options.samples, least) if calls else {}
            medians = {n: statistics.median(t) * 1e3 / getattr(calls[n], "number", 1) for n, t in times.items()}
            rows += [
                describe(options, layer, threads, batch, launch)
                | {"pass": what, "method": name, "backend": options.backend if name == "ours" else ""}
                | {"milliseconds": round(median, 5), "ratio": round(median / medians.get("plain", math.nan), 4)}
                | {"samples": len(times[name]), "difference": f"{differences[name]:.1e}" if name != "plain" else ""}
                for name, median in medians.items()
            ]
    return rows


def captured(calls, layer, problems):
    """The calls as CUDA graphs; those of which there is none go to ``problems``.

    Dense, which asks the host about its positions, has none: a capture that fails can keep torch from making others.
    """
    graphs = {}
    for name, call in calls.items():
        if name == "dense":
            continue
        try:
            graphs[name] = CapturedCalls(call)
        except Exception as error:  # whatever synchronises or allocates inside says so in its own way
            problems.add(name, f"cannot be captured as a CUDA graph: {brief(error)}", layer.name)
    return graphs


def describe(options, layer, threads, batch, launch):
    """What every row of a CSV file says first."""
    return {
        "device": device_name(options.device),
        **versions("torch", "triton"),
        "dtype": options.precision,
        "memory_format": options.memory_format,
        "kind": layer.kind,
        "layer": layer.name,
        "threads": threads,
        "batch": batch,
        "launch": launch,
    }


def measure_memory(options, layer, problems):
    """A row for each method."""
    threads, batch = max(options.threads), max(options.batch)
    found = {}
    for name in options.methods:
        try:
            found[name] = memory_of(options, layer, name) if options.device == "cuda" else apart(options, layer, name)
        except Exception as error:  # as in `prepare`
            problems.add(name, f"cannot run: {brief(error)}", layer.name)
    return [
        describe(options, layer, threads, batch, "eager")
        | {"pass": BOTH, "method": name, "backend": options.backend if name == "ours" else ""}
        | {"megabytes": round(peak / 1e6, 2), "ratio": round(peak / max(found.get("plain", math.nan), 1), 4)}
        for name, peak in found.items()
    ]


def memory_of(options, layer, name):
    """Bytes of the second forward+backward of the layer; the first loads libraries."""
    torch.set_num_threads(max(options.threads))
    case = make_case(options, layer, max(options.batch))
    method = build(name, case, options.backend)
    method.step(case.grad)
    return peak_memory(lambda: method.step(case.grad), options.device)


def apart(options, layer, name):
    """The same from a process of its own: on the CPU, peaks of one method would hide those of the next."""
    command = [sys.executable, __file__, "--memory-of", layer.name, "--methods", name, "--backend", options.backend]
    command += ["--dtype", options.dtype, "--memory-format", options.memory_format, "--seed", str(options.seed)]
    command += ["--threads", str(max(options.threads)), "--batch", str(max(options.batch))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    return int(done.stdout.split()[-1])


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="auto", help=f"of ours: {', '.join(available_backends())}")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; float32 has no autocast")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2 on the CPU, all on CUDA")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 16")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--no-tf32", action="store_true", help="float32 on CUDA without TF32")
    parser.add_argument(
        "--launch", nargs="+", choices=["graph", "eager"], help="default: both on CUDA; the CPU has eager"
    )
    parser.add_argument("--memory-format", default="channels_last", choices=list(MEMORY_FORMATS))
    parser.add_argument("--kind", nargs="+", default=KINDS, choices=KINDS, help="in the order given")
    parser.add_argument("--only", default="", help="a regular expression to search for in the names of layers")
    parser.add_argument("--budget", type=float, help="seconds for each number (default 0.6; 0.1 if --quick)")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further layer starts")
    parser.add_argument("--samples", type=int, help="at most this many for each number (default 15; 3 if --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of offsets and images")
    parser.add_argument("--quick", action="store_true", help="other defaults: few layers and few samples")
    parser.add_argument("--memory", action="store_true", help="peak memory of forward+backward, not times")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of CSV and chart")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    if not cuda and "graph" in (options.launch or []):
        parser.error("--launch graph: CUDA graphs need --device cuda")
    options.launch = options.launch or (["graph", "eager"] if cuda else ["eager"])
    options.methods = options.methods or methods_for(options.dtype)
    options.precision = "tf32" if cuda and options.dtype == "float32" and not options.no_tf32 else options.dtype
    options.threads = options.threads or ([torch.get_num_threads()] if cuda else [1] if options.quick else [1, 2])
    options.batch = options.batch or ([1] if options.quick else [1, 16])
    options.budget = options.budget or (0.1 if options.quick else 0.6)
    options.samples = options.samples or (3 if options.quick else 15)
    named = [layer for layer in LAYERS if re.search(options.only, layer.name)]
    options.layers = [layer for kind in options.kind for layer in named if layer.kind == kind]
    if options.quick and not options.only:
        options.layers = list({layer.kind: layer for layer in reversed(options.layers)}.values())[::-1]
    if not options.layers:
        parser.error(f"no layer matches both --kind and --only; there are: {', '.join(layer.name for layer in LAYERS)}")
    return options


def measure_all(options, path, problems):
    """All rows, which are in the file ``path`` as soon as they are known; and the layers there was no time for."""
    rows, began = [], time.monotonic()
    with path.open("w", newline="") as file:
        for index, layer in enumerate(options.layers):
            if time.monotonic() - began >= options.limit:
                return rows, options.layers[index:]
            print(f"{index + 1}/{len(options.layers)} {layer.name}", file=sys.stderr, flush=True)
            try:
                if options.memory:
                    new = measure_memory(options, layer, problems)
                else:
                    pairs = [(threads, batch) for threads in options.threads for batch in options.batch]
                    new = [row for pair in pairs for row in measure(options, layer, *pair, problems)]
            except Exception as error:  # out of memory, or a GPU that answers no more: the rest is tried all the same
                problems.add("the layer", f"stopped: {brief(error)}", layer.name)
                continue
            if new and not rows:
                writer = csv.DictWriter(file, new[0])
                writer.writeheader()
            if new:
                writer.writerows(new)
                file.flush()
            rows += new
    return rows, []


def write_chart(options, rows, path):
    try:
        from chart import draw
    except ImportError as error:
        print(f"no chart: {brief(error)}")
        return
    draw(rows, options.launch[0] if not options.memory else "eager", path)
    print(f"{path} written")


def main():
    options = arguments()
    if options.device == "cuda":  # all at their best, and matrix products as precise as cuDNN's convolutions
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = not options.no_tf32
        torch.set_float32_matmul_precision("highest" if options.no_tf32 else "high")
    if options.memory_of is not None:
        layer = next(layer for layer in LAYERS if layer.name == options.memory_of)
        print(memory_of(options, layer, options.methods[0]))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    parts = ["acu_conv2d", *["memory"] * options.memory, slug(device_name(options.device)), options.precision]
    path = options.out / ("_".join([*parts, options.memory_format, *["quick"] * options.quick]) + ".csv")
    problems = Problems()
    rows, unmeasured = measure_all(options, path, problems)
    if rows:
        print(*layer_tables(rows, "megabytes" if options.memory else "milliseconds"), summary(rows), sep="\n\n")
        print(*[] if options.memory else slower_than_dense(rows), sep="\n")
        print(f"{path} written")
        write_chart(options, rows, path.with_suffix(".png"))
    sentences = [*problems.sentences()]
    print(*(f"problem: {sentence}" for sentence in sentences), sep="\n")
    if unmeasured:
        print(f"no time (--limit {options.limit:g}) for {', '.join(layer.name for layer in unmeasured)}")
    done = len(options.layers) - len(unmeasured)
    print(f"{done} of {len(options.layers)} layers in {options.precision}; problems: {len(sentences)}")
    return int(problems.serious())


if __name__ == "__main__":
    sys.exit(main())
