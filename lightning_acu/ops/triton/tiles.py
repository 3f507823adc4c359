"""What measurements decide for the Triton backend: tiles, when a layer takes the GEMM route, how it interpolates.

A table for each kind of GPU overrides the rules below: the one shipped as ``triton_tiles.json``, and before it the
user's own, which ``python -m lightning_acu.ops.triton.tune`` measures and keeps in :func:`tuned_tiles`.
"""

from __future__ import annotations

import functools
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "Tile",
    "arch_of",
    "gemm_from",
    "interpolates_in_half",
    "precision",
    "rounded",
    "set_interpolation",
    "shape_class",
    "table",
    "tile_for",
    "tuned_tiles",
]

#: Products of so many input channels are interpolated first and multiplied by torch: ops/README.md.
_GEMM_FROM = 512

_interpolation = "float32"


class Tile(NamedTuple):
    """What one program of a kernel works on: pixels, channels of the target, and channels a step of a product (or 0).

    "weight" has output channels, input channels, and pixels a step.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int = 1

    def launch(self) -> dict[str, int]:
        """As arguments of a launch."""
        depth = {"BLOCK_K": self.k} if self.k else {}
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, **depth, "num_warps": self.warps, "num_stages": self.stages}


@functools.lru_cache(maxsize=1024)
def tile_for(role: str, dtype: torch.dtype, depth: int, columns: int, device: torch.device) -> Tile:
    """The tile of a kernel.

    Args:
        role: "product" (forward, and the input's gradient at stride 1), "cells" (that with a stride), "weight" or
            "channelwise".
        dtype: of the images.
        depth: channels that a product sums over; for "weight" the input's.
        columns: channels that it makes; for "weight" the output's.
        device: where it runs.
    """
    tuned = table(arch_of(device)).get("tiles", {}).get(shape_class(role, dtype, depth, columns))
    return Tile(*tuned) if tuned else _rule(role, dtype, depth, columns)


def shape_class(role: str, dtype: torch.dtype, depth: int, columns: int) -> str:
    """The entry of the table: layers whose channels round up to the same powers of 2, 16 to 512, share one."""
    shape = "x".join(str(min(rounded(n), 512)) for n in (depth, columns))
    return f"{role} {str(dtype).removeprefix('torch.')} {shape}"


def _rule(role: str, dtype: torch.dtype, depth: int, columns: int) -> Tile:
    """The largest tiles that compile without spills (``scripts/compile_kernels.py``)."""
    if role == "channelwise":
        return Tile(32, 64, 0, 4)
    n, k = (64, 32) if dtype == torch.float32 else (128, 64)
    depth, columns = rounded(depth), rounded(columns)
    if role == "weight":
        return Tile(min(columns, 64), min(depth, 64), k, 4)
    return Tile(64, min(columns, n), min(depth, k), 4)


def gemm_from(dtype: torch.dtype, device: torch.device) -> int:
    """From how many channels on a product is interpolated first and left to torch's GEMM."""
    if dtype == torch.float32:  # torch's GEMMs and convolutions may disagree about TF32
        return 2**31
    known = table(arch_of(device)).get("gemm_from", {})
    return int(known.get(str(dtype).removeprefix("torch."), _GEMM_FROM))


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
def table(arch: str | None) -> dict[str, Any]:
    """{"tiles": {shape class: tile}, "gemm_from": channels}, read once: the user's, or the shipped one.

    Raises:
        RuntimeError: the user's file is damaged.
    """
    if arch is None:
        return {}
    shipped = json.loads((resources.files(__package__) / "triton_tiles.json").read_text())
    try:
        path = tuned_tiles()
        text = path.read_text() if path.is_file() else "{}"
    except (OSError, RuntimeError):  # a user without a home, or a home that may not be read: no table
        return shipped.get(arch, {})  # type: ignore[no-any-return]
    try:
        own = json.loads(text)
        found: dict[str, Any] = own.get(arch) or shipped.get(arch, {})
        for tile in found.get("tiles", {}).values():
            Tile(*map(int, tile))
    except (AttributeError, TypeError, ValueError) as error:
        raise RuntimeError(f"{path} is damaged ({error}); delete it, or tune again") from error
    return found


def rounded(channels: int) -> int:
    """Channels as tiles cover them: the next power of 2, at least the 16 of a tensor core."""
    return max(1 << max(channels - 1, 0).bit_length(), 16)
