"""Images that fit in memory: a dataset over tensors, and the transform that small images need."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms import v2

__all__ = ["ImageTransform", "TensorImages", "subset"]


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images and labels held as tensors, an image being transformed each time it is read.

    Args:
        images: (N, C, H, W), uint8 or float32.
        labels: (N,), int64.
        transform: takes and gives one image (C, H, W).
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def subset(images: TensorImages, indices: Tensor) -> Subset[tuple[Tensor, int]]:
    """The images with these ``indices`` (M,), in this order; nothing is copied."""
    return Subset(images, indices.tolist())


class ImageTransform:
    """The usual transform of small images: shifted and mirrored at random if asked for, then normalised.

    It takes one image (C, H, W), uint8 (scaled to [0, 1]) or float32 (taken as it is), and gives float32.
    :class:`~lightning_acu.data.device_loader.DeviceLoader` does the same to whole batches, from the attributes.

    Args:
        size: (height, width) of the images, in pixels.
        mean: (C,), of images in [0, 1]. None, with ``std``: nothing is subtracted or divided by.
        std: (C,), of images in [0, 1].
        crop_padding: pixels of zeros around the image before a crop of its own size is taken at random.
        flip: mirror left and right with probability 1/2.
    """

    def __init__(
        self,
        size: tuple[int, int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_padding: int = 0,
        flip: bool = False,
    ) -> None:
        self.size = size
        self.mean = mean
        self.std = std
        self.crop_padding = crop_padding
        self.flip = flip
        steps: list[Callable[[Tensor], Tensor]] = []
        if crop_padding:
            steps.append(v2.RandomCrop(size, padding=crop_padding))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        steps.append(v2.ToDtype(torch.float32, scale=True))
        if mean is not None and std is not None:
            steps.append(v2.Normalize(list(mean), list(std)))
        self._steps = v2.Compose(steps)

    def __call__(self, image: Tensor) -> Tensor:
        """One image (C, H, W), transformed: float32."""
        transformed: Tensor = self._steps(image)
        return transformed
