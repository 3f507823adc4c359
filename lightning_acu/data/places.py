"""Places365-Standard, with the crops that AlexNet was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import Places365
from torchvision.transforms import InterpolationMode, v2

from .base import squeezed
from .class_folders import ClassFoldersDataModule
from .image_files import read_image

__all__ = ["Places365DataModule"]

#: Pixels of a side before the crop; the "small" images of Places365 come in this size.
_RESIZED = 256

#: What torchvision calls the splits.
_SPLITS = {"train": "train-standard", "val": "val"}


class Places365DataModule(ClassFoldersDataModule):
    """Places365-Standard: 1.8 million training and 36,500 validation images of 365 scenes; testing uses the latter.

    Every image is resized to 256 x 256 whatever its proportions, as the images of the "small" archives are already.
    Training crops ``image_size`` pixels at random and mirrors with probability 1/2; evaluation crops at the centre.
    This is how Caffe trains AlexNet, and how the paper, whose code is Caffe's, is read here.

    ``root`` holds either what torchvision's ``Places365(small=True)`` unpacks (``data_256_standard``, ``val_256``,
    ``places365_train_standard.txt``, ``places365_val.txt``, ``categories_places365.txt``), or one folder for each
    class, ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, which is looked for first. Classes are numbered as in the
    list, or in the order of the folders' names. The lists must be the published ones: torchvision compares checksums.

    Args:
        root: folder of the data; a download goes there.
        image_size: pixels of the crop, up to 256. 224 for torchvision's AlexNet, whose first layer pads by 2 and so has
            the 55 x 55 outputs of the original at 227, and for residual networks; 227 for an AlexNet that does not pad.
        num_classes: how many classes the data must have. Fewer than 365 for a part of the data.
        mean: per channel, of images in [0, 1]: ImageNet's.
        std: per channel, of images in [0, 1]: ImageNet's. Caffe subtracts the mean and leaves the contrast as it is.
        download: download the data, 26 GB, if ``root`` lacks them.
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`; the seed has
            no effect here: the folders are the split.

    Raises:
        ValueError: ``image_size``, ``num_classes``, ``mean`` or ``std`` does not fit.
    """

    image_size: tuple[int, int] = (224, 224)

    def __init__(
        self,
        root: str | Path = "data",
        image_size: int = 224,
        num_classes: int = 365,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        download: bool = False,
        **loader: Any,
    ) -> None:
        if not 1 <= image_size <= _RESIZED:
            raise ValueError(f"`image_size` (={image_size}) must be 1 to {_RESIZED} pixels, the size before the crop")
        if num_classes < 1:
            raise ValueError(f"`num_classes` (={num_classes}) must be at least 1")
        for name, value in (("mean", mean), ("std", std)):
            if len(value) != 3:
                raise ValueError(f"`{name}` (={value}) must have one number for each of the 3 channels")
        super().__init__(root=root, folders={"train": "train", "val": "val"}, **loader)
        self.image_size = (image_size, image_size)
        self.mean = mean
        self.std = std
        self._num_classes = num_classes
        self.download = download

    @property
    def num_classes(self) -> int:
        """As given, so that it is known before the data exist; ``setup`` compares it with them."""
        return self._num_classes

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels: of the folders, or of the list of an opened archive."""
        if self._has_folders:
            return self.classes
        opened = self.train_set or self.val_set or self.test_set
        return [] if opened is None else cast(Places365, opened).classes

    @property
    def file_transform(self) -> dict[str, Any]:
        """That of evaluation."""
        return squeezed(self.in_chans, self.image_size, self.mean, self.std, self.image_size[0] / _RESIZED)

    @property
    def _has_folders(self) -> bool:
        return any((self.root / folder).is_dir() for folder in self.folders.values())

    def prepare_data(self) -> None:
        """Download and unpack the data that ``root`` lacks, if ``download`` is set.

        Raises:
            RuntimeError: the download failed, or an archive is damaged.
        """
        if not self.download or self._has_folders:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            for split in _SPLITS.values():
                Places365(self.root, split, small=True, download=True)
        # No network; a connection that ends too early; a file with a wrong checksum.
        except (OSError, HTTPException, RuntimeError) as error:
            raise RuntimeError(f"could not get Places365 ({error}). {self._advice()}") from error

    def _open(self, argument: str, transform: Callable[[Image], Tensor]) -> Dataset[Any]:
        if self._has_folders:
            self._check_classes(self.classes, "class folders")
            return super()._open(argument, transform)
        try:
            dataset = Places365(self.root, _SPLITS[argument], small=True, transform=transform, loader=read_image)
        except RuntimeError as error:
            raise FileNotFoundError(f"Places365 is missing or damaged ({error}). {self._advice()}") from error
        # Not all of 1.8 million, but enough to notice an archive that was only partly unpacked.
        for path, _ in [*dataset.imgs[:: max(1, len(dataset.imgs) // 1000)], dataset.imgs[-1]]:
            if not Path(path).is_file():
                raise FileNotFoundError(
                    f"Places365 is incomplete: {path} does not exist. Delete {dataset.images_dir} if it exists: it "
                    f"may be only partly unpacked. {self._advice()}"
                )
        self._check_classes(dataset.classes, "classes in its list")
        return dataset

    def _check_classes(self, classes: Sequence[str], what: str) -> None:
        if len(classes) != self._num_classes:
            raise ValueError(
                f"`num_classes` (={self._num_classes}) must be the number of {what}, but `root` (={str(self.root)!r}) "
                f"has {len(classes)}: {', '.join(classes[:3])}, ..."
            )

    def _transform(self, training: bool) -> Callable[[Image], Tensor]:
        size = self.image_size
        crop = [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if training else [v2.CenterCrop(size)]
        resize = v2.Resize((_RESIZED, _RESIZED), InterpolationMode.BILINEAR)
        convert = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        normalize = v2.Normalize(list(self.mean), list(self.std))
        transform: Callable[[Image], Tensor] = v2.Compose([resize, *crop, *convert, normalize])
        return transform

    def _advice(self) -> str:
        lists, train, val = (
            Places365._DEVKIT_META["standard"][0],
            *(Places365._IMAGES_META[split, True][0] for split in _SPLITS.values()),
        )
        return (
            f"Put {lists}, {train} and {val}, from {Places365._BASE_URL}, into `root` (={str(self.root)!r}); "
            "`download=True` then unpacks them without a network. Or give a `root` with train/CLASS/*.jpg and "
            "val/CLASS/*.jpg"
        )
