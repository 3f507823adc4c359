"""Every timm and torchvision model with a 3x3 or 5x5 convolution: converted, perturbed, folded, compared.

python scripts/census.py --all --out docs/census.csv      the full sweep, about an hour on 2 cores
python scripts/census.py --all --out ... --resume         continue after an interruption
python scripts/census.py resnet50 torchvision/resnet18    some models

Each is built with random weights and run at an even and an odd image size (where it takes one), in eval and in train
mode, before and after conversion; gradients of its weights are compared; then positions are perturbed, the model is
folded, and the fold is compared with the unfolded model, as is what timm's reparameterize_model makes of both.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its helpers

from helpers.census_model import Result, build, examine
from torch import nn

#: Models with more parameters than this run alone, after the others: they would need more than 12 GB of memory.
LARGE = 500_000_000

#: Seconds after which a model is given up.
TIMEOUT = 900


def candidates() -> list[str]:
    """Every name, but those of our own networks."""
    torchvisions = (f"torchvision/{name}" for name in torchvision.models.list_models())
    return [*timm.list_models(exclude_filters="acu_*"), *torchvisions]


def holds_convolutions(name: str) -> bool:
    """Whether a model has 3x3 or 5x5 convolutions; built without memory where that works."""
    try:
        with torch.device("meta"):
            model = build(name)
    except Exception:  # a model that computes something while it is built
        model = build(name)
    return any(isinstance(m, nn.Conv2d) and m.kernel_size in ((3, 3), (5, 5)) for m in model.modules())


def child(name: str, limit: float, threads: int, pipe: multiprocessing.connection.Connection) -> None:
    """One model in a process of its own, so that memory comes back and a crash is one line of the table."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (warnings of models that are built without weights)
    result = Result(name)
    try:
        result = examine(name, limit=limit) if holds_convolutions(name) else Result(name, "no 3x3 or 5x5")
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        result.status = f"{type(error).__name__}: {error} ({place.name}:{place.lineno})".replace("\n", " ")[:300]
    result.images = {}
    pipe.send(result)


def sweep(names: Sequence[str], jobs: int, limit: float = LARGE) -> Iterator[Result]:
    """Results as they come; what is too large for two at a time comes last, alone and with all threads."""
    context = multiprocessing.get_context("fork")
    waiting, running, later = list(reversed(names)), {}, []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(name, limit, threads, there), daemon=True)
            process.start()
            there.close()
            running[here] = (name, process, time.monotonic())
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for pipe, (name, process, start) in list(running.items()):
            if pipe in ready:
                try:
                    result = pipe.recv()
                except EOFError:
                    process.join()
                    result = Result(name, f"the process ended with {process.exitcode} (out of memory?)")
            elif time.monotonic() - start > TIMEOUT:
                process.kill()
                result = Result(name, f"not done after {TIMEOUT} s")
            else:
                continue
            process.join()
            del running[pipe]
            if result.status == "later":
                later.append(name)
            else:
                yield result
    if later:
        yield from sweep(later, 1, float("inf"))


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The line `N/949 timm, N/97 torchvision`, and one line for each that failed."""
    with_convs = [row for row in rows if row["status"] != "no 3x3 or 5x5"]
    lines = [f"FAILED {row['model']}: {row['status']} {row}" for row in with_convs if row["status"] != "ok"]
    counts = []
    for library in ("timm", "torchvision"):
        own = [row for row in with_convs if row["model"].startswith("torchvision/") == (library == "torchvision")]
        counts.append(f"{sum(row['status'] == 'ok' for row in own)}/{len(own)} {library}")
    return "\n".join([*lines, ", ".join(counts)])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names; torchvision/NAME for torchvision's")
    parser.add_argument("--all", action="store_true", help="every model")
    parser.add_argument("--out", type=Path, help="the table, as CSV")
    parser.add_argument("--resume", action="store_true", help="keep what --out has, but try again what failed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    names = candidates() if options.all else options.models
    rows: list[dict[str, Any]] = []
    if options.resume and options.out.exists():
        with options.out.open() as file:
            rows = [row for row in csv.DictReader(file) if row["status"] in ("ok", "no 3x3 or 5x5")]
        done = {row["model"] for row in rows}
        names = [name for name in names if name not in done]
    for count, result in enumerate(sweep(names, options.jobs), 1):
        rows.append(result.row())
        print(f"{count}/{len(names)} {result}", flush=True)
        if options.out:
            order = {name: place for place, name in enumerate(candidates())}
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda row: order[row["model"]]))
    print(summary(rows))


if __name__ == "__main__":
    main()
