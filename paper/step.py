"""What makes a training step of the paper's CIFAR network fast: each option alone and together, in turns.

    python -m paper.step                                   # on the CPU
    python -m paper.step --device cuda --batch 64          # and CUDA graphs

A step is forward, cross entropy, backward and SGD with momentum on one batch of 32x32 images that is on the device
already. The active network's taps are off the grid and stay there while they are timed.
"""

import argparse
import csv
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.timing import device_name, in_turns, slug
from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.models import create_model

#: Memory format, mode of torch.compile and implementation of SGD by name.
OPTIONS = {
    "contiguous": ("contiguous_format", None, "for-loop"),
    "foreach": ("contiguous_format", None, "foreach"),
    "fused": ("contiguous_format", None, "fused"),
    "channels_last": ("channels_last", None, "for-loop"),
    "channels_last, fused": ("channels_last", None, "fused"),
    "channels_last, compiled": ("channels_last", "default", "for-loop"),
    "channels_last, CUDA graphs": ("channels_last", "reduce-overhead", "for-loop"),
}


def training_step(options, active, memory_format, mode, sgd):
    """A function that trains a new network by one step."""
    torch.manual_seed(0)
    model = create_model("acu_plain", num_classes=10)
    if active:
        convert_to_acu(model, kernel_sizes=[3])
        with torch.no_grad():
            for _, layer in acu_layers(model):
                layer.offsets.uniform_(-1, 1)
    model = model.to(options.device, memory_format=getattr(torch, memory_format)).train()
    if mode is not None:
        model.compile(mode=mode)
    images = torch.randn(options.batch, 3, 32, 32, device=options.device)
    images = images.contiguous(memory_format=getattr(torch, memory_format))
    labels = torch.randint(0, 10, (options.batch,), device=options.device)
    chosen = {"foreach": sgd == "foreach", "fused": sgd == "fused"}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8, momentum=0.9, **chosen)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--samples", type=int, default=15, help="of each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    torch.set_num_threads(options.threads)
    names = [name for name in OPTIONS if options.device == "cuda" or "CUDA" not in name]
    steps = {
        (net, name): training_step(options, net == "active", *OPTIONS[name])
        for net in ("plain", "active")
        for name in names
    }
    for step in steps.values():
        for _ in range(3):
            step()
    times = in_turns(steps, options.device, 0, options.samples, dict.fromkeys(steps, options.samples))
    medians = {key: statistics.median(values) * 1e3 for key, values in times.items()}
    rows = [
        {
            "device": device_name(options.device),
            "torch": torch.__version__,
            "threads": options.threads,
            "batch": options.batch,
            "network": net,
            "options": name,
            "milliseconds": round(median, 2),
            "ratio": round(median / medians[net, "contiguous"], 3),
        }
        for (net, name), median in medians.items()
    ]
    table = Table(title=f"a step of acu_plain, {options.batch} images, ms (ratio to contiguous)", pad_edge=False)
    for text in ("options", "plain", "active"):
        table.add_column(text, justify="left" if text == "options" else "right")
    for name in names:
        found = [row for row in rows if row["options"] == name]
        table.add_row(name, *(f"{row['milliseconds']:.1f} ({row['ratio']:.2f})" for row in found))
    Console(width=100).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"paper_step_{slug(device_name(options.device))}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{path} written")


if __name__ == "__main__":
    main()
