"""What data modules of images in memory share: the preprocessing, the split, and batches made on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..choices import one_of
from .base import ImageDataModule
from .device_loader import DeviceLoader
from .memory import ImageTransform, TensorImages, subset
from .split import resolve_size, stratified_order
from .whitening import ZCAWhitening
from .whitening_cache import cached_whitening

__all__ = ["InMemoryDataModule", "Preprocessing"]

#: What happens to images before the network sees them.
Preprocessing = Literal["normalize", "whiten"]


class InMemoryDataModule(ImageDataModule):
    """Images that are held in memory, so that they can be whitened beforehand and stay on the training device.

    Args:
        preprocessing: "normalize" subtracts the mean of each channel and divides by its standard deviation; "whiten"
            is the paper's: global contrast normalisation to scale 55, then ZCA whitening with bias 0.1, fitted on the
            images trained on and not on those for validation or testing
            (:mod:`~lightning_acu.data.whitening` has the formulas). The zeros of the padding are black
            with "normalize", and the mean of the whitened images with "whiten".
        on_device: hold the images on the training device and make batches there, all images of a batch at once
            (:class:`~lightning_acu.data.device_loader.DeviceLoader`). Also faster on a CPU. Prediction still has an
            ordinary DataLoader, in which Lightning counts the images.
        whitening_cache: folder in which the fitted whitening is kept for the next time. None: that of the data.
        val_size: training images for validation; a float is a share of them.
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`.

    Raises:
        ValueError: ``preprocessing`` is neither of the two, or ``num_workers`` or ``pin_memory`` is given with
            ``on_device``, where it would have no effect.
    """

    def __init__(
        self,
        *,
        preprocessing: Preprocessing = "normalize",
        on_device: bool = False,
        whitening_cache: str | Path | None = None,
        val_size: int | float = 0,
        **loader: Any,
    ) -> None:
        one_of("preprocessing", preprocessing, get_args(Preprocessing))
        super().__init__(**loader)
        for name in ("num_workers", "pin_memory"):
            if on_device and getattr(self, name):
                raise ValueError(
                    f"`{name}` (={getattr(self, name)}) has no effect with `on_device=True`, where no batch is loaded "
                    "or transferred; leave one of the two out"
                )
        self.preprocessing = preprocessing
        self.on_device = on_device
        self.whitening_cache = None if whitening_cache is None else Path(whitening_cache).expanduser()
        self.val_size = val_size
        self._whitening: ZCAWhitening | None = None

    def _split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the images for training, and of those for validation."""
        vals = resolve_size("val_size", self.val_size, len(labels))
        val, train = stratified_order(labels, self.seed).tensor_split([vals])
        return train, val

    def _fit_whitening(self, images: Tensor, train: Tensor, folder: Path) -> ZCAWhitening:
        """The whitening for the images ``train`` (M,) of ``images``; fitted or read once."""
        if self._whitening is None:
            self._whitening = cached_whitening(images, train, self.whitening_cache or folder)
        return self._whitening

    def _set_training(
        self, images: Tensor, labels: Tensor, plain: ImageTransform, augmenting: ImageTransform, folder: Path
    ) -> None:
        """Set ``train_set`` and ``val_set`` from the training images (N, C, H, W) and labels (N,)."""
        train, val = self._split(labels)
        if self.preprocessing == "whiten":
            images = self._fit_whitening(images, train, folder)(images)
        self.train_set = subset(TensorImages(images, labels, augmenting), train)
        self.val_set = subset(TensorImages(images, labels, plain), val)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test images, in fixed order, with their labels."""
        return super()._loader(self._require("test_set"))

    def _loader(self, dataset: Dataset[Any], shuffle: bool = False, drop_last: bool = False) -> Any:
        if not self.on_device:
            return super()._loader(dataset, shuffle, drop_last)
        device, seed, shares = torch.device("cpu"), 0, {}  # the loader checks that there is only one process
        trainer = self.trainer
        if shuffle:
            seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        if trainer is not None:
            device = trainer.strategy.root_device
            # All processes need one order, even where each was seeded differently.
            seed = trainer.strategy.broadcast(seed)
            kwargs = trainer.distributed_sampler_kwargs or {}
            shares = {"rank": kwargs.get("rank", 0), "replicas": kwargs.get("num_replicas", 1)}
            # As Lightning does with other loaders: to overfit some batches they have to stay the same.
            shuffle = shuffle and not getattr(trainer, "overfit_batches", 0)  # set by its connector, untyped
        return DeviceLoader(
            cast(TensorImages, dataset),
            self.batch_size,
            device,
            shuffle=shuffle,
            drop_last=drop_last,
            seed=seed,
            **shares,
        )
