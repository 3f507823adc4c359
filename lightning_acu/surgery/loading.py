"""Needed to unpickle whole models that version 0.1 saved (``torch.save(model)``); ACUConv2d loads by itself now."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = []  # type: ignore[var-annotated]


def _load(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for ``model.load_state_dict`` in such a model; removes itself at the first call."""
    vars(model).pop("load_state_dict", None)
    return model.load_state_dict(*args, **kwargs)
