"""The variants of the paper, by name: which convolutions stay plain.

======  ================================================================================================
"all"   all are converted (the paper's "ACU-all")
"C23"   all but those of the first stage are converted: conv1/x of the paper's network stays plain ("ACU-C23")
======  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from ..choices import one_of
from .arithmetic import default_input_size, output_sizes

__all__ = ["PRESETS", "check_preset"]


def _none(model: nn.Module, convs: Collection[nn.Module]) -> set[nn.Module]:
    return set()


def _first_stage(model: nn.Module, convs: Collection[nn.Module]) -> set[nn.Module]:
    """Those of ``convs`` whose output has the highest resolution, seen in one forward pass.

    A stem of another kernel size (7x7, or the 1x1 of the paper's network) does not count as a stage.
    """
    try:
        sizes = output_sizes(model, default_input_size(model))
    except ValueError as error:
        raise ValueError(
            f"`preset`='C23' runs one forward pass to find resolutions: {error}; or use `preset`='all' and name the "
            "first stage in `exclude_modules`"
        ) from error
    areas = {conv: max(height * width for height, width in sizes[conv]) for conv in convs if sizes.get(conv)}
    return {conv for conv, area in areas.items() if area == max(areas.values())}


#: Functions from the model and its convolutions of 3x3, 5x5 and ``kernel_sizes`` to those of them that stay plain.
PRESETS: dict[str, Callable[[nn.Module, Collection[nn.Module]], set[nn.Module]]] = {
    "all": _none,
    "C23": _first_stage,
}


def check_preset(preset: str) -> None:
    """Raise a ValueError for an unknown name."""
    one_of("preset", preset, PRESETS)
