"""Correctness, then speed: the measurement of one call, in the process that runs this."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .calls import Call, synthetic
from .verdicts import Verdict

if TYPE_CHECKING:
    from ..backends import Backend

__all__ = ["Clock", "gpu_clock", "measure", "wall_clock"]

#: Seconds that a function takes, for a number of calls in a row.
Clock = Callable[[Callable[[], Any], int], float]

#: Another backend has to be so much faster than the rule's: less is noise, and not worth other roundings.
_GAIN = 0.05

#: Relative error (norm over norm) up to which results count as right: roundings are below a tenth of it.
_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.02}
_TOLERANCE_TF32 = 0.02

_WARM_UPS, _SAMPLES = 2, 5

#: A sample has as many calls as fit into this time, so that launches and clock ticks do not count.
_SAMPLE_SECONDS, _MOST_CALLS = 2e-3, 50


def wall_clock(run: Callable[[], Any], calls: int) -> float:
    """By the wall clock, on CPUs."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def gpu_clock(run: Callable[[], Any], calls: int) -> float:
    """By events on the current stream of the GPU; what a backend waits for the host counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def measure(
    call: Call,
    device: torch.device,
    candidates: Mapping[str, Backend],
    rule: str,
    clock: Clock,
    positions: Sequence[Any] | None = None,
) -> Verdict:
    """Which of ``candidates`` is right and fastest for ``call``.

    Args:
        call: what is measured.
        device: where.
        candidates: "dense", which the others are compared with, and those.
        rule: the one that runs without a measurement; another has to be 5 % faster.
        clock: how long calls take.
        positions: the offsets of the user's call; results have to be right at these too, times do not depend on them.
    """
    outcome, detail = "measured", ""
    right: list[str] = []
    try:
        with torch.no_grad():
            inputs = synthetic(call, device)
            cases = [inputs] if positions is None else [inputs, synthetic(call, device, positions)]
            expected = [_run(candidates["dense"], call, case) for case in cases]
            for name, backend in candidates.items():
                try:
                    wrong = "" if name == "dense" else _difference(backend, call, cases, expected)
                except Exception as error:
                    if _is_memory(error):
                        raise
                    outcome, detail = "failed", f"{name}: {type(error).__name__}: {str(error)[:200]}"
                    continue
                if wrong:
                    outcome, detail = "wrong", f"{name}: {wrong}"
                else:
                    right.append(name)
            del cases, expected
            seconds = _times({name: candidates[name] for name in right}, call, inputs, clock)
    except Exception as error:
        if not _is_memory(error):
            raise
        gc.collect()
        return Verdict(None, "out of memory")
    baseline = rule if rule in right else "dense"
    best = min(seconds, key=seconds.__getitem__)
    chosen = best if seconds[best] <= (1 - _GAIN) * seconds[baseline] else baseline
    return Verdict(chosen, outcome, seconds, detail)


def _run(backend: Backend, call: Call, tensors: tuple[Tensor | None, Tensor, Tensor, Tensor]) -> list[Tensor]:
    grad, input, weight, offsets = tensors
    if call.needs is None:
        return [backend.forward(input, weight, offsets, None, call.geometry)]
    assert grad is not None
    grads = backend.backward(grad, input, weight, offsets, call.geometry, call.needs)
    return [result for result, need in zip(grads, call.needs, strict=True) if need and result is not None]


def _difference(
    backend: Backend,
    call: Call,
    cases: list[tuple[Tensor | None, Tensor, Tensor, Tensor]],
    expected: list[list[Tensor]],
) -> str:
    """How the results differ from the expected ones, or "". Where those are not finite, nothing is compared."""
    tolerance = _TOLERANCE_TF32 if call.tf32 else _TOLERANCE.get(call.dtype, 0.02)
    for case, right in zip(cases, expected, strict=True):
        results = _run(backend, call, case)
        if len(results) != len(right):
            return f"{len(results)} results instead of {len(right)}"
        for result, other in zip(results, right, strict=True):
            reference = other.double()
            if not reference.isfinite().all():
                continue
            off = float((result.double() - reference).norm())
            if not off <= tolerance * float(reference.norm()):
                return f"off by {off / max(float(reference.norm()), 1e-30):.1e} of the norm"
    return ""


def _times(
    backends: Mapping[str, Backend], call: Call, inputs: tuple[Tensor | None, Tensor, Tensor, Tensor], clock: Clock
) -> dict[str, float]:
    """The median time of a call of each, sampled in turns."""
    runs = {name: lambda backend=backend: _run(backend, call, inputs) for name, backend in backends.items()}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        once = [clock(run, 1) for _ in range(_WARM_UPS)][-1]
        calls[name] = min(max(round(_SAMPLE_SECONDS / max(once, 1e-9)), 1), _MOST_CALLS)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_SAMPLES):
        for name, run in runs.items():
            samples[name].append(clock(run, calls[name]) / calls[name])
    return {name: statistics.median(found) for name, found in samples.items()}


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out. torch's allocator of the CPU raises a RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
