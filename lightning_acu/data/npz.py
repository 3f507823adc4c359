"""Reading and checking an .npz archive of images and labels."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ImageArrays", "read_npz"]

_KEYS = ("x_train", "y_train", "x_test", "y_test")

#: Numbers of channels that an image may have: grey or RGB.
_CHANNELS = (1, 3)

#: Deflate makes nothing smaller than by this factor, so that an archive which promises more is damaged.
_MAX_DEFLATION = 1040

#: Readers of a header by the version of its format; version 3 is for arrays with named fields only.
_HEADERS: dict[tuple[int, int], Callable[[IO[bytes]], Any]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}

#: Images that are searched for NaN at a time.
_CHUNK = 2048


class ImageArrays(NamedTuple):
    """Images (N, C, H, W), uint8 or float32 and finite, and labels (N,), int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def read_npz(path: Path) -> ImageArrays:
    """The four arrays of the archive, checked, with channels first.

    Nothing in the file is trusted: no pickled object is read, and no memory is taken for numbers that it does not hold.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not an .npz archive, is damaged or too large for the memory, or an array is missing or does
            not fit; the message names the file and the array.
    """
    arrays = _load(path)
    try:
        return _checked(arrays)
    except ValueError as error:
        raise ValueError(f"{error} (`path`={str(path)!r})") from error


def _checked(arrays: dict[str, NDArray[Any]]) -> ImageArrays:
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
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [key for key in _KEYS if key not in members]
            if missing:
                raise _UnfitError(f"lacks {', '.join(missing)}; it has {', '.join(members) or 'no arrays'}")
            return {key: _read(archive, members[key], key) for key in _KEYS}
    except _UnfitError as error:
        raise ValueError(f"`path` (={str(path)!r}) {error}") from error
    # Of the zip module, for directories of archives whose numbers make no sense.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, ValueError) as error:
        raise ValueError(f"`path` (={str(path)!r}) is damaged ({error}); download or write it again") from error


class _UnfitError(Exception):
    """What is wrong with an archive, as the end of a sentence about it."""


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str) -> NDArray[Any]:
    if info.flag_bits & 1:
        raise _UnfitError(f"is encrypted (`{key}`); write it again with numpy.savez")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _UnfitError(
            f"holds `{key}` compressed in a way that NumPy does not write; write it with savez_compressed"
        )
    try:
        with archive.open(info) as member:
            _check_header(member, info, key)
        with archive.open(info) as member:
            # Pickled arrays could run any code, and images and labels do not need them.
            array: NDArray[Any] = npy.read_array(member, allow_pickle=False)
    except MemoryError as error:
        size = f"{info.file_size / 2**30:.1f} GiB"
        raise _UnfitError(f"is too large: `{key}` takes {size}, more than there is memory for") from error
    # Checksums and compressed data that are wrong, and headers, of which NumPy says no more than that.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        raise _UnfitError(f"is damaged (`{key}`: {error}); download or write it again") from error
    return array


def _check_header(member: IO[bytes], info: zipfile.ZipInfo, key: str) -> None:
    """The array must be as large as the file says that it is; before memory for the array is taken."""
    version = npy.read_magic(member)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format")
    try:
        shape, _, dtype = _HEADERS[version](member)
    except Exception as error:  # NumPy evaluates the header as Python text, which raises whatever the text asks for
        raise ValueError(f"its header cannot be read: {error}") from error
    if dtype.hasobject:
        raise _UnfitError(
            f"cannot be read: `{key}` holds Python objects; "
            "store numbers, converted with .astype('int64') or .astype('uint8')"
        )
    size = member.tell() + math.prod(shape) * dtype.itemsize
    most = info.compress_size * (_MAX_DEFLATION if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if min(shape, default=0) < 0 or size != info.file_size or size > most:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} would not take {info.file_size} bytes")


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
        # Not among all up to the largest, which may be any number.
        absent = np.setdiff1d(np.arange(min(classes, len(present) + 5)), present)[:5].tolist()
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
    with np.errstate(over="ignore"):  # to infinity, which is refused below
        images = torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8 if x.dtype == np.uint8 else np.float32))
    # Some at a time, as this takes memory for each number.
    for start in range(0, len(images), _CHUNK) if images.is_floating_point() else ():
        finite = images[start : start + _CHUNK].isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"`{name}` must be finite, but image {start + int(finite.long().argmin())} holds NaN, infinity or "
                "numbers too large for float32"
            )
    return images
