"""Top-1 of a pretrained model on real photographs: plain, converted, with moved taps, and folded back.

    python benchmarks/top1.py --model tf_efficientnet_lite0 --images imagenet --checkpoint lite0.pth

``--images`` is a folder with ``val/CLASS/*.jpg``, class folders in the order of the labels. Without ``--checkpoint``
the published weights are downloaded. Conversion must change no prediction, and folding none of the moved model; the
exit status is 1 if it does. Prints a table and, with ``--csv FILE``, appends it there.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_acu import acu_layers, convert_to_acu, create_model, fold_acu, report_acu
from lightning_acu.data import ImageFolderDataModule


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name for lightning_acu.create_model")
    parser.add_argument("--images", type=Path, required=True, help="folder that holds val/CLASS/*.jpg")
    parser.add_argument("--checkpoint", type=Path, help="state_dict of the plain model")
    parser.add_argument("--transforms-of", help="timm model whose preprocessing is used (default: --model)")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--sigma", type=float, default=0.3, help="standard deviation of moved taps, in pixels")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


@torch.inference_mode()
def predict(model: nn.Module, data: ImageFolderDataModule) -> tuple[Tensor, Tensor]:
    """Predicted classes (N,) and labels (N,)."""
    predicted, labels = [], []
    for images, target in data.test_dataloader():
        predicted.append(model(images).argmax(1))
        labels.append(target)
    return torch.cat(predicted), torch.cat(labels)


def main() -> int:
    options = arguments()
    data = ImageFolderDataModule(
        options.images, transforms_of=options.transforms_of or options.model, batch_size=options.batch_size
    )
    data.setup("test")
    model = create_model(options.model, pretrained=options.checkpoint is None, num_classes=data.num_classes).eval()
    if options.checkpoint is not None:
        model.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True))

    found = {"plain": predict(model, data)}
    convert_to_acu(model)
    report = report_acu(model)
    found["converted"] = predict(model, data)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in acu_layers(model):
            layer.offsets += options.sigma * torch.randn(layer.offsets.shape, generator=generator)
    found["taps moved"] = predict(model, data)
    fold_acu(model)
    found["taps moved, folded"] = predict(model, data)

    compared_with = {"converted": "plain", "taps moved": "plain", "taps moved, folded": "taps moved"}
    rows = []
    for stage, (predicted, labels) in found.items():
        other = compared_with.get(stage)
        differ = "" if other is None else f"{int((predicted != found[other][0]).sum())} from {other}"
        rows.append((stage, len(labels), f"{100 * (predicted == labels).double().mean():.1f}", differ))
    names = ("model", "images", "top-1 %", "predictions that differ")
    active = f"{len(report.converted)} of {len(report.rows)} convolutions active"
    table = Table(*names, title=f"{options.model}: {active}, torch {torch.__version__}")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if options.csv is not None:
        with options.csv.open("a", newline="") as file:
            csv.writer(file).writerows((options.model, *row) for row in rows)
    same = all(
        torch.equal(found[stage][0], found[other][0]) for stage, other in compared_with.items() if stage != "taps moved"
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
