"""The network that a row begins with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lightning_acu import apply_dilations, convert_to_acu
from lightning_acu.models import create_model

from .rows import Row

__all__ = ["network"]


def network(row: Row, seed: int, folder: Path, width: float) -> nn.Module:
    """The paper's plain network of ``width``, as ``row`` wants it, with the weights of ``seed``.

    ``folder`` has the runs, for a row whose dilations another one found.
    """
    torch.manual_seed(seed)
    model = create_model("acu_plain", width=width * row.wider, kernel_size3=row.kernel_size3, num_classes=10)
    dilations = dict(row.dilations)
    if row.found_by is not None:
        found = json.loads((folder / row.found_by / f"seed{seed}" / "result.json").read_text())
        dilations = {name: (dy, dx) for name, (dy, dx) in found["dilations"].items()}
    apply_dilations(model, dilations)
    if row.groups:
        convert_to_acu(model, kernel_sizes=[3, 5], position_groups=row.groups)
    return model
