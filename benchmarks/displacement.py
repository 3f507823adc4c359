"""How far taps end from where they started: a small network on digits, trained with ``multiplier="auto"``.

    python benchmarks/displacement.py                                    # the table in docs/training.md
    python benchmarks/displacement.py --steps 300 3000 --pixels 0.01     # a rate of your own, in pixels per step

The network has three convolutions (4, 8 and 16 channels) and sees digits of 14 x 14 pixels. Positions are still for the
first tenth of the steps; the weights' learning rate follows a cosine to zero, which positions follow.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.data import DigitsDataModule
from lightning_acu.training import PositionTrainer

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.002),
}


def digits():
    """Images (3750, 1, 14, 14) and labels."""
    data = DigitsDataModule(augment=False)
    data.setup()
    images, labels = zip(*DataLoader(data.train_set, 250), strict=True)
    return F.avg_pool2d(torch.cat(images), 2), torch.cat(labels)


def network():
    def block(inputs, outputs, stride):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    features = [*block(1, 4, 1), *block(4, 8, 2), *block(8, 16, 2)]
    return convert_to_acu(nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))


def measure(arguments, images, labels, optimizer_name, steps):
    torch.manual_seed(arguments.seed)
    model = network()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if arguments.pixels is None:
        rates = {"multiplier": "auto", "target_displacement": arguments.target}
    else:
        rates = {"multiplier": arguments.pixels / optimizer.param_groups[0]["lr"]}
    positions = PositionTrainer(
        optimizer, model, warmup_steps=steps // 10, total_steps=steps, normalize=arguments.normalize, **rates
    )
    pixels = positions.report()["0"]["learning_rate"]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (arguments.batch_size,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    moved = [layer.displacement.norm(dim=-1)[:, layer.movable].flatten() for _, layer in acu_layers(model)]
    moved = torch.cat(moved).detach()
    return {
        "optimizer": optimizer_name,
        "normalize": arguments.normalize,
        "steps": steps,
        "pixels_per_step": f"{pixels:.3g}",
        "mean_displacement": round(moved.mean().item(), 2),
        "max_displacement": round(moved.max().item(), 2),
        "last_loss": round(torch.stack(losses[-100:]).mean().item(), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 3000, 30000])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--normalize", default="gradient", choices=["gradient", "momentum"])
    parser.add_argument("--target", type=float, default=0.5, help="target_displacement, in pixels")
    parser.add_argument("--pixels", type=float, default=None, help="learning rate of positions, instead of 'auto'")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images, labels = digits()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "displacement.csv").open("w", newline="") as file:
        writer = None
        for steps in arguments.steps:
            for name in arguments.optimizers:
                row = measure(arguments, images, labels, name, steps)
                print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
                if writer is None:
                    writer = csv.DictWriter(file, row)
                    writer.writeheader()
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    main()
