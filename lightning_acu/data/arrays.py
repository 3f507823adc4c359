"""Your own images, from one .npz file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .in_memory import InMemoryDataModule, Preprocessing
from .memory import ImageTransform, TensorImages
from .npz import ImageArrays, read_npz

__all__ = ["ArrayDataModule"]


class ArrayDataModule(InMemoryDataModule):
    """Images from an .npz file with the arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test``.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3; uint8 is scaled to [0, 1], floating point is used
    as it is and must be finite. Labels are integers (N,) that start from 0. The file is read when first needed: by
    ``setup``, or when ``num_classes``, ``in_chans`` or ``image_size`` is asked for. ``numpy.savez`` writes such a file.

    Args:
        path: the .npz file.
        mean: per channel, of the scaled images. None: that of ``x_train``.
        std: per channel, of the scaled images. None: that of ``x_train``.
        val_size: images of ``x_train`` for validation; a float is a share of them. 0: no validation.
        crop_padding: pixels of zeros around a training image before a crop of its own size is taken at random.
        flip: mirror training images left and right with probability 1/2.
        preprocessing: "normalize", by ``mean`` and ``std``, or "whiten", the paper's global contrast normalisation and
            ZCA whitening, fitted on the images trained on; for images of up to 3 x 64 x 64.
        on_device: hold the images on the training device and make batches there; faster, also on a CPU.
        whitening_cache: folder in which the fitted whitening is kept. None: that of ``path``.
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`.

    Raises:
        ValueError: ``crop_padding`` is negative, ``mean`` or ``std`` is given with ``preprocessing="whiten"``, or an
            argument does not fit :class:`InMemoryDataModule`.
    """

    needs_workers = False

    def __init__(
        self,
        path: str | Path,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        val_size: int | float = 0.1,
        crop_padding: int = 0,
        flip: bool = False,
        preprocessing: Preprocessing = "normalize",
        on_device: bool = False,
        whitening_cache: str | Path | None = None,
        **loader: Any,
    ) -> None:
        if crop_padding < 0:
            raise ValueError(f"`crop_padding` (={crop_padding}) must be at least 0 pixels")
        for name, value in (("mean", mean), ("std", std)):
            if preprocessing == "whiten" and value is not None:
                raise ValueError(f"`{name}` (={value}) has no effect with `preprocessing='whiten'`; leave it out")
        super().__init__(
            preprocessing=preprocessing,
            on_device=on_device,
            whitening_cache=whitening_cache,
            val_size=val_size,
            **loader,
        )
        self.path = Path(path).expanduser()
        self.mean = mean
        self.std = std
        self.crop_padding = crop_padding
        self.flip = flip

    @property
    def num_classes(self) -> int:
        """The largest label of ``y_train``, plus one."""
        return int(self._arrays.y_train.max()) + 1

    @property
    def in_chans(self) -> int:
        """C of ``x_train``."""
        return self._arrays.x_train.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of ``x_train``."""
        height, width = self._arrays.x_train.shape[2:]
        return height, width

    @cached_property
    def _arrays(self) -> ImageArrays:
        return read_npz(self.path)

    def setup(self, stage: str | None = None) -> None:
        """Read the file and split off the validation images, once and whatever the stage.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or an array, ``mean``, ``std`` or ``val_size`` does not fit; the message
                names it.
        """
        if self.train_set is not None:
            return
        x_train, y_train, x_test, y_test = self._arrays
        mean, std = self._statistics(x_train) if self.preprocessing == "normalize" else (None, None)
        plain = ImageTransform(self.image_size, mean, std)
        augmenting = ImageTransform(self.image_size, mean, std, crop_padding=self.crop_padding, flip=self.flip)
        self._set_training(x_train, y_train, plain, augmenting, self.path.parent)
        if self._whitening is not None:
            x_test = self._whitening(x_test)
        self.test_set = TensorImages(x_test, y_test, plain)

    def _statistics(self, images: Tensor) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel: those given, else those of ``images``."""
        scale = 255.0 if images.dtype == torch.uint8 else 1.0
        # One channel at a time, because it is copied to float32; none if both are given.
        unknown = range(self.in_chans) if self.mean is None or self.std is None else ()
        channels = [torch.std_mean(images[:, channel].float(), correction=0) for channel in unknown]
        mean = [float(m) / scale for _, m in channels] if self.mean is None else list(self.mean)
        std = [float(s) / scale for s, _ in channels] if self.std is None else list(self.std)
        for name, value in (("mean", mean), ("std", std)):
            if len(value) != self.in_chans:
                raise ValueError(f"`{name}` (={value}) must have one number for each of the {self.in_chans} channels")
        if not all(0 < s < float("inf") for s in std):
            computed = f"computed from `x_train` of {self.path}, whose images may be constant"
            source = computed if self.std is None else "given"
            raise ValueError(f"`std` (={std}), {source}, must be positive and finite in every channel")
        if not all(abs(m) < float("inf") for m in mean):
            raise ValueError(f"`mean` (={mean}) must be finite in every channel")
        return mean, std
