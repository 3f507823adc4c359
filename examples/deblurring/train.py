"""Deblur photographs with small networks, plain, dilated and active, trained on the same patches.

    pip install scikit-image
    python examples/deblurring/train.py                          # one seed: a table and pictures in runs/deblurring
    python examples/deblurring/train.py --seeds 5 --csv out.csv  # mean, deviation and paired differences

README.md beside this file has the results.
"""

import argparse
import csv
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from lightning.pytorch.loggers import CSVLogger
from module import Deblurring
from photos import Pairs, Patches, photographs
from torch.utils.data import DataLoader

from lightning_acu.callbacks import ConvertToACU, OffsetLogger, PositionLRSchedule, RoundThenFinetune


class Row(NamedTuple):
    """One way to train: dilations of the four layers, a factor on the steps, and what is done to positions."""

    name: str
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    longer: int = 1
    active: bool = False
    round_to: str | None = None


ROWS = [
    Row("plain"),
    Row("plain, twice the steps", longer=2),
    Row("dilations 2, 2, 2, 2", (2, 2, 2, 2)),
    Row("dilations 1, 2, 3, 1", (1, 2, 3, 1)),
    Row("active", active=True),
    Row("active, on pixels from 40 %", active=True, round_to="pixels"),
    Row("active, on dilations from 40 %", active=True, round_to="dilation"),
]

SHOWN = ("plain", "dilations 1, 2, 3, 1", "active")


def train(row: Row, args: argparse.Namespace, seed: int, images: tuple[list, list]) -> tuple[Deblurring, dict]:
    """The trained network and its numbers."""
    pl.seed_everything(seed, verbose=False)
    torch.set_num_threads(1)
    steps = row.longer * args.steps
    model = Deblurring(dilations=row.dilations)
    callbacks: list[pl.Callback] = []
    if row.active:
        # Adam moves a tap by up to its learning rate in each step: 3e-3 x 10 = 0.03 pixels at first.
        callbacks += [
            ConvertToACU(),
            PositionLRSchedule(args.multiplier, warmup_steps=steps // 20),
            OffsetLogger(max(steps // 50, 1)),
        ]
    if row.round_to:
        callbacks.append(
            RoundThenFinetune(at_fraction=0.4, to=row.round_to, fold_after_rounding=row.round_to == "dilation")
        )
    name = row.name.replace(" ", "_").replace(",", "").replace("_%", "")
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=callbacks,
        logger=CSVLogger(args.out, name=name, version=seed),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=50,
    )
    began = time.process_time()
    trainer.fit(model, DataLoader(Patches(images[0], args.noise, steps * args.batch_size, seed), args.batch_size))
    seconds = time.process_time() - began
    (scores,) = trainer.test(model, DataLoader(Pairs(images[1], args.noise)), verbose=False)
    parameters = sum(parameter.numel() for parameter in model.net.parameters())
    return model, {"row": row.name, "seed": seed, **scores, "parameters": parameters, "seconds": seconds}


def table(results: list[dict]) -> str:
    """A line for each row, in Markdown: means over seeds, and the difference from plain with the same seed."""
    base = {result["seed"]: result for result in results if result["row"] == "plain"}
    lines = [
        "| | PSNR, dB | more than plain | SSIM | parameters | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(result["row"] for result in results):
        own = [result for result in results if result["row"] == name]
        psnr = [result["psnr"] for result in own]
        gains = [result["psnr"] - base[result["seed"]]["psnr"] for result in own]
        spread = [f" ± {statistics.stdev(values):.2f}" if len(own) > 1 else "" for values in (psnr, gains)]
        ratio = statistics.median(result["seconds"] / base[result["seed"]]["seconds"] for result in own)
        lines.append(
            f"| {name} | {statistics.mean(psnr):.2f}{spread[0]} | {statistics.mean(gains):+.2f}{spread[1]} | "
            f"{statistics.mean(result['ssim'] for result in own):.4f} | {own[0]['parameters']:,} | {ratio:.1f} x |"
        )
    return "\n".join(lines)


@torch.no_grad()
def draw(models: dict[str, Deblurring], pair: tuple[torch.Tensor, torch.Tensor], path: Path) -> None:
    """A piece of a photograph: out of focus, as each network restores it, and sharp."""
    degraded, sharp = pair
    window = (0, slice(45, 165), slice(105, 225))  # the cat's right eye
    pictures = {"out of focus": degraded[window]}
    pictures |= {name: model.eval()(degraded[None])[0][window] for name, model in models.items()}
    pictures["sharp"] = sharp[window]
    figure, axes = plt.subplots(1, len(pictures), figsize=(2.4 * len(pictures), 2.7), layout="constrained")
    for axis, (name, picture) in zip(axes, pictures.items(), strict=True):
        axis.imshow(picture.clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Train every row with every seed, and return the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], metavar="ROW", help="some of them")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--multiplier", type=float, default=10.0, help="learning rate of positions over that of weights"
    )
    parser.add_argument("--noise", type=float, default=0.5, help="its standard deviation, in grey levels of 255")
    parser.add_argument("--out", type=Path, default=Path("runs/deblurring"))
    parser.add_argument("--csv", type=Path, help="the result of every run")
    args = parser.parse_args(argv)
    if unknown := set(args.rows) - {row.name for row in ROWS}:
        parser.error(f"--rows {' '.join(sorted(unknown))}: there are {', '.join(row.name for row in ROWS)}")

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    images = photographs()
    results, shown = [], {}
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for row in ROWS:
            if row.name not in args.rows:
                continue
            model, result = train(row, args, seed, images)
            results.append(result)
            print(f"seed {seed}: {row.name}: {result['psnr']:.2f} dB in {result['seconds']:.0f} s", flush=True)
            if seed == args.first_seed and row.name in SHOWN:
                shown[row.name] = model
    if "plain" in args.rows:
        print(table(results))
    draw(shown, Pairs(images[1], args.noise)[1], args.out / "restored.png")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(results[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)
    return results


if __name__ == "__main__":
    main()
