"""Photographs that come inside packages (scikit-image and scikit-learn), made blurred and noisy."""

import numpy as np
import skimage.color
import skimage.data
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

__all__ = ["Pairs", "Patches", "disc", "photographs"]

#: Radius of the disc that a point becomes when the lens is out of focus, in pixels.
RADIUS = 4


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """Grey photographs (1, H, W) with values in 0 ... 1: seven to train with and six others to test with."""
    data = skimage.data
    train = [
        data.stereo_motorcycle()[0], data.astronaut(), data.hubble_deep_field(), data.immunohistochemistry(),
        data.grass(), data.gravel(), data.brick(),
    ]  # fmt: skip
    test = [data.coffee(), data.chelsea(), data.camera(), data.rocket(), *load_sample_images().images]
    return [_grey(image) for image in train], [_grey(image) for image in test]


def _grey(image: np.ndarray) -> Tensor:
    values = skimage.color.rgb2gray(image) if image.ndim == 3 else image / 255
    return torch.from_numpy(values).float()[None]


def disc(radius: float = RADIUS) -> Tensor:
    """The point spread function of a lens out of focus: a disc, (1, 1, K, K), of sum 1, smooth at its edge."""
    half = int(radius) + 1
    along = torch.arange(-half, half + 1.0)
    distance = torch.hypot(along[:, None], along)
    spread = (radius + 0.5 - distance).clamp(0, 1)
    return (spread / spread.sum())[None, None]


def blurred(image: Tensor) -> tuple[Tensor, Tensor]:
    """``image`` (1, H, W) out of focus, without noise, and the sharp one: without the border that blur comes into."""
    kernel = disc()
    half = kernel.shape[-1] // 2
    return F.conv2d(image[None], kernel)[0], image[:, half:-half, half:-half]


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """(degraded, sharp), each (1, H, W): whole photographs, with the same noise every time."""

    def __init__(self, images: list[Tensor], noise: float) -> None:
        self.pairs = [
            (_noisy(degraded, noise, torch.Generator().manual_seed(index)), sharp)
            for index, (degraded, sharp) in enumerate(map(blurred, images))
        ]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index]


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """``count`` pairs of patches (1, size, size), places and mirroring at random; a patch is the same every time."""

    def __init__(self, images: list[Tensor], noise: float, count: int, seed: int, size: int = 48) -> None:
        self.pairs = [blurred(image) for image in images]
        self.noise, self.count, self.seed, self.size = noise, count, seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.seed * 10_000_019 + index)
        degraded, sharp = self.pairs[int(torch.randint(len(self.pairs), (), generator=random))]
        top, left = (int(torch.randint(length - self.size + 1, (), generator=random)) for length in sharp.shape[1:])
        window = (slice(None), slice(top, top + self.size), slice(left, left + self.size))
        degraded, sharp = degraded[window], sharp[window]
        if torch.rand((), generator=random) < 0.5:
            degraded, sharp = degraded.flip(-1), sharp.flip(-1)
        if torch.rand((), generator=random) < 0.5:
            degraded, sharp = degraded.transpose(1, 2), sharp.transpose(1, 2)
        return _noisy(degraded, self.noise, random), sharp


def _noisy(image: Tensor, noise: float, random: torch.Generator) -> Tensor:
    """``noise``: its standard deviation, in grey levels of 255."""
    return image + noise / 255 * torch.randn(image.shape, generator=random)
