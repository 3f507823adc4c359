"""A training script with timm or torchvision that knows nothing of lightning_acu, as people have them. Run it so:

python -m lightning_acu.integrations.run --positions.multiplier 20 --positions.warmup_steps 8 --positions.round_at 24 \
    examples/plain_script.py --library timm --model test_resnet --epochs 4 --output runs
"""

import argparse
from pathlib import Path

import timm
import torch
import torchvision
from digits import accuracy, digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

BATCH = 32


def main() -> None:
    """Train, and save a checkpoint after each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--library", choices=["timm", "torchvision"], default="timm")
    parser.add_argument("--model", default="test_resnet")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    args = parser.parse_args()

    torch.manual_seed(0)
    (images, labels), test = digits(size=24)
    images, labels = images[:256].repeat(1, 3, 1, 1), labels[:256]
    test = test[0][:64].repeat(1, 3, 1, 1), test[1][:64]
    if args.library == "timm":
        model = timm.create_model(args.model, num_classes=10)
        if args.evaluate:
            timm.models.load_checkpoint(model, args.evaluate)
            print(f"accuracy {accuracy(model, *test):.3f}")
            return
        optimizer = create_optimizer_v2(model, opt="adamw", lr=0.005, weight_decay=0.05)
        average = ModelEmaV3(model, decay=0.9)
    else:
        model = torchvision.models.get_model(args.model, num_classes=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0.05)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=args.epochs)
    start = 0
    if args.resume:
        saved = torch.load(args.resume, weights_only=True)
        model.load_state_dict(saved["state_dict"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])
        start = saved["epoch"] + 1
        scheduler.step(start)

    args.output.mkdir(parents=True, exist_ok=True)
    for epoch in range(start, args.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        total = 0.0
        for batch in order.split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model) if args.library == "timm" else average.update_parameters(model)
            total += loss.item()
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {total * BATCH / len(images):.3f}, accuracy {accuracy(average, *test):.3f}")
        parts = {"state_dict": model, "optimizer": optimizer, "average": average}
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save(saved | {"epoch": epoch}, args.output / f"epoch-{epoch}.pt")


if __name__ == "__main__":
    main()
