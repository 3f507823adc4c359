"""CIFAR images in memory, and batches that depend on the seed and the number of the step alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_acu.data.npz import read_npz

__all__ = ["Images"]

#: Pixels of border; of the image with it a piece of the old size is cut out at random.
_BORDER = 4


class Images:
    """Training and test images of ``path``, each channel with mean 0 and variance 1 over the training images."""

    def __init__(self, path: Path) -> None:
        train, self.train_labels, test, self.test_labels = read_npz(path)
        pixels = train.float()
        mean, deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
        self.test = (test.float() - mean) / deviation
        self.size = train.shape[-1]
        # The border is zero after normalisation, as in the usual recipe.
        self.train = torch.nn.functional.pad((pixels - mean) / deviation, (_BORDER,) * 4)

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Images (size, C, H, W) and labels (size,) of step ``step``: shuffled by epoch, cropped and mirrored."""
        a_pass = len(self.train) // size
        epoch, place = divmod(step, a_pass)
        order = torch.randperm(len(self.train), generator=_generator(seed, epoch, 0))
        chosen = order[place * size : (place + 1) * size]
        random = _generator(seed, step, 1)
        down, right = torch.randint(0, 2 * _BORDER + 1, (2, size, 1), generator=random)
        rows, columns = down + torch.arange(self.size), right + torch.arange(self.size)
        mirrored = torch.rand(size, 1, generator=random) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        # (size, H, W, C): channels last, as the network wants them
        images = self.train[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return images.permute(0, 3, 1, 2), self.train_labels[chosen]


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63)
    return torch.Generator().manual_seed(seed)
