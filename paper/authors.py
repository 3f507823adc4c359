"""The authors' released network on exact CIFAR-10 images: its error as it is, folded, rounded, with wrong positions.

    python -m paper.authors plain_iter_64000.caffemodel --data cifar10.npz

The file comes from models/ACU of their repository, jyh2986/Active-Convolution. ``--data`` holds images as they are in
CIFAR-10 (x_train, y_train, x_test, y_test); whitening is fitted on its training images, as the authors did on all
50,000. The last two lines are controls: they show that the positions, and their axes, were read as they were meant.
"""

import argparse
from pathlib import Path

import torch

from lightning_acu import acu_layers, fold_acu, round_acu
from lightning_acu.data.npz import read_npz
from lightning_acu.data.whitening import ZCAWhitening
from lightning_acu.figures import plot_shapes
from lightning_acu.models import import_caffe


def exchanged(model):
    """With x and y of all positions exchanged."""
    for _, layer in acu_layers(model):
        layer.offsets.copy_(layer.offsets.view(-1, 2).flip(1).flatten())
    return model


def on_the_grid(model):
    """With all taps where they started."""
    for _, layer in acu_layers(model):
        layer.offsets.zero_()
    return model


VARIANTS = {
    "as released": lambda model: model,
    "folded": fold_acu,
    "rounded to pixels": round_acu,
    "rounded to dilations": lambda model: round_acu(model, to="dilation"),
    "x and y exchanged": exchanged,
    "on the regular grid": on_the_grid,
}


@torch.no_grad()
def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .caffemodel of theirs")
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="an .npz of exact CIFAR-10 images")
    parser.add_argument("--shapes", type=Path, metavar="PATH", help="draw the shapes into this file")
    options = parser.parse_args(args)
    arrays = read_npz(options.data)
    images = ZCAWhitening.fit(arrays.x_train, bias=0.1, contrast_scale=55.0)(arrays.x_test)
    print(f"{len(images):,} test images; whitening from {len(arrays.x_train):,}")
    for name, change in VARIANTS.items():
        model = change(import_caffe(options.file))
        answers = torch.cat([model(piece) for piece in images.split(200)]).argmax(1)
        print(f"{name:21} error {100 * (answers != arrays.y_test).float().mean().item():.2f} %")
    if options.shapes is not None:
        plot_shapes(import_caffe(options.file)).savefig(options.shapes)


if __name__ == "__main__":
    main()
