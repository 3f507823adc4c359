"""What all image data modules share: loaders, worker processes, and the seed of the split."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Sized
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.fabric.utilities import suggested_max_num_workers
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from ..checks import whole_number

__all__ = ["RECORD", "ImageDataModule", "squeezed"]

#: The key in a data module's state, and so in checkpoints, of what is known about its images.
RECORD = "images"

#: More worker processes than this rarely help a single device, and each holds memory.
_MAX_DEFAULT_WORKERS = 8


class ImageDataModule(LightningDataModule, ABC):
    """Image classification data: batches of images (N, in_chans, height, width) in float32 and labels (N,) in int64.

    A subclass says what its images are (``num_classes``, ``in_chans`` and ``image_size``, known before ``setup`` so
    that a command line can link them to the model) and sets ``train_set``, ``val_set`` and ``test_set`` in ``setup``,
    which Lightning may call more than once. Everything about loaders is here.

    Args:
        batch_size: images per batch and device.
        num_workers: loader processes. None: none for small images already in memory (where Lightning may advise some:
            they would slow it down), else one less than the CPU cores that this process may use, shared among the
            devices of the trainer, and at most 8.
        pin_memory: copy batches to the GPU from page-locked memory; without CUDA it has no effect. None: with CUDA.
        seed: the split into training and validation images depends on this number alone, so that it stays the same
            when ``seed_everything`` changes. Shuffling and augmentation follow ``seed_everything``.

    Raises:
        TypeError: ``batch_size`` or ``num_workers`` is not a whole number.
        ValueError: ``batch_size`` is below 1 or ``num_workers`` below 0.
    """

    #: Whether reading an image costs enough to pay for worker processes; decides the default of ``num_workers``.
    needs_workers: ClassVar[bool] = True

    train_set: Dataset[Any] | None = None
    val_set: Dataset[Any] | None = None
    test_set: Dataset[Any] | None = None

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int | None = None,
        pin_memory: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = whole_number("batch_size", batch_size, 1)
        self.num_workers = None if num_workers is None else whole_number("num_workers", num_workers)
        self.pin_memory = pin_memory
        self.seed = seed

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; labels are 0 ... num_classes - 1."""

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of an image: 1 (grey) or 3 (RGB)."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a batch, in pixels."""

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Set ``train_set``, ``val_set`` and ``test_set``, or those that the stage needs, unless they are set already.

        Args:
            stage: "fit", "validate", "test" or "predict"; None for all.
        """

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes, in the order of the labels, if they have names."""
        return None

    @property
    def file_transform(self) -> dict[str, Any] | None:
        """How an image file becomes an input: arguments of timm's ``create_transform``; None if files cannot."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: what ``lightning-acu predict`` and ``export`` ask about the images."""
        return {
            RECORD: {
                "input_size": [self.in_chans, *self.image_size],
                "classes": None if self.class_names is None else list(self.class_names),
                "transform": self.file_transform,
            }
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled. An incomplete last batch is dropped: a batch of one or two images upsets batch normalisation."""
        dataset = self._require("train_set")
        replicas = self.trainer.world_size if self.trainer is not None else 1
        # The only batch of a process is kept, whatever its size: without it there would be no training.
        drop_last = _length(dataset) > self.batch_size * replicas
        return self._loader(dataset, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        """In fixed order. Empty without validation images: Lightning then skips validation, with a warning."""
        return self._loader(self._require("val_set"))

    def test_dataloader(self) -> DataLoader[Any]:
        """In fixed order."""
        return self._loader(self._require("test_set"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images, in fixed order, with their labels."""
        return self._loader(self._require("test_set"))

    def _require(self, name: str) -> Dataset[Any]:
        dataset: Dataset[Any] | None = getattr(self, name)
        if dataset is None:
            raise RuntimeError(f"{type(self).__name__} has no `{name}` yet: call setup() before asking for a loader")
        return dataset

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False, drop_last: bool = False) -> DataLoader[Any]:
        workers = self._workers()
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            generator=self._resumed_generator() if shuffle else None,
            drop_last=drop_last,
            num_workers=workers,
            # Without CUDA torch would warn and go on unpinned, which is what the class documents.
            pin_memory=torch.cuda.is_available() and self.pin_memory is not False,
            persistent_workers=workers > 0,
        )

    def _resumed_generator(self) -> torch.Generator | None:
        """For a resumed training: with the seed alone, it would see the orders of its first epochs again."""
        step = self.trainer.global_step if self.trainer is not None else 0
        if not step:
            return None
        (seed,) = np.random.SeedSequence((torch.initial_seed(), step)).generate_state(1)
        return torch.Generator().manual_seed(int(seed))

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if self.needs_workers:
            # The bound that Lightning itself compares with, so that the default never draws its warning.
            devices = self.trainer.num_devices if self.trainer is not None else 1
            return min(_MAX_DEFAULT_WORKERS, suggested_max_num_workers(devices))
        return 0


def _length(dataset: Dataset[Any]) -> int:
    # torch leaves `__len__` out of Dataset, but all of ours have one.
    return len(cast(Sized, dataset))


def squeezed(
    channels: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], crop_pct: float = 1.0
) -> dict[str, Any]:
    """Arguments of timm's ``create_transform``: the whole image at ``size`` over ``crop_pct``, and ``size`` cut out."""
    return {
        "input_size": [channels, *size],
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear",
        "crop_pct": crop_pct,
        "crop_mode": "squash",
    }
