"""Times of all exact forms of a fold, layer by layer, and the rule that is fitted to them.

    OMP_NUM_THREADS=1 python benchmarks/fold_forms.py --out docs/benchmarks

One thread, one image. Taps are moved by up to 0.5 or 1.2 pixels, or by up to 1.2 and rounded to whole pixels. Times are
medians of calls in turns, in milliseconds of the process's CPU time, which other programs on the machine disturb less;
"plain" is the convolution before the conversion. In ONNX Runtime the time of the same network without the layer is
taken off. ``--fit FILE`` fits the weights of lightning_acu/surgery/fold_rule.py to a file that an earlier run wrote.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from layers import LAYERS, Layer
from timing import device_name, slug, versions
from torch import nn

from lightning_acu import ACUConv2d
from lightning_acu.surgery import fold_rule, fold_times

#: Besides those of all benchmarks: a merged RepVGG-A0 consists of nothing else.
MEASURED = [
    *LAYERS,
    Layer("dense3x3", "RepVGG", 48, 48, 56),
    Layer("dense3x3", "RepVGG", 96, 96, 28),
    Layer("dense3x3", "RepVGG", 192, 192, 14),
    Layer("dense3x3", "RepVGG", 48, 48, 112, stride=2),
    Layer("dense3x3", "RepVGG", 48, 96, 56, stride=2),
    Layer("dense3x3", "RepVGG", 96, 192, 28, stride=2),
    Layer("dense3x3", "RepVGG", 192, 1280, 14, stride=2),
]

#: How far taps move in pixels, and whether they are then rounded.
TAPS = {"near": (0.5, False), "fractional": (1.2, False), "whole": (1.2, True)}

COLUMNS = ("runtime", "layer", "taps", "form", "milliseconds", "ratio", *fold_rule.KINDS)


def measure(layer, taps, runtime, budget):
    """Rows of one layer in one runtime: (form, milliseconds, counts)."""
    by, rounded = TAPS[taps]
    torch.manual_seed(0)
    padding = layer.kernel // 2
    plain = nn.Conv2d(layer.c_in, layer.c_out, layer.kernel, layer.stride, padding, groups=layer.groups)
    active = ACUConv2d.from_conv2d(plain)
    nn.init.uniform_(active.offsets, -by, by)
    if rounded:
        active.round_()
    image = torch.randn(1, layer.c_in, layer.size, layer.size)
    modules = {"plain": plain} | {form: active.fold(form) for form in fold_rule.candidates(active)}
    with torch.no_grad():
        for form, module in modules.items():
            difference = (module(image) - (plain if form == "plain" else active)(image)).abs().max()
            assert difference < 1e-4, (layer.name, taps, form, difference)
        calls = {form: fold_times.runner(module.eval(), image, runtime) for form, module in modules.items()}
        if runtime == "onnxruntime":
            nothing = nn.MaxPool2d(1, layer.stride) if layer.c_in == layer.c_out else nn.Identity()
            calls["nothing"] = fold_times.runner(nothing, image, runtime)
        times = fold_times.in_turns(calls, budget, time.process_time)
    found = {form: statistics.median(values) * 1e3 for form, values in times.items()}
    off = found.pop("nothing", 0.0)
    for form, module in modules.items():
        counts = fold_rule.count(module.to("meta"), image.to("meta"))
        yield form, max(found[form] - off, 1e-4), (found[form] - off) / (found["plain"] - off), counts


def fit(rows, runtime):
    """Nanoseconds for each of KINDS, never negative, with the least relative squares."""
    from scipy.optimize import nnls

    own = [row for row in rows if row["runtime"] == runtime]
    counts = np.array([[float(row[kind]) for kind in fold_rule.KINDS] for row in own])
    times = np.array([float(row["milliseconds"]) * 1e6 for row in own])
    scale = counts.max(axis=0) + 1e-9
    weights = nnls(counts / scale / times[:, None], np.ones(len(own)))[0] / scale
    return {kind: float(f"{weight:.2g}") for kind, weight in zip(fold_rule.KINDS, weights, strict=True)}


def judge(rows, runtime, weights):
    """Times of what the rule would choose over the fastest form, and of "auto" over it: geometric means."""
    layers = {}
    for row in rows:
        if row["runtime"] == runtime and row["form"] != "plain":
            layers.setdefault((row["layer"], row["taps"]), []).append(row)
    chosen, auto = [], []
    for forms in layers.values():
        price = {row["form"]: sum(weights[k] * float(row[k]) for k in fold_rule.KINDS) for row in forms}
        times = {row["form"]: float(row["milliseconds"]) for row in forms}
        fastest = min(times.values())
        chosen.append(times[min(price, key=price.__getitem__)] / fastest)
        auto.append(times["auto"] / fastest)
    mean = [float(np.exp(np.log(each).mean())) for each in (chosen, auto)]
    return len(layers), *mean, max(chosen)


def report(rows):
    for runtime in fold_rule.RUNTIMES:
        if not any(row["runtime"] == runtime for row in rows):
            continue
        weights = fit(rows, runtime)
        number, chosen, auto, worst = judge(rows, runtime, weights)
        print(f'"{runtime}": {tuple(weights.values())}')
        print(f"  {number} layers: the rule's choice takes {chosen:.2f} times the fastest form ({worst:.2f} at worst)")
        print(f"  one convolution or the sparse sum: {auto:.2f} times")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="layers whose name has one of these")
    parser.add_argument("--taps", nargs="+", choices=TAPS, default=list(TAPS))
    parser.add_argument("--runtimes", nargs="+", choices=fold_rule.RUNTIMES, default=list(fold_rule.RUNTIMES))
    parser.add_argument("--budget", type=float, default=0.6, help="seconds for the forms of a layer in a runtime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--fit", type=Path, nargs="+", metavar="FILE", help="files of earlier runs, instead of measuring"
    )
    options = parser.parse_args()
    if options.fit:
        report([row for path in options.fit for row in csv.DictReader(path.read_text().splitlines())])
        return 0
    torch.set_num_threads(options.threads)
    print(device_name("cpu"), versions("torch", "onnxruntime"))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"fold_forms_{slug(device_name('cpu'))}.csv"
    rows = []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for layer in MEASURED:
            for taps in options.taps if any(text in layer.name for text in options.only) else ():
                for runtime in options.runtimes:
                    for form, milliseconds, ratio, counts in measure(layer, taps, runtime, options.budget):
                        name = (runtime, layer.name, taps, form, f"{milliseconds:.4f}", f"{ratio:.3f}")
                        rows.append(dict(zip(COLUMNS, name, strict=False)) | counts)
                        writer.writerow(rows[-1])
                file.flush()
    report(rows)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
