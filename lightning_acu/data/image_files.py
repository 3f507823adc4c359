"""Listing the image files below a folder, and reading one: what is damaged is an error that names it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, has_file_allowed_extension

__all__ = ["ImageFiles", "class_names", "images_below", "read_image"]


class ImageFiles(ImageFolder):
    """torchvision's ``ImageFolder``: the same images and labels in the same order, without its ways never to end.

    Links to folders and files are followed, but to each folder only once in a class.

    Args:
        root: holds a folder for each class.
        transform: of an image.

    Raises:
        FileNotFoundError: a class has no images.
        OSError: a folder cannot be read.
        ValueError: a folder is its own parent, or is twice in a class, by a link; a link is broken; or something with
            the name of an image is not a file.
    """

    def __init__(self, root: Path, transform: Any) -> None:
        super().__init__(str(root), transform, loader=read_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Names of the classes, and their labels."""
        names = class_names(directory)
        return names, {name: label for label, name in enumerate(names)}

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: Any = None,
        is_valid_file: Any = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """(path, label) of each image; the arguments are torchvision's, which has the same for all uses here."""
        samples: list[tuple[str, int]] = []
        for name, label in sorted(class_to_idx.items()):
            images = images_below(os.path.join(directory, name))
            if not images:
                raise FileNotFoundError(
                    f"the class folder {os.path.join(directory, name)} has no images; supported are files that end in "
                    f"{', '.join(IMG_EXTENSIONS)}"
                )
            samples += [(image, label) for image in images]
        return samples


def class_names(root: str | Path) -> list[str]:
    """Names of the folders in ``root``, sorted.

    Raises:
        OSError: ``root`` does not exist or cannot be read.
        ValueError: a link in ``root`` is broken.
    """
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry))


def images_below(root: str) -> list[str]:
    """The image files in ``root`` and in the folders below, folder by folder, sorted."""
    # By identity, as a link has another name. With all parents, so that a link to one is not followed first.
    seen = {_identity(parent): str(parent) for parent in (*Path(root).parents, *Path(root).resolve().parents)}
    seen[_identity(root)] = root
    folders = [root]
    by_folder: dict[str, list[str]] = {}
    while folders:
        folder = folders.pop()
        names = by_folder[folder] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    same = seen.setdefault(_identity(entry.path), entry.path)
                    if same != entry.path:
                        raise ValueError(
                            f"{entry.path} is the same folder as {same}, by a link: images would be listed twice, or "
                            "without end; remove the link"
                        )
                    folders.append(entry.path)
                elif has_file_allowed_extension(entry.name, IMG_EXTENSIONS):
                    if not entry.is_file():
                        raise ValueError(f"{entry.path} is not a file but a pipe, socket or device; remove it")
                    names.append(entry.name)
    return [os.path.join(folder, name) for folder, names in sorted(by_folder.items()) for name in sorted(names)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{entry.path} is a link to {os.readlink(entry.path)}, which does not exist; remove it"
        ) from error


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def read_image(path: str | Path) -> Image:
    """The image, as RGB.

    Raises:
        OSError: the file does not exist, cannot be read or is not an image; the message names it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
        raise OSError(f"{path} is not a file; remove it")
    try:
        image: Image = default_loader(path)
        return image
    except Exception as error:  # Pillow's decoders raise what they like for a damaged file, SyntaxError for a PNG
        raise OSError(f"{path} cannot be read as an image ({error}); replace or remove it") from error
