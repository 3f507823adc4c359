"""Learned shapes for docs/gallery.md: one small network on handwritten digits, trained in several ways.

python scripts/gallery.py --out docs/images/gallery    # a minute on one core
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_acu import ACUConv2d, convert_to_acu, plot_shapes
from lightning_acu.training import PositionTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import accuracy, digits

SIZE, BATCH = 16, 128


@dataclass(frozen=True)
class Picture:
    """A way to make and train the network."""

    convolution: Callable[[int, int, int], nn.Module] = lambda i, o, stride: nn.Conv2d(i, o, 3, stride, 1, bias=False)
    convert: dict[str, Any] = field(default_factory=dict)
    positions: dict[str, Any] = field(default_factory=dict)


def _cross(inputs: int, outputs: int, stride: int) -> nn.Module:
    places = [(-1.0, 0.0), (0.0, -1.0), (0.0, 0.0), (0.0, 1.0), (1.0, 0.0)]
    return ACUConv2d.from_positions(inputs, outputs, places, stride=stride, bias=False)


def _wide(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 5, stride, 2, bias=False)


PICTURES = {
    "free": Picture(),
    "pixels": Picture(positions={"schedule": "lattice", "round_at": 0.8}),
    "dilation": Picture(positions={"schedule": "dilation", "round_at": 0.8, "round_to": "dilation"}),
    "groups": Picture(convert={"position_groups": 4}, positions={"max_displacement": 2.0}),
    "wide": Picture(_wide),
    "cross": Picture(_cross),
}


def train(picture: Picture, epochs: int, seed: int = 0) -> tuple[nn.Module, float]:
    """The trained network, and its accuracy on the test images."""
    torch.manual_seed(seed)
    (images, labels), test = digits(SIZE)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [picture.convolution(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = convert_to_acu(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)), **picture.convert
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    per_epoch = len(images) // BATCH
    steps = epochs * per_epoch
    PositionTrainer(optimizer, model, multiplier=5.0, warmup_steps=per_epoch, total_steps=steps, **picture.positions)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    return model, accuracy(model, *test)


def main(argv: Sequence[str] | None = None) -> None:
    """Train each network, and write its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        model, score = train(PICTURES[name], args.epochs)
        plot_shapes(model).savefig(args.out / f"{name}.png", dpi=90)
        print(f"{name}: {score:.1%} of the test images, {args.out / name}.png")


if __name__ == "__main__":
    main()
