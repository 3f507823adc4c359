"""ImageNet, Places365 or your own images: a folder for each class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms import InterpolationMode

from ..checks import few, require_package
from ..choices import did_you_mean, one_of
from .class_folders import ClassFoldersDataModule
from .image_files import ImageFiles
from .split import resolve_size, stratified_order

__all__ = ["ImageFolderDataModule"]


class ImageFolderDataModule(ClassFoldersDataModule):
    """Images in folders, one for each class: ``root/train/CLASS/*.jpg`` and ``root/val/CLASS/*.jpg``.

    With ``val_size`` they are in ``root/CLASS/*.jpg`` and split here, by ``seed``, with each class in proportion.

    Training images are cropped, resized and mirrored at random; others are resized and cropped at the centre. Settings
    left None are those that the authors of ``transforms_of`` published; without that, those of ImageNet.

    Args:
        root: folder of the data.
        train: folder of the training images, in ``root``.
        val: folder of the validation images, in ``root``.
        test: folder of the test images, in ``root``. None: ``val``, as the labels of ImageNet's test images are secret.
        val_size: images for validation, of those in ``root/CLASS``; a float is a share of them. None: in ``val``.
        test_size: images for testing, given in the same way. None: those for validation.
        image_size: pixels, or (height, width). None: of ``transforms_of``, or 224.
        mean: per channel, of images in [0, 1]. None: of ``transforms_of``, or of ImageNet.
        std: per channel, of images in [0, 1]. None: of ``transforms_of``, or of ImageNet.
        interpolation: "nearest", "bilinear", "bicubic", ... None: of ``transforms_of``, or "bicubic".
        crop_pct: the share of a side that the crop at the centre keeps. None: of ``transforms_of``, or 0.875.
        transforms_of: a timm model whose published settings fill those left None. It is neither built nor downloaded.
        auto_augment: a policy of timm, like "rand-m9-mstd0.5-inc1". None: none.
        hflip: probability of mirroring a training image.
        scale: smallest and largest share of the area of a training image that its crop keeps.
        color_jitter: strength of random changes of brightness, contrast and saturation; timm leaves them out with
            most policies of ``auto_augment``. None: none.
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`; the seed has
            no effect without ``val_size``: the folders are the split.

    Raises:
        ModuleNotFoundError: timm, whose transforms these are, is not installed.
        ValueError: ``test_size`` is given without ``val_size``, ``transforms_of`` is not a timm model, or ``mean``,
            ``std``, ``interpolation`` or ``crop_pct`` does not fit.
    """

    def __init__(
        self,
        root: str | Path,
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        transforms_of: str | None = None,
        auto_augment: str | None = None,
        hflip: float = 0.5,
        scale: tuple[float, float] = (0.08, 1.0),
        color_jitter: float | None = None,
        **loader: Any,
    ) -> None:
        require_package("timm", type(self).__name__)
        from timm.data import resolve_data_config  # type: ignore[attr-defined]

        for name, value in (("mean", mean), ("std", std)):
            if value is not None and (len(value) != 3 or not all(map(math.isfinite, value))):
                raise ValueError(f"`{name}` (={value}) must have one finite number for each of the 3 channels")
        modes = [mode.value for mode in InterpolationMode]
        one_of("interpolation", interpolation, modes, or_none=True)
        if test_size is not None and val_size is None:
            raise ValueError(
                f"`test_size` (={test_size}) splits what `val_size` splits; give both, or the folder `test`"
            )
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise ValueError(f"`crop_pct` (={crop_pct}) must be a share of a side: above 0 and at most 1")
        folders = {"train": train, "val": val} | ({} if test is None else {"test": test})
        if val_size is not None:
            folders = {"root": "."}
        super().__init__(root=root, folders=folders, **loader)
        self.val_size = val_size
        self.test_size = test_size
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"`image_size` (={image_size}) must be a number of pixels >= 1, or (height, width)")
        #: Arguments of timm's ``create_transform`` that training and evaluation share.
        self.preprocessing: dict[str, Any] = resolve_data_config(  # type: ignore[no-untyped-call]
            {
                "input_size": size and (self.in_chans, *size),
                "mean": mean,
                "std": std,
                "interpolation": interpolation,
                "crop_pct": crop_pct,
            },
            pretrained_cfg=_published(transforms_of) if transforms_of is not None else None,
        )
        #: Arguments of it that only training has.
        self.augmentation: dict[str, Any] = {
            "auto_augment": auto_augment,
            "hflip": hflip,
            "scale": scale,
            "color_jitter": color_jitter,
        }

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) that images are cropped to, in pixels."""
        height, width = self.preprocessing["input_size"][1:]
        return height, width

    def setup(self, stage: str | None = None) -> None:
        """As :class:`ClassFoldersDataModule`, or a seeded split of ``root/CLASS``, the same in every stage.

        Raises:
            ValueError: ``val_size`` and ``test_size`` leave no image for training.
        """
        if self.val_size is None:
            super().setup(stage)
            return
        if self.train_set is not None:
            return
        plain = ImageFiles(self._folder("root"), self._transform(training=False))
        augmented = ImageFiles(self._folder("root"), self._transform(training=True))
        labels = torch.tensor(plain.targets, dtype=torch.int64, device="cpu")
        tests = 0 if self.test_size is None else resolve_size("test_size", self.test_size, len(labels), of="images")
        vals = resolve_size("val_size", self.val_size, len(labels) - tests)
        parts = stratified_order(labels, self.seed).tensor_split([tests, tests + vals])
        test, val, train = (part.tolist() for part in parts)
        self.train_set, self.val_set = Subset(augmented, train), Subset(plain, val)
        self.test_set = self.val_set if self.test_size is None else Subset(plain, test)

    @property
    def file_transform(self) -> dict[str, Any]:
        """That of evaluation."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.preprocessing.items()}

    def _transform(self, training: bool) -> Callable[[Image], Tensor]:
        """From an image of any size to (3, height, width)."""
        from timm.data import create_transform  # type: ignore[attr-defined]

        augmentation = self.augmentation if training else {}
        transform: Callable[[Image], Tensor] = create_transform(
            **self.preprocessing, **augmentation, is_training=training
        )
        return transform

    def _advice_on(self, folder: Path) -> str:
        near = super()._advice_on(folder)
        if near or self.val_size is not None or not self.root.is_dir():
            return near
        flat = [entry.name for entry in self.root.iterdir() if entry.is_dir()]
        if not flat or {"train", "val"} & set(flat):
            return ""
        return f"; if {few(sorted(flat))} are the classes, `val_size`=0.2 splits them"


def _published(model: str) -> dict[str, Any]:
    """How the authors of ``model`` prepared their images, as timm records it."""
    import timm

    config = None
    with suppress(RuntimeError):  # which timm raises for a wrong tag, while a wrong name gives None
        config = timm.get_pretrained_cfg(model)
    if config is None:
        hint = did_you_mean(model, timm.list_models()) or "; timm.list_models(pretrained=True) lists them"
        raise ValueError(f"`transforms_of` (={model!r}) is not a timm model with published weights{hint}")
    return asdict(config)
