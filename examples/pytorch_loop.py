"""A plain PyTorch loop: mixed precision, accumulated gradients, clipping, a scheduler, and a resume that is exact.

python examples/pytorch_loop.py --epochs 6
python examples/pytorch_loop.py --epochs 6 --checkpoint last.pt    # saves after each epoch, and resumes from the file
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from digits import accuracy, digits, network
from torch import nn
from torch.nn import functional as F

from lightning_acu import convert_to_acu
from lightning_acu.training import PositionTrainer

BATCH, PARTS = 128, 2  # images in a step, in so many parts whose gradients are accumulated


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, and return the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--stop-after", type=int, help="end after this epoch, as a training that was killed")
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    (images, labels), test = digits()
    images, labels, test = images.to(device), labels.to(device), tuple(part.to(device) for part in test)
    steps_per_epoch = len(images) // BATCH
    steps = args.epochs * steps_per_epoch

    model = convert_to_acu(network()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    positions = PositionTrainer(
        optimizer, model, multiplier=5.0, warmup_steps=steps_per_epoch, total_steps=steps, round_at=0.75
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # made after the PositionTrainer
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start = 0
    if args.checkpoint and args.checkpoint.exists():  # the optimizer's state has the steps of positions, too
        saved = torch.load(args.checkpoint, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
            part.load_state_dict(saved[name])
        start = saved["epoch"] + 1

    for epoch in range(start, args.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).to(device)
        total = 0.0
        for batch in order.split(BATCH):
            for part in batch.chunk(PARTS):
                with torch.autocast(device.type, dtype):
                    loss = F.cross_entropy(model(images[part]), labels[part]) / PARTS
                scaler.scale(loss).backward()
                total += loss.item()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(positions.weights(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        moved = max(row["max_displacement"] for row in positions.report().values())
        print(f"epoch {epoch}: loss {total / steps_per_epoch:.3f}, taps moved by up to {moved:.2f} pixels")
        if args.checkpoint:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch}, args.checkpoint)
        if epoch == args.stop_after:
            break
    print(f"rounded: {positions.rounded}; accuracy on test images: {accuracy(model, *test):.3f}")
    return model


if __name__ == "__main__":
    main()
