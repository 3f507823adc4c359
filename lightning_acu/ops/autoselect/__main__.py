"""The process that measures for another one (``worker.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .calls import Call
from .selector import measure_in_process
from .verdicts import Verdict
from .worker import serve

__all__ = ["measure_here"]


def measure_here(call: Call, device: torch.device, rule: str, positions: Sequence[Any] | None) -> Verdict:
    """Measure in this process, with torch's settings of the one that asks."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if call.dtype == "float32":
            torch.backends.cudnn.allow_tf32 = call.tf32
        torch.backends.cudnn.benchmark = call.benchmark
    return measure_in_process(call, device, rule, positions)


if __name__ == "__main__":
    serve(measure_here)
