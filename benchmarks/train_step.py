"""A training step of whole networks: plain, converted, and converted with the dense backend, in turns.

    python benchmarks/train_step.py                      # ResNet-18 and EfficientNet-B0 on the CPU
    python benchmarks/train_step.py --device cuda --backend triton --batch 128 --autocast bfloat16 --compile

A step is forward, cross entropy, backward and SGD with momentum, on one random batch. The networks have the same
weights; taps of the converted ones are moved by uniform(-1, 1), all but the centres, and learn so slowly that they stay
there while they are timed. ``--compile`` does plain and converted once more through torch.compile, ratios again to
plain. (float16 is not scaled: small gradients vanish, which takes no time.)

What fails (memory, a missing compiler) is reported at the end, with exit status 1; the rest goes on.
"""

import argparse
import copy
import csv
import math
import statistics
import sys
import time
import traceback
from pathlib import Path

import timm
import torch
from tables import brief, train_table
from timing import device_name, in_turns, slug, synchronize, versions
from torch.nn import functional as F

from lightning_acu import acu_layers, convert_to_acu

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def networks(name, backend, mode):
    """The arms: plain, and converted with each backend, at the same positions."""
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False)
    ours = convert_to_acu(copy.deepcopy(plain), backend=backend)
    with torch.no_grad():
        for _, layer in acu_layers(ours):
            layer.offsets.uniform_(-1, 1)
    arms = {"plain": plain, "ours": ours}
    if mode == "eager":
        arms["dense"] = copy.deepcopy(ours)
        for _, layer in acu_layers(arms["dense"]):
            layer.backend = "dense"
    return arms


def training_step(options, model, mode, images, labels):
    """A function that trains ``model`` by one step."""
    model = model.to(options.device, memory_format=MEMORY_FORMATS[options.memory_format]).train()
    positions = [layer.offsets for _, layer in acu_layers(model)]
    apart = {id(parameter) for parameter in positions}
    groups = [{"params": [p for p in model.parameters() if id(p) not in apart], "lr": 1e-3}]
    if positions:
        groups.append({"params": positions, "lr": 1e-8})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    dtype = getattr(torch, options.autocast or "bfloat16")
    network = model if mode == "eager" else torch.compile(model, backend=options.compile)

    def step():
        optimizer.zero_grad()
        with torch.autocast(options.device, dtype, enabled=options.autocast is not None):
            loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()

    return step


def warmed_up(options, name, mode, problems):
    """{arm: its step}, after ``--warm-up`` steps of each; an arm that cannot is left out and said in ``problems``."""
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    images = images.contiguous(memory_format=MEMORY_FORMATS[options.memory_format])
    steps = {}
    for arm, model in networks(name, options.backend, mode).items():
        labels = torch.randint(0, model.num_classes, (options.batch,), device=options.device)
        try:
            step = training_step(options, model, mode, images, labels)
            for _ in range(options.warm_up):
                step()
            synchronize(options.device)
        except Exception as error:  # memory, compilers and drivers raise what they like
            traceback.print_exc()
            problems.append(f"{name}, {mode}, {arm}: {brief(error)}")
        else:
            steps[arm] = step
    return steps


def measure(options, name, mode, threads, problems):
    """A row for each arm."""
    torch.set_num_threads(threads)
    torch.compiler.reset()  # two networks of one class would be variants of one function
    steps = warmed_up(options, name, mode, problems)
    if not steps:
        return []
    # As many samples of each arm, whatever they take.
    times = in_turns(steps, options.device, 0, options.samples, dict.fromkeys(steps, options.samples))
    medians = {arm: statistics.median(values) * 1e3 for arm, values in times.items()}
    return [
        {
            "device": device_name(options.device),
            **versions("torch", "triton", "timm"),
            "precision": f"autocast {options.autocast}" if options.autocast else "float32",
            "memory_format": options.memory_format,
            "model": name,
            "mode": mode,
            "threads": threads,
            "batch": options.batch,
            "size": options.size,
            "arm": arm,
            "backend": {"plain": "", "ours": options.backend, "dense": "dense"}[arm],
            "milliseconds": round(median, 3),
            "ratio": round(median / medians.get("plain", math.nan), 4),
            "samples": len(times[arm]),
        }
        for arm, median in medians.items()
    ]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="names of timm; default: as above, on CUDA with resnet50")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="auto", help="of ours")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--memory-format", default="channels_last", choices=list(MEMORY_FORMATS))
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="default: float32 throughout")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="and compiled, by inductor")
    parser.add_argument("--samples", type=int, default=9, help="of each arm")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each arm before")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further network starts")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    on_cuda = ["resnet50"] if options.device == "cuda" else []
    options.models = options.models or [*on_cuda, "resnet18", "efficientnet_b0"]
    return options


def measure_all(options, problems):
    """Rows network by network: all as they are, then all compiled."""
    began = time.monotonic()
    for mode in ["eager", *["compiled"] * (options.compile is not None)]:
        for name in options.models:
            for threads in options.threads:
                if time.monotonic() - began >= options.limit:  # asked for, and so no problem
                    print(f"{name}, {mode}, {threads} threads: no time (--limit {options.limit:g})")
                    continue
                try:
                    yield measure(options, name, mode, threads, problems)
                except Exception as error:  # an unknown network, or a GPU that answers no more
                    traceback.print_exc()
                    problems.append(f"{name}, {mode}: {brief(error)}")


def main():
    options = arguments()
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    precision = f"autocast-{options.autocast}" if options.autocast else "float32"
    path = options.out / f"train_step_{slug(device_name(options.device))}_{precision}.csv"
    rows, problems = [], []
    with path.open("w", newline="") as file:
        for new in measure_all(options, problems):
            if new and not rows:
                writer = csv.DictWriter(file, new[0])
                writer.writeheader()
            if new:
                writer.writerows(new)
                file.flush()  # what was measured stays, should a run be stopped
            rows += new
    print(*[train_table(rows)] * bool(rows), *(f"problem: {problem}" for problem in problems), sep="\n")
    print(f"rows: {len(rows)}, problems: {len(problems)}; {path} written")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
