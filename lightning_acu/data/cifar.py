"""CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from .base import squeezed
from .in_memory import InMemoryDataModule, Preprocessing
from .memory import ImageTransform, TensorImages
from .whitening import ZCAWhitening

__all__ = ["CIFARDataModule"]

#: Dataset, mean and standard deviation (of the training images, scaled to [0, 1]) by number of classes.
_VARIANTS = {
    10: (CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: (CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

#: Pixels of zeros around a training image before it is cropped, as usual for CIFAR.
_CROP_PADDING = 4


class CIFARDataModule(InMemoryDataModule):
    """CIFAR-10 or CIFAR-100: 50,000 training and 10,000 test images, 32 x 32 pixels, RGB.

    The files are pickles, which could run any code. Only the published ones are trusted: torchvision compares the MD5
    of each file before it unpickles any, and so that of an archive before it unpacks it.

    Args:
        root: folder of the data; a download goes there.
        num_classes: 10 or 100, for CIFAR-10 or CIFAR-100.
        val_size: training images set aside for validation; a float is a share of them. 0: train on all 50,000 as
            published recipes do, without validation.
        augment: crop training images at random after padding by 4 pixels, and mirror them with probability 1/2.
        download: download the data if ``root`` lacks them.
        preprocessing: "normalize", by the usual mean and standard deviation of each channel, or "whiten", the paper's
            global contrast normalisation and ZCA whitening, fitted on the images trained on.
        on_device: hold the images on the training device and make batches there; faster, also on a CPU.
        whitening_cache: folder in which the fitted whitening (38 MB) is kept. None: ``root``.
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`.

    Raises:
        ValueError: ``num_classes`` is neither 10 nor 100, or an argument does not fit :class:`InMemoryDataModule`.
    """

    num_classes: int = 10
    in_chans = 3
    image_size = (32, 32)

    def __init__(
        self,
        root: str | Path = "data",
        num_classes: int = 10,
        val_size: int | float = 5000,
        augment: bool = True,
        download: bool = True,
        preprocessing: Preprocessing = "normalize",
        on_device: bool = False,
        whitening_cache: str | Path | None = None,
        **loader: Any,
    ) -> None:
        if num_classes not in _VARIANTS:
            raise ValueError(f"`num_classes` (={num_classes}) must be 10, for CIFAR-10, or 100, for CIFAR-100")
        super().__init__(
            preprocessing=preprocessing,
            on_device=on_device,
            whitening_cache=whitening_cache,
            val_size=val_size,
            **loader,
        )
        self.root = Path(root).expanduser()
        self.num_classes = num_classes
        self.augment = augment
        self.download = download
        self._source, self.mean, self.std = _VARIANTS[num_classes]

    @property
    def file_transform(self) -> dict[str, Any] | None:
        """Squeezed to 32 x 32 pixels; None where images are whitened, which is fitted on the training images."""
        if self.preprocessing == "whiten":
            return None
        return squeezed(self.in_chans, self.image_size, self.mean, self.std)

    def prepare_data(self) -> None:
        """Download the data, or unpack an archive that is in ``root`` already, if ``download`` is set.

        Raises:
            RuntimeError: the download failed, or the archive is damaged.
        """
        if not self.download:
            return
        try:
            self._source(self.root, download=True)
        # No network; a connection that ends too early; a file with a wrong checksum.
        except (OSError, HTTPException, RuntimeError) as error:
            raise RuntimeError(
                f"could not get {self._source.__name__} ({error}): {self._complaint()}. {self._advice()}"
            ) from error

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs, once: training and validation images to fit or validate, else the test images.

        Raises:
            FileNotFoundError: the data are not in ``root``.
            ValueError: ``val_size`` leaves no image for training.
        """
        mean, std = (self.mean, self.std) if self.preprocessing == "normalize" else (None, None)
        plain = ImageTransform(self.image_size, mean, std)
        if stage in (None, "fit", "validate") and self.train_set is None:
            augmenting = ImageTransform(self.image_size, mean, std, crop_padding=_CROP_PADDING, flip=True)
            self._set_training(*self._read(train=True), plain, augmenting if self.augment else plain, self.root)
        if stage in (None, "test", "predict") and self.test_set is None:
            images, labels = self._read(train=False)
            if self.preprocessing == "whiten":
                images = self._test_whitening()(images)
            self.test_set = TensorImages(images, labels, plain)

    def _test_whitening(self) -> ZCAWhitening:
        """The whitening of the training images, which are read again if no earlier stage has read them."""
        if self._whitening is not None:
            return self._whitening
        images, labels = self._read(train=True)
        return self._fit_whitening(images, self._split(labels)[0], self.root)

    def _read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Images (N, 3, 32, 32), uint8, and labels (N,), int64."""
        try:
            source = self._source(self.root, train=train)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{self._source.__name__} is missing or damaged: {self._complaint()}. {self._advice()}"
            ) from error
        return torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(
            source.targets, dtype=torch.int64, device="cpu"
        )

    def _complaint(self) -> str:
        """What is wrong with the files in ``root``."""
        if not self.root.is_dir():
            return f"`root` (={str(self.root)!r}) does not exist"
        source, folder = self._source, self.root / self._source.base_folder
        archive = self.root / source.filename
        if not folder.is_dir():
            others = 10 if self.num_classes == 100 else 100
            if (self.root / _VARIANTS[others][0].base_folder).is_dir():
                return f"`root` has {_VARIANTS[others][0].base_folder}, which is for `num_classes={others}`"
            if archive.is_file() and not check_integrity(archive, source.tgz_md5):
                return f"{archive} is damaged: its checksum is wrong"
            return f"`root` has no folder {source.base_folder}"
        files = [*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])]
        damaged = [name for name, md5 in files if not check_integrity(folder / name, md5)]
        return f"these files in {folder} are missing or damaged: {', '.join(damaged)}"

    def _advice(self) -> str:
        return (
            f"Put {self._source.filename}, from {self._source.url}, into `root` (={str(self.root)!r}); "
            "`download=True` then unpacks it without a network"
        )
