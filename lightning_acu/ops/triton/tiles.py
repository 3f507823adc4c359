"""What measurements decide for the Triton backend: tiles, when a layer takes the GEMM route, how it interpolates.

A table for each kind of GPU overrides the rules below: the one shipped as ``triton_tiles.json``, and before it the
user's own, which ``lightning-acu tune`` measures and keeps in :func:`tuned_tiles`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "Tile",
    "arch_of",
    "dtype_name",
    "gemm_from",
    "interpolates_in_half",
    "precision",
    "read_tables",
    "rounded",
    "set_interpolation",
    "shape_class",
    "table",
    "tile_for",
    "tuned_tiles",
]

#: From so many channels on, 16-bit products are interpolated first and multiplied by torch (``gemm.py``).
_GEMM_FROM = 256

#: GPUs whose registers hold a product's 128 x 256 sums without spills.
_WIDE = frozenset({"sm_90", "gfx942"})

#: A table of every class of layers for one kind of GPU has 20 kB.
_MAX_BYTES = 2**20

_interpolation = "float32"


class Tile(NamedTuple):
    """The block of one program: ``m`` x ``n`` numbers of the result, ``k`` terms of the sum at a time.

    That is pixels x channels it writes, and channels it reads; for "weight" output channels x input channels, and
    pixels. ``k`` is 0 for "channelwise", which sums over no channels.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int = 1

    def launch(self) -> dict[str, int]:
        """As arguments of a launch."""
        block_k = {"BLOCK_K": self.k} if self.k else {}
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, **block_k, "num_warps": self.warps, "num_stages": self.stages}


@functools.lru_cache(maxsize=1024)
def tile_for(role: str, dtype: torch.dtype, c_read: int, c_write: int, device: torch.device) -> Tile:
    """The tile of a kernel: the table's, or where it has none, a rule's.

    Args:
        role: "product" (forward, and the input's gradient at stride 1), "cells" (that with a stride), "weight" or
            "channelwise".
        dtype: of the images.
        c_read: channels that an output of the kernel sums over; for "weight" the input's; for "channelwise" 1
            where all channels share their positions, otherwise ``c_write``.
        c_write: channels in a row that the kernel writes; for "weight" the output's.
        device: where it runs.

    Raises:
        RuntimeError: the user's table is damaged.
    """
    tuned = table(arch_of(device)).get("tiles", {}).get(shape_class(role, dtype, c_read, c_write))
    return Tile(*tuned) if tuned else _rule(role, dtype, c_read, c_write, arch_of(device))


def shape_class(role: str, dtype: torch.dtype, c_read: int, c_write: int) -> str:
    """The entry of the table: layers whose channels round up to the same powers of 2, 16 to 512, share one."""
    shape = "x".join(str(min(rounded(channels), 512)) for channels in (c_read, c_write))
    return f"{role} {dtype_name(dtype)} {shape}"


def dtype_name(dtype: torch.dtype) -> str:
    """As the table has it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _rule(role: str, dtype: torch.dtype, c_read: int, c_write: int, arch: str | None) -> Tile:
    """The tiles of the lowest estimated clocks that compile without spills (``scripts/compile_kernels.py``)."""
    if role == "channelwise":
        return Tile(64 if c_read == 1 else 32, 64, 0, 4)
    n, k = (64, 32) if dtype == torch.float32 else (128, 64)
    if arch is not None and arch.startswith("gfx11"):  # with 256 registers for a lane
        n = 64
    c_read, c_write = rounded(c_read), rounded(c_write)
    if role == "weight":
        stages = 2 if arch is not None and arch.startswith("gfx") else 3  # a third fills AMD's 64 kB of shared memory
        if dtype != torch.float32 and min(c_read, c_write) >= 128:
            return Tile(128, 128, 64, 8, stages)
        m, n = min(c_write, 64), min(c_read, 64)
        return Tile(m, n, k // 2, 4 if arch == "sm_90" or m * n < 64 * 64 else 8, stages)
    if role == "product" and dtype != torch.float32 and c_write >= 256 and c_read >= 64 and arch in _WIDE:
        return Tile(128, 256, 32, 8)
    return Tile(64, min(c_write, n), min(c_read, k), 4)


def gemm_from(dtype: torch.dtype, device: torch.device) -> int:
    """From how many channels on a product is interpolated first and left to torch's GEMM."""
    if dtype == torch.float32:  # torch's GEMMs and convolutions may disagree about TF32
        return 2**31
    tuned = table(arch_of(device)).get("gemm_from", {})
    return int(tuned.get(dtype_name(dtype), _GEMM_FROM))


def set_interpolation(precision: str) -> None:
    """How products of bfloat16 and float16 images interpolate, from the next call on, in this process.

    Args:
        precision: "float32" (the default): with one rounding at the end, relative error up to 2^-9 for bfloat16; or
            "half": in the image's own precision, about half the instructions and twice the error.

    Raises:
        ValueError: another precision.
    """
    global _interpolation
    if precision not in ("float32", "half"):
        raise ValueError(f"`precision` (={precision!r}) must be 'float32' or 'half'")
    _interpolation = precision


def interpolates_in_half(dtype: torch.dtype) -> bool:
    """Whether images of ``dtype`` are interpolated in their own precision."""
    return _interpolation == "half" and dtype != torch.float32


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """TF32 where torch's convolutions use it and the chip has it."""
    if dtype != torch.float32 or (torch.version.hip and arch_of(device) != "gfx942"):
        return "ieee"
    conv = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9; the older flag may raise beside it
    return "tf32" if (conv.fp32_precision == "tf32" if conv else torch.backends.cudnn.allow_tf32) else "ieee"


@functools.cache
def arch_of(device: torch.device) -> str | None:
    """The kind of GPU, "sm_90" or "gfx942"; None for the interpreter."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def tuned_tiles() -> Path:
    """The user's own table: ``triton_tiles.json`` in $LIGHTNING_ACU_CACHE, or in lightning_acu of the user's cache."""
    if own := os.environ.get("LIGHTNING_ACU_CACHE"):
        return Path(own) / "triton_tiles.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_acu" / "triton_tiles.json"


@functools.cache
def table(arch: str | None) -> Mapping[str, Any]:
    """{"tiles": {shape class: tile}, "gemm_from": {dtype: channels}}: the user's, or the shipped one.

    Read once, and shared by all callers: not to be changed.

    Raises:
        RuntimeError: the user's file is damaged.
    """
    if arch is None:
        return {}
    shipped: dict[str, Any] = json.loads((resources.files(__package__) / "triton_tiles.json").read_text())
    return _own_tables().get(arch) or shipped.get(arch, {})


def _own_tables() -> dict[str, Any]:
    try:
        path = tuned_tiles()
    except RuntimeError:  # a user without a home: no table
        return {}
    try:
        return read_tables(path)
    except OSError:  # a home that may not be read: no table
        return {}


def read_tables(path: Path) -> dict[str, Any]:
    """The tables in a file, by the kind of GPU, checked; none if the file does not exist.

    Raises:
        OSError: the file cannot be read.
        RuntimeError: it is damaged; the message names it.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        content = file.read(_MAX_BYTES + 1)
    try:
        if len(content) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        tables: dict[str, Any] = json.loads(content)
        for table in tables.values():
            for name, tile in table.get("tiles", {}).items():
                if not _is_tile(name, tile):
                    raise ValueError(f"{name!r} has {tile!r}, which is no tile")
            for dtype, channels in table.get("gemm_from", {}).items():
                if type(channels) is not int or channels < 0:
                    raise ValueError(f"gemm_from of {dtype!r} is {channels!r}, not a number of channels")
    # Of json, for what is not JSON or too deep; and of the lines above, for lists where there should be mappings.
    except (ValueError, RecursionError, AttributeError) as error:
        raise RuntimeError(f"{path} is damaged ({error}); delete it, or tune again") from error
    return tables


def _is_tile(name: str, tile: Any) -> bool:
    """Whether a kernel could be launched with it: powers of 2, and no block larger than Triton's limit."""
    if type(tile) is not list or not 4 <= len(tile) <= 5 or any(type(number) is not int for number in tile):
        return False
    m, n, k, warps, stages = Tile(*tile)
    if name.startswith("channelwise "):
        powers = k == 0 and all(_is_power(size, 1, 1024) for size in (m, n))
    else:  # of a matrix product, which Triton has from 16 on
        powers = all(_is_power(size, 16, 1024) for size in (m, n, k))
    return powers and _is_power(warps, 1, 32) and 1 <= stages <= 16


def _is_power(size: int, least: int, most: int) -> bool:
    return least <= size <= most and size & (size - 1) == 0


def rounded(channels: int) -> int:
    """Channels as tiles cover them: the next power of 2, at least the 16 of a tensor core."""
    return max(1 << max(channels - 1, 0).bit_length(), 16)
