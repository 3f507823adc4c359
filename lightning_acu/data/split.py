"""Seeded, stratified splits: one order of the images, each slice of which holds the classes in proportion."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import whole_number

__all__ = ["resolve_size", "stratified_order"]


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A random permutation that spreads each class evenly, so that consecutive slices of it are stratified splits.

    The r-th of the n images of a class (in random order) is placed at the share (r + 1/2) / n. A slice from the start
    is then what the Sainte-Lague method of proportional seats allots to the classes; a class of one image stays in the
    middle, and thus in the larger part.

    Args:
        labels: (N,), integers >= 0.
        seed: the permutation depends on this and the labels alone, not on torch's global generator.

    Returns:
        (N,) int64, a permutation of 0 ... N - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator, dtype=torch.int64, device="cpu")
    share = torch.empty(len(labels), dtype=torch.float64, device="cpu")
    for label in torch.unique(labels):
        members = labels[shuffled] == label
        count = int(members.sum())
        share[members] = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    # Stable, so that images with equal shares (of different classes) keep their random order.
    return shuffled[share.argsort(stable=True)]


def resolve_size(name: str, size: int | float, total: int, of: str = "training images") -> int:
    """The number of images that ``size`` asks for.

    Args:
        name: of the argument, for messages.
        size: an int counts images; a float is a share in [0, 1) of ``total``, at least one image unless it is 0.
        total: the number of images there are.
        of: what these are, for messages.

    Raises:
        TypeError: ``size`` is not a number.
        ValueError: ``size`` is negative, or would leave no image.
    """
    if isinstance(size, float):
        if not 0 <= size < 1:
            raise ValueError(f"`{name}` (={size}) must be a whole number of images, or a share of them in [0, 1)")
        count = max(1, round(size * total)) if size else 0
    else:
        count = whole_number(name, size)
    if count >= total:
        raise ValueError(f"`{name}` (={size}) must be smaller than the {total} {of}")
    return count
