"""Where active convolutions pay, on CIFAR: the paper's plain network at any width, trained in many ways.

    python -m paper.study --data cifar10.npz --width 0.25 --seeds 3             # all rows; one thread
    python -m paper.study --data cifar10.npz --width 0.25 --rows plain active d2
    python -m paper.study --width 0.25 --report                                 # table and figures of finished runs

With the same seed all rows see the same batches and, where shapes allow, start from the same weights; rows that branch
off go on from the state of the row that they need. It can be killed at any time and started again: finished runs are
skipped, the others go on. Two processes with one thread each share the work. ``rows.py`` says what the rows are.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from .batches import Images
from .report import report
from .rows import ROWS, find_rows
from .training import Settings, finished, ready, run

_OUT = Path(__file__).parents[1] / "results" / "study"


def arguments(args=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 ... N-1")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="begin with this one")
    parser.add_argument("--width", type=float, default=0.25, help="of the network; 1: the paper's 48, 96, 192 channels")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--pixels", type=float, default=0.004, help="learning rate of positions, in pixels a step")
    parser.add_argument("--data", type=Path, metavar="PATH", help="an .npz of x_train, y_train, x_test, y_test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=_OUT, help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="train nothing: table and figures of finished runs")
    options = parser.parse_args(args)
    for name in ("seeds", "steps", "batch_size", "threads"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    try:
        options.rows = find_rows(options.rows)
    except ValueError as error:
        parser.error(str(error))
    if not options.report and (options.data is None or not options.data.is_file()):
        parser.error(f"--data {options.data}: not a file; give an .npz of images, see lightning_acu.data")
    return options


def main(args=None):
    options = arguments(args)
    settings = Settings(options.width, options.steps, options.batch_size, options.lr, options.pixels)
    folder = options.out.expanduser().resolve() / f"width{options.width:g}_steps{options.steps}"
    if not options.report:
        torch.set_num_threads(options.threads)
        train(options, folder, settings)
    try:
        report(options.rows, folder)
    except FileNotFoundError as error:
        sys.exit(str(error))


def train(options, folder, settings):
    """All runs, one seed of all rows after the other."""
    images = Images(options.data)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    left = [(seed, row) for seed in seeds for row in options.rows if not finished(folder, row.name, seed)]
    while left:
        done = []
        for seed, row in left:
            name = f"{row.name}, seed {seed}"
            if ready(folder, row, seed) and run(
                row, seed, folder, settings, images, lambda text, name=name: print(f"  {name}: {text}", flush=True)
            ):
                print(f"{name}: done", flush=True)
                done.append((seed, row))
        left = [pair for pair in left if pair not in done]
        if not done:  # another process is at what is left
            time.sleep(10)


if __name__ == "__main__":
    main()
