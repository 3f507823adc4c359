"""Whitening that is fitted once: the file that it is kept in, named after the images and the parameters."""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_whole
from .whitening import ZCAWhitening

__all__ = ["cached_whitening"]

#: Changes when the computation does, so that no older file is taken for its result.
_VERSION = "1"

#: Rows of the matrix that are checked at a time.
_ROWS = 1024


def cached_whitening(
    images: Tensor, indices: Tensor, folder: Path, *, bias: float = 0.1, contrast_scale: float | None = 55.0
) -> ZCAWhitening:
    """:meth:`ZCAWhitening.fit`, or its earlier result for the same images and parameters.

    The file ``whitening-HASH.safetensors`` in ``folder`` holds it; HASH is of the images fitted on and the parameters.
    A damaged file is written again, with a warning. There is a warning, too, if the folder cannot be written to.

    Args:
        images: (N, C, H, W), uint8 or float32.
        indices: (M,), which of them to fit on; their order does not matter.
        folder: where the file is; created if it does not exist.
        bias: of :meth:`ZCAWhitening.fit`.
        contrast_scale: of :meth:`ZCAWhitening.fit`.
    """
    indices = indices.sort().values
    key = _hash(images, indices, bias, contrast_scale)
    path = folder / f"whitening-{key[:16]}.safetensors"
    if path.is_file():
        try:
            return _read(path, key, tuple(images.shape[1:]), bias, contrast_scale)
        except (OSError, SafetensorError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}); the whitening is fitted again", stacklevel=2)
    rank_zero_info(f"Fitting ZCA whitening on {len(indices)} images; kept in {path}")
    whitening = ZCAWhitening.fit(images, indices, bias=bias, contrast_scale=contrast_scale)
    try:
        _write(path, key, whitening)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the whitening could not be saved in {folder} ({error}) and will be fitted again next time; "
            "pass `whitening_cache`, a folder that can be written to",
            stacklevel=2,
        )
    return whitening


def _hash(images: Tensor, indices: Tensor, bias: float, contrast_scale: float | None) -> str:
    parameters = (_VERSION, str(images.dtype), tuple(images.shape[1:]), len(indices), float(bias), contrast_scale)
    digest = hashlib.sha256(repr(parameters).encode())
    for part in indices.split(2048):
        digest.update(images[part].numpy().tobytes())
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _read(path: Path, key: str, shape: tuple[int, ...], bias: float, contrast_scale: float | None) -> ZCAWhitening:
    """The file's whitening; ValueError if it is not one that :meth:`ZCAWhitening.fit` could give."""
    features = math.prod(shape)
    expected = {"mean": shape, "matrix": (features, features)}
    with safe_open(path, framework="pt") as file:  # plain arrays: reading them runs no code
        metadata = file.metadata() or {}
        if metadata.get("key") != key:
            raise ValueError("it belongs to other images or parameters")
        for name, size in expected.items():  # before memory is taken for what the file says that it holds
            entry = file.get_slice(name)
            if (tuple(entry.get_shape()), entry.get_dtype()) != (size, "F32"):
                raise ValueError(f"`{name}` is {entry.get_dtype()} {tuple(entry.get_shape())}, not F32 {size}")
        tensors = {name: file.get_tensor(name) for name in expected}
    if metadata.get("checksum") != _checksum(tensors):
        raise ValueError("its numbers are not those that were saved")
    _check(tensors["mean"].flatten(), tensors["matrix"], bias)
    return ZCAWhitening(tensors["mean"], tensors["matrix"], bias, contrast_scale)


def _check(mean: Tensor, matrix: Tensor, bias: float) -> None:
    """The checksum says that these were saved; this, that they can be used."""
    if not mean.isfinite().all():
        raise ValueError("`mean` is not finite")
    # Of eigenvalues (l + bias)^-1/2 with l >= 0, a diagonal is above 0 and no number above the largest; with room for
    # float32. Some rows at a time: the whole matrix may have 600 MB. NaN fails the comparison.
    largest = 1.001 * bias**-0.5
    if not (matrix.diagonal() > 0).all():
        raise ValueError("`matrix` is not positive definite")
    for rows, columns in zip(matrix.split(_ROWS), matrix.split(_ROWS, 1), strict=True):
        if not rows.abs().max() <= largest:
            raise ValueError(f"`matrix` has numbers above {largest:.3g} in absolute value, or NaN")
        if not (rows - columns.T).abs().max() <= 1e-5 * largest:
            raise ValueError("`matrix` is not symmetric")


def _write(path: Path, key: str, whitening: ZCAWhitening) -> None:
    """All of the file or nothing: others may read it at the same time, and a run may be killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"mean": whitening.mean.contiguous(), "matrix": whitening.matrix.contiguous()}
    metadata = {"key": key, "checksum": _checksum(tensors)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))
