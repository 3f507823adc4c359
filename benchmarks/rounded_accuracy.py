"""What rounding costs: test accuracy on digits with fractional taps, rounded to pixels, and rounded to dilations.

    python benchmarks/rounded_accuracy.py --out runs/rounded_accuracy      # 3 seeds, on the CPU

For each seed a small network learns its shapes until ``--round_at`` of the steps. From there it is continued three
times, with the same weights, moments of the optimizer and batches, and its taps frozen: where they are, on the nearest
pixels, and on the nearest dilations. "dilations, annealed" is another search, whose taps the schedule "dilation" brings
onto those grids by themselves. Beside them, trained from scratch for as many steps: the plain network, the same with a
fixed dilation of 2, and the plain network with the dilations that the first search found.
"""

import argparse
import copy
import csv
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lightning_acu import acu_layers, apply_dilations, convert_to_acu
from lightning_acu.data import DigitsDataModule
from lightning_acu.training import PositionTrainer, round_layers

CHANNELS = (12, 24, 48)


def network():
    """Three 3x3 convolutions, at 28x28, 14x14 and 7x7 pixels."""
    layers, before = [], 1
    for channels in CHANNELS:
        layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if channels != CHANNELS[-1] else []
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def weights(model):
    """All parameters but positions."""
    positions = {id(layer.offsets) for _, layer in acu_layers(model)}
    return [parameter for parameter in model.parameters() if id(parameter) not in positions]


class Run:
    """A training that can be stopped and continued: a model, its optimizer, and the batches of one seed."""

    def __init__(self, model, options, batches, **arguments):
        self.model, self.options, self.batches = model.train(), options, batches
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
        self.positions = None
        if list(acu_layers(model)):
            self.positions = PositionTrainer(
                self.optimizer, model, multiplier=options.multiplier, warmup_steps=len(batches) // 10, **arguments
            )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, len(batches))
        self.step = 0

    def train(self, until):
        """Take the steps up to ``until``; returns itself."""
        for images, labels in self.batches[self.step : until]:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            self.optimizer.step()
            self.schedule.step()
        self.step = until
        return self

    def frozen(self, to):
        """The same training with its taps frozen where they are (None), on pixels or on dilations; and the report."""
        model = copy.deepcopy(self.model)
        report = None if to is None else round_layers(list(acu_layers(model)), to=to)
        for _, layer in acu_layers(model):
            layer.offsets.requires_grad_(False)
        other = copy.copy(self)
        other.model = model
        other.optimizer = torch.optim.AdamW(weights(model), lr=self.options.lr, weight_decay=0.05)
        for ours, theirs in zip(weights(model), weights(self.model), strict=True):
            other.optimizer.state[ours] = copy.deepcopy(self.optimizer.state[theirs])
        other.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(other.optimizer, len(self.batches))
        other.schedule.load_state_dict(self.schedule.state_dict() | {"base_lrs": [self.options.lr]})
        other.optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"]
        return other, report

    @torch.no_grad()
    def accuracy(self, batches):
        """The share of images that are classified right, in percent."""
        self.model.eval()
        right = torch.cat([self.model(images).argmax(1) == labels for images, labels in batches])
        return 100 * right.float().mean().item()


def measure(options, seed):
    """(accuracy by arm, the dilations found) for one seed."""
    torch.manual_seed(seed)
    data = DigitsDataModule(val_size=0, batch_size=64, num_workers=0, seed=seed)
    data.setup()
    batches = [batch for _ in range(options.epochs) for batch in data.train_dataloader()][: options.batches]
    test = list(data.test_dataloader())
    start, steps = network(), len(batches)

    def scratch(change=None):
        model = copy.deepcopy(start)
        return Run(model if change is None else change(model), options, batches).train(steps).accuracy(test)

    accuracy = {"plain": scratch()}
    convolutions = [name for name, module in start.named_modules() if isinstance(module, nn.Conv2d)]
    accuracy["dilation 2"] = scratch(lambda model: apply_dilations(model, dict.fromkeys(convolutions, 2)))
    end = int(options.round_at * steps)
    search = Run(convert_to_acu(copy.deepcopy(start)), options, batches).train(end)
    for arm, to in {"fractional": None, "pixels": "pixels", "dilations": "dilation"}.items():
        run, report = search.frozen(to)
        accuracy[arm] = run.train(steps).accuracy(test)
    arguments = {"schedule": "dilation", "total_steps": end}
    annealed, _ = Run(convert_to_acu(copy.deepcopy(start)), options, batches, **arguments).train(end).frozen("dilation")
    accuracy["dilations, annealed"] = annealed.train(steps).accuracy(test)
    accuracy["found, from scratch"] = scratch(lambda model: apply_dilations(model, report.dilations))
    return accuracy, report.dilations


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--epochs", type=int, default=8, help="each of 62 steps")
    parser.add_argument("--batches", type=int, default=None, help="take only so many of these steps")
    parser.add_argument("--round_at", type=float, default=0.4, help="share of the steps after which taps are frozen")
    parser.add_argument(
        "--multiplier", type=float, default=50.0, help="learning rate of positions over that of weights"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/rounded_accuracy"), help="folder for the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for seed in range(options.seeds):
        accuracy, found = measure(options, seed)
        print(f"seed {seed}: found {found}", flush=True)
        for arm, value in accuracy.items():
            rows.append({"seed": seed, "arm": arm, "accuracy": round(value, 3), "dilations": str(found)})
            print(f"  {arm:20} {value:6.2f} %", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "rounded_accuracy.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("\n| network | mean of seeds | each |\n| --- | --- | --- |")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row["accuracy"] for row in rows if row["arm"] == arm]
        print(f"| {arm} | {statistics.mean(own):.2f} % | {', '.join(f'{value:.1f}' for value in own)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
