"""A loop with Hugging Face's accelerate."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import digits, network
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import convert_to_acu
from lightning_acu.training import PositionTrainer


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, and return the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--stop-after", type=int, help="end after this epoch, as a training that was killed")
    parser.add_argument("--checkpoint", type=Path, help="a folder: saves after each epoch, and resumes from there")
    args = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    loader = DataLoader(TensorDataset(*digits()[0]), batch_size=64, shuffle=True)
    steps = args.epochs * len(loader) // 2
    model = convert_to_acu(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    # Before prepare(), which wraps the optimizer; with several processes divide the steps by their number.
    positions = PositionTrainer(
        optimizer, model, multiplier=5.0, warmup_steps=steps // 4, total_steps=steps, round_at=0.75
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    start = 0
    if args.checkpoint and args.checkpoint.exists():
        accelerator.load_state(str(args.checkpoint))
        start = positions.step * 2 // len(loader)

    for epoch in range(start, args.epochs):
        loader.set_epoch(epoch)
        total = 0.0
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.item()
        accelerator.print(f"epoch {epoch}: loss {total / len(loader):.3f}; rounded: {positions.rounded}")
        if args.checkpoint:
            accelerator.save_state(str(args.checkpoint))
        if epoch == args.stop_after:
            break
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
