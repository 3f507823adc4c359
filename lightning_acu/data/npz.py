"""Reading and checking an .npz archive of images and labels."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ImageArrays", "read_npz"]

_KEYS = ("x_train", "y_train", "x_test", "y_test")

#: Numbers of channels that an image may have: grey or RGB.
_CHANNELS = (1, 3)


class ImageArrays(NamedTuple):
    """Images (N, C, H, W), uint8 or float32, and labels (N,), int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def read_npz(path: Path) -> ImageArrays:
    """The four arrays of the archive, checked, with channels first.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not an .npz archive, an array is missing, or one does not fit; the message names it.
    """
    arrays = _load(path)
    for key, array in arrays.items():
        if array.ndim == 0 or array.size == 0:
            raise ValueError(
                f"`{key}` (shape {array.shape}) must hold at least one {'image' if 'x' in key else 'label'}"
            )
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        _check_labels(f"y_{part}", y)
        if len(x) != len(y):
            raise ValueError(f"`x_{part}` has {len(x)} images but `y_{part}` has {len(y)} labels: they must match")
    x_train, x_test = arrays["x_train"], arrays["x_test"]
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise ValueError(
            "`x_train` and `x_test` must have the same image shape and dtype, "
            f"but have {x_train.shape[1:]} {x_train.dtype} and {x_test.shape[1:]} {x_test.dtype}"
        )
    _check_classes(arrays["y_train"], arrays["y_test"])
    y_train, y_test = (torch.from_numpy(arrays[key].astype(np.int64)) for key in ("y_train", "y_test"))
    return ImageArrays(_channels_first("x_train", x_train), y_train, _channels_first("x_test", x_test), y_test)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"`path` (={str(path)!r}) does not exist or is not a file; give an .npz archive of {', '.join(_KEYS)}"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"`path` (={str(path)!r}) is not an .npz archive, or is cut short; write one with numpy.savez")
    # Pickled arrays could run any code, and images and labels do not need them.
    with np.load(path, allow_pickle=False) as archive:
        missing = [key for key in _KEYS if key not in archive]
        if missing:
            raise ValueError(
                f"`path` (={str(path)!r}) lacks {', '.join(missing)}; it has {', '.join(archive.files) or 'no arrays'}"
            )
        try:
            return {key: _numbers(archive, key) for key in _KEYS}
        # Checksums and compressed data that are wrong; NumPy's headers are behind the checksums.
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"`path` (={str(path)!r}) is damaged ({error}); download or write it again") from error


def _numbers(archive: Any, key: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = archive[key]
    except ValueError as error:  # NumPy's refusal of pickled objects; it has no class of its own
        raise ValueError(
            f"`{key}` cannot be read ({error}): store numbers, converted with .astype('int64') or .astype('uint8')"
        ) from error
    return array


def _check_labels(name: str, y: NDArray[Any]) -> None:
    if y.ndim != 1:
        raise ValueError(f"`{name}` (shape {y.shape}) must have one label per image: shape (N,)")
    if y.dtype.kind not in "iu":
        raise ValueError(f"`{name}` (dtype {y.dtype}) must hold integers; convert it with .astype('int64')")
    if y.min() < 0:
        raise ValueError(f"`{name}` has the label {y.min()}; labels must start from 0")


def _check_classes(y_train: NDArray[Any], y_test: NDArray[Any]) -> None:
    present = np.unique(y_train)
    classes = int(present[-1]) + 1
    if len(present) != classes:
        absent = sorted(set(range(classes)) - set(present.tolist()))[:5]
        raise ValueError(
            f"`y_train` has labels up to {classes - 1} but none of {absent}; number the classes from 0 without gaps"
        )
    if y_test.max() >= classes:
        raise ValueError(f"`y_test` has the label {y_test.max()}, but `y_train` has only 0 ... {classes - 1}")


def _channels_first(name: str, x: NDArray[Any]) -> Tensor:
    """``x`` as (N, C, H, W), uint8 or float32."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise ValueError(f"`{name}` (dtype {x.dtype}) must be uint8, for 0 ... 255, or floating point")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim != 4:
        raise ValueError(f"`{name}` (shape {x.shape}) must be (N, H, W), (N, H, W, C) or (N, C, H, W)")
    else:
        first, last = x.shape[1] in _CHANNELS, x.shape[3] in _CHANNELS
        if first and last:
            raise ValueError(
                f"`{name}` (shape {x.shape}) is ambiguous: both axis 1 and axis 3 could be the channels; "
                "pad the images, or store grey ones as (N, H, W)"
            )
        if not first and not last:
            raise ValueError(
                f"`{name}` (shape {x.shape}) has no channel axis: axis 1 or axis 3 must have 1 or 3 entries"
            )
        if last:
            x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32))
