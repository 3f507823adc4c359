"""A training step of whole networks: plain, converted, and converted with the dense backend, in turns.

    python benchmarks/train_step.py                                  # ResNet-18 and EfficientNet-B0 on the CPU
    python benchmarks/train_step.py --device cuda --batch 64 --autocast bfloat16

A step is forward, cross entropy, backward and SGD with momentum, on one random batch. The three networks have the same
weights; taps of the converted ones are moved by uniform(-1, 1), all but the centres, and learn so slowly that they stay
there while they are timed.
"""

import argparse
import copy
import csv
import statistics
import sys
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from timing import device_name, in_turns, slug
from torch.nn import functional as F

from lightning_acu import acu_layers, convert_to_acu

MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def networks(name, backend):
    """The arms: plain, and converted with each backend, at the same positions."""
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False)
    ours = convert_to_acu(copy.deepcopy(plain), backend=backend)
    with torch.no_grad():
        for _, layer in acu_layers(ours):
            layer.offsets.uniform_(-1, 1)
    dense = copy.deepcopy(ours)
    for _, layer in acu_layers(dense):
        layer.backend = "dense"
    return {"plain": plain, "ours": ours, "dense": dense}


def training_step(options, model, images, labels):
    """A function that trains ``model`` by one step."""
    model = model.to(options.device, memory_format=MEMORY_FORMATS[options.memory_format]).train()
    positions = [layer.offsets for _, layer in acu_layers(model)]
    apart = {id(parameter) for parameter in positions}
    groups = [{"params": [p for p in model.parameters() if id(p) not in apart], "lr": 1e-3}]
    if positions:
        groups.append({"params": positions, "lr": 1e-8})
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    dtype = getattr(torch, options.autocast or "bfloat16")

    def step():
        optimizer.zero_grad()
        with torch.autocast(options.device, dtype, enabled=options.autocast is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def measure(options, name, threads):
    """A row for each arm."""
    torch.set_num_threads(threads)
    images = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    images = images.contiguous(memory_format=MEMORY_FORMATS[options.memory_format])
    labels = torch.randint(0, 1000, (options.batch,), device=options.device)
    steps = {
        arm: training_step(options, model, images, labels) for arm, model in networks(name, options.backend).items()
    }
    for step in steps.values():
        for _ in range(options.warm_up):
            step()
    # As many samples of each arm, whatever they take.
    times = in_turns(steps, options.device, 0, options.samples, dict.fromkeys(steps, options.samples))
    medians = {arm: statistics.median(values) * 1e3 for arm, values in times.items()}
    return [
        {
            "device": device_name(options.device),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "precision": f"autocast {options.autocast}" if options.autocast else "float32",
            "memory_format": options.memory_format,
            "model": name,
            "threads": threads,
            "batch": options.batch,
            "size": options.size,
            "arm": arm,
            "backend": {"plain": "", "ours": options.backend, "dense": "dense"}[arm],
            "milliseconds": round(median, 2),
            "ratio": round(median / medians["plain"], 4),
            "samples": len(times[arm]),
        }
        for arm, median in medians.items()
    ]


def table(rows):
    """A line for each network and number of threads."""
    made = Table(title="a training step, and its ratio to plain", pad_edge=False)
    for text in ("model", "threads", "plain", "ours", "dense"):
        made.add_column(text, justify="left" if text == "model" else "right")
    lines = {}
    for row in rows:
        text = f"{row['milliseconds']:.1f} ms" + (f" ({row['ratio']:.2f})" if row["arm"] != "plain" else "")
        lines.setdefault((row["model"], str(row["threads"])), []).append(text)
    for key, cells in lines.items():
        made.add_row(*key, *cells)
    return made


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "efficientnet_b0"], help="names of timm")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", default="auto", help="of ours")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--memory-format", default="channels_last", choices=list(MEMORY_FORMATS))
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="default: float32 throughout")
    parser.add_argument("--samples", type=int, default=9, help="of each arm")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each arm before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return options


def main():
    options = arguments()
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    rows = [row for name in options.models for threads in options.threads for row in measure(options, name, threads)]
    Console(width=None if sys.stdout.isatty() else 100).print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"train_step_{slug(device_name(options.device))}_{slug(rows[0]['precision'])}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path} written")


if __name__ == "__main__":
    main()
