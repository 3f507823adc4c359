"""The paper's tables, row by row, beside the poster's numbers.

    python -m paper.reproduce --table cifar10-ablation --seeds 3 --device cuda     # as published: 64,000 steps
    python -m paper.reproduce --table cifar10-ablation --rows base acu-all --steps 2000 --data cifar10.npz
    python -m paper.reproduce --table cifar10-ablation --report                    # from finished runs

Each row is one configuration of configs/paper, trained by ``lightning-acu fit``, one seed of all rows after the other.
It can be killed at any time: started again, finished runs are skipped and the one that was interrupted goes on from its
last checkpoint. Every run leaves result.json and metrics.csv, and the table is printed and written with its
figures (see runs.py and report.py).

With --steps the schedule is shortened in proportion: learning-rate steps, warm-up, rounding and fine-tuning. The rate
of positions then grows with the square root of the ratio of steps, because with the paper's they would have no time to
move far. With --lr it stays the same in pixels a step. --multiplier sets it.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from lightning_acu.data.npz import read_npz

from .report import report
from .runs import run_row
from .settings import classes_of
from .tables import TABLES, find_rows

_OUT = Path(__file__).parent / "results"

#: Seconds between two lines of progress in a log file.
_QUIET = 30


def arguments(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--table", required=True, help=", ".join(TABLES))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all of the table")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each row: seeds 0 ... N-1; 3, or all finished")
    parser.add_argument("--steps", type=int, metavar="N", help="a shortened training; default: as published")
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: as published")
    parser.add_argument("--lr", type=float, help="learning rate; that of a fine-tuning keeps its ratio to it")
    parser.add_argument("--multiplier", type=float, metavar="M", help="of the learning rate for positions")
    parser.add_argument("--data", type=Path, metavar="PATH", help="folder of the data, or an .npz of your own images")
    parser.add_argument("--preprocessing", choices=["normalize", "whiten"], help="of CIFAR; default: as published")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--compile-mode", metavar="MODE", help="of ImageClassifier; default: as published, none")
    parser.add_argument("--out", type=Path, default=_OUT, help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing: table and figures of finished runs")
    options = parser.parse_args(args)
    for name in ("seeds", "steps", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    for name in ("lr", "multiplier"):
        if (value := getattr(options, name)) is not None and not value > 0:
            parser.error(f"--{name} {value}: must be positive")
    try:
        options.rows = find_rows(options.table, options.rows)
    except ValueError as error:
        parser.error(str(error))
    if options.data is not None and not options.data.exists():
        parser.error(f"--data {options.data}: does not exist")
    if options.data is not None and options.data.suffix == ".npz" and options.table == "places365":
        parser.error(f"--data {options.data}: Places365 needs a folder of images, not an .npz file")
    if options.data is not None and options.data.suffix == ".npz":
        try:
            check_classes(options.rows, options.data)
        except ValueError as error:
            parser.error(f"--data {options.data}: {error}")
    if options.preprocessing is not None and options.table == "places365":
        parser.error(f"--preprocessing {options.preprocessing}: is for CIFAR's small images, not for Places365")
    return options


def check_classes(rows, path):
    """Check that ``path`` has as many classes as each row's network."""
    found = int(read_npz(path).y_train.max()) + 1
    if wrong := {row.name: count for row in rows if (count := classes_of(row)) != found}:
        name, count = next(iter(wrong.items()))
        raise ValueError(f"it has {found} classes, but {name} is for {count}; choose other --rows or other images")


def speaker(name):
    """Shows progress: on a terminal in one line that changes, else a line every half minute."""
    shown, when = "", -math.inf

    def say(text):
        nonlocal shown, when
        if sys.stdout.isatty():
            print(f"\r  {name}: {text}".ljust(len(shown) + len(name) + 5), end="", flush=True)
        elif text != shown and time.monotonic() - when > _QUIET:
            print(f"  {name}: {text}", flush=True)
            when = time.monotonic()
        shown = text

    return say


def main(args=None):
    options = arguments(args)
    folder = options.out.expanduser().resolve() / options.table
    # One seed of all rows after the other: after the first there is something to compare.
    plan = [(seed, row) for seed in range(options.seeds or 3) for row in options.rows]
    for number, (seed, row) in enumerate([] if options.report else plan, start=1):
        name = f"[{number}/{len(plan)}] {row.name}, seed {seed}"
        try:
            ran = run_row(row, seed, folder, options, speaker(name))
        except (RuntimeError, ValueError) as error:
            sys.exit(f"\n{name}: {error}")
        print(f"\n{name}: {'done' if ran else 'was done before'}", flush=True)
    try:
        report(options.table, options.rows, folder, options.seeds)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
