"""Images in folders, one for each class: listing them and checking that the folders agree."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..choices import did_you_mean
from .base import ImageDataModule
from .image_files import ImageFiles, class_names

__all__ = ["ClassFoldersDataModule"]


class ClassFoldersDataModule(ImageDataModule):
    """What data modules over ``root/FOLDER/CLASS/*.jpg`` share. A subclass defines the transform of an image.

    Args:
        root: folder of the data.
        folders: the folder in ``root`` for "train", "val" and, unless it is that of "val", "test".
        **loader: ``batch_size``, ``num_workers``, ``pin_memory`` and ``seed`` of :class:`ImageDataModule`; the seed has
            no effect here: the folders are the split.
    """

    in_chans = 3

    def __init__(self, *, root: str | Path, folders: dict[str, str], **loader: Any) -> None:
        super().__init__(**loader)
        self.root = Path(root).expanduser()
        self.folders = folders

    @property
    def num_classes(self) -> int:
        """The number of class folders."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """As ``classes``."""
        return self.classes

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels: of the first of the three folders that exists."""
        present = (argument for argument, folder in self.folders.items() if (self.root / folder).is_dir())
        return class_names(self._folder(next(present, next(iter(self.folders)))))

    def setup(self, stage: str | None = None) -> None:
        """List the images that the stage needs, once. Only fitting needs the training images.

        Raises:
            FileNotFoundError: a folder is missing, has no class folders, or has one without images.
            OSError: a folder cannot be read.
            ValueError: the classes of two folders differ, a link leads from a folder to itself, or something with the
                name of an image is not a file.

        A damaged image is an OSError that names it, when it is read.
        """
        if stage in (None, "fit") and self.train_set is None:
            self.train_set = self._open("train", self._transform(training=True))
        if stage in (None, "fit", "validate") and self.val_set is None:
            self.val_set = self._open("val", self._transform(training=False))
        if stage in (None, "test", "predict") and self.test_set is None:
            self.test_set = self._open("test" if "test" in self.folders else "val", self._transform(training=False))

    @abstractmethod
    def _transform(self, training: bool) -> Callable[[Image], Tensor]:
        """From an image of any size to (3, height, width), at random where it is for training."""

    def _open(self, argument: str, transform: Callable[[Image], Tensor]) -> Dataset[Any]:
        dataset = ImageFiles(self._folder(argument), transform)
        ours, theirs = set(self.classes), set(dataset.classes)
        if ours != theirs:
            raise ValueError(
                f"`{argument}` (={self.folders[argument]!r}) must have the class folders of `train`: "
                f"it lacks {sorted(ours - theirs)[:5]} and adds {sorted(theirs - ours)[:5]}"
            )
        return dataset

    def _folder(self, argument: str) -> Path:
        folder = (self.root / self.folders[argument]).absolute()
        if not folder.is_dir() or not any(entry.is_dir() for entry in folder.iterdir()):
            what = "has no class folders" if folder.is_dir() else "does not exist"
            given = f"`{argument}` (={(str(self.root) if argument == 'root' else self.folders[argument])!r})"
            raise FileNotFoundError(f"{given}: {folder} {what}; expected {folder}/CLASS/*.jpg{self._advice_on(folder)}")
        return folder

    def _advice_on(self, folder: Path) -> str:
        """What may have been meant by a ``folder`` that is not there."""
        for parent in (self.root, folder):  # whichever is missing
            if not parent.exists() and parent.parent.is_dir():
                others = [entry.name for entry in parent.parent.iterdir() if entry.is_dir()]
                if near := did_you_mean(parent.name, others):
                    return near
        return ""
