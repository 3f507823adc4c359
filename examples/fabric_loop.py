"""A loop with Lightning Fabric, in bfloat16."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digits import digits, network
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F

from lightning_acu import convert_to_acu
from lightning_acu.training import PositionTrainer


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, and return the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stop-after", type=int, help="end after this epoch, as a training that was killed")
    parser.add_argument("--checkpoint", type=Path, help="saves after each epoch, and resumes from there")
    args = parser.parse_args(argv)

    fabric = Fabric(accelerator="auto", devices=1, precision="bf16-mixed")
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    images, labels = map(fabric.to_device, digits()[0])
    steps = args.epochs * len(images) // 128
    model = convert_to_acu(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # Before setup(), which wraps the optimizer.
    positions = PositionTrainer(
        optimizer, model, multiplier=0.5, warmup_steps=steps // 4, total_steps=steps, round_at=0.75
    )
    model, optimizer = fabric.setup(model, optimizer)
    state = {"model": model, "optimizer": optimizer, "epoch": -1}
    if args.checkpoint and args.checkpoint.exists():
        fabric.load(args.checkpoint, state)

    for epoch in range(state["epoch"] + 1, args.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        total = 0.0
        for batch in order.split(128):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=5.0)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        fabric.print(f"epoch {epoch}: loss {total * 128 / len(images):.3f}; rounded: {positions.rounded}")
        if args.checkpoint:
            fabric.save(args.checkpoint, state | {"epoch": epoch})
        if epoch == args.stop_after:
            break
    return model.module


if __name__ == "__main__":
    main()
