"""The choice of each call: stored, measured now, or left to the rule."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...geometry import ConvGeometry
from .calls import Call, call_of
from .measure import gpu_clock, measure, wall_clock
from .verdicts import Store, Verdict, cache_file, device_key
from .worker import Worker

__all__ = [
    "MODES",
    "Measure",
    "Selector",
    "choose",
    "measure_in_process",
    "mode_of_environment",
    "note",
    "planning",
    "recording",
    "selector_of",
    "situation",
    "uses_dense_only",
]

logger = logging.getLogger("lightning_acu")

#: Values of $LIGHTNING_ACU_AUTO; unset is "measure" on GPUs and "rules" on CPUs.
MODES = ("measure", "rules", "off")

#: (call, device, the rule's backend, offsets of the user's call or None) to a verdict.
Measure = Callable[[Call, torch.device, str, Sequence[Any] | None], Verdict]

#: Batches and images of so many sizes have their own entry in the quick table.
_MOST_CALLS = 4096


def mode_of_environment() -> str | None:
    """$LIGHTNING_ACU_AUTO, None if it is not set.

    Raises:
        ValueError: it is none of its values.
    """
    mode = os.environ.get("LIGHTNING_ACU_AUTO")
    if mode is not None and mode not in MODES:
        raise ValueError(f"the environment variable LIGHTNING_ACU_AUTO (={mode!r}) must be one of {', '.join(MODES)}")
    return mode


class Selector:
    """Chooses for the calls on one device.

    Args:
        device: that device.
        store: verdicts so far.
        measure: how a call is measured.
        mode: of :data:`MODES`: "measure" where there is no verdict, "rules" never measures, "off" is rules alone.
    """

    def __init__(self, device: torch.device, store: Store, measure: Measure, mode: str) -> None:
        self.device, self.store, self.mode = device, store, mode
        self.measurement = measure
        self._lock = threading.Lock()  # backward runs in a thread of autograd
        self._quick: dict[Call, Verdict] = {}
        self._said: set[str] = set()

    @property
    def idle(self) -> bool:
        """Whether the rule holds for every call."""
        return self.mode == "off" or (self.mode == "rules" and not self.store.verdicts)

    def choose(
        self, call: Call, rule: str, situation: str | None = None, positions: Callable[[], Any] | None = None
    ) -> str:
        """The backend of ``call``.

        Args:
            call: the call.
            rule: the backend that runs where nothing is known.
            situation: "deterministic" (the rule: runs must not differ by what a file says), "capture" (no measurement,
                and never "dense", which waits for the host) or "sync debug" (no measurement); None otherwise.
            positions: gives the offsets of the user's call as a nested list; called if there is a measurement.
        """
        if self.mode == "off" or situation == "deterministic":
            return rule
        verdict = self._quick.get(call) or self.store.verdicts.get(call.signature)
        if situation == "capture":
            return verdict.backend or rule if verdict is not None and verdict.outcome != "measured" else "triton"
        if verdict is None:
            if self.mode != "measure" or situation is not None:
                return rule
            verdict = self.measure(call, rule, None if positions is None else positions())
        self._keep(call, verdict)
        return verdict.backend or rule

    def measure(self, call: Call, rule: str, positions: Any = None, again: bool = False) -> Verdict:
        """The verdict on ``call``, measured unless there is one; ``again``: in any case."""
        with self._lock:
            self.store.refresh()
            known = self.store.verdicts.get(call.signature)
            if known is not None and not again:  # another thread or process was quicker
                return known
            if self.store.path is not None:
                _say_that_it_measures(str(self.store.path))
            verdict = self.measurement(call, self.device, rule, positions)
            self.store.add(call.signature, verdict, replace=again)
            if verdict.outcome in ("wrong", "failed", "crashed", "hung"):
                logger.warning("%s: %s", call.signature, verdict)
            return self.store.verdicts[call.signature]

    def _keep(self, call: Call, verdict: Verdict) -> None:
        if call in self._quick:
            return
        if len(self._quick) >= _MOST_CALLS:
            self._quick.clear()
        self._quick[call] = verdict
        if call.signature not in self._said:
            self._said.add(call.signature)
            logger.info("%s: %s", call.signature, verdict)


@functools.cache
def _say_that_it_measures(path: str) -> None:
    logger.warning(
        "measuring which backend is faster here, once for each kind of layer; kept in %s. "
        "Set LIGHTNING_ACU_AUTO=rules to go without, or call lightning_acu.warm_up(model, example_input) beforehand",
        path,
    )


def measure_in_process(call: Call, device: torch.device, rule: str, positions: Any = None) -> Verdict:
    """Measure in this process: on CPUs, and in a worker."""
    from ..backends import BACKENDS

    names = ("triton", "dense") if device.type == "cuda" else ("cython", "dense")
    clock = gpu_clock if device.type == "cuda" else wall_clock
    return measure(call, device, {name: BACKENDS[name] for name in names}, rule, clock, positions)


def _measure_on_gpu(worker: Worker) -> Measure:
    def by_worker(call: Call, device: torch.device, rule: str, positions: Any) -> Verdict:
        torch.cuda.synchronize(device)  # what was launched before would take its share
        return worker.measure(call, device, rule, positions)

    return by_worker


@functools.cache
def selector_of(device: torch.device) -> Selector:
    """The selector of a device, made at its first call."""
    mode = mode_of_environment() or ("measure" if device.type == "cuda" else "rules")
    store = Store(None if mode == "off" else cache_file(), device_key(device))
    return Selector(device, store, _measure_on_gpu(Worker()) if device.type == "cuda" else measure_in_process, mode)


def situation(device: torch.device) -> str | None:
    """What forbids a measurement now, as :meth:`Selector.choose` takes it."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic"
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return "capture"
        if torch.cuda.get_sync_debug_mode():
            return "sync debug"
    return None


_recorded: list[list[Call]] = []
_planning = threading.local()


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls with ``backend="auto"`` that run within it, forward ones with the backward pass that follows."""
    calls: list[Call] = []
    _recorded.append(calls)
    try:
        yield calls
    finally:
        _recorded.remove(calls)


def note(input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry) -> None:
    """Tell :func:`recording` of a forward pass."""
    if not _recorded:
        return
    needs = tuple(tensor.requires_grad for tensor in (input, weight, offsets))
    for calls in _recorded:
        calls.append(call_of(input, weight, offsets, geometry, None))
        if any(needs):
            calls.append(call_of(input, weight, offsets, geometry, needs))


@contextmanager
def planning() -> Iterator[None]:
    """Choices within it are looked up, not measured: for reports, and for passes whose results nobody wants."""
    before = getattr(_planning, "on", False)
    _planning.on = True
    try:
        yield
    finally:
        _planning.on = before


def choose(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor,
    geometry: ConvGeometry,
    needs: Sequence[bool] | None,
    rule: str,
) -> str:
    """The backend of a call with these tensors; ``rule`` where nothing is known and nothing may be measured."""
    selector = selector_of(input.device)
    if selector.idle:
        return rule
    now = situation(input.device)
    if now is None and getattr(_planning, "on", False):
        now = "planning"
    call = call_of(input, weight, offsets, geometry, needs)
    return selector.choose(call, rule, now, lambda: offsets.detach().tolist())


@functools.cache
def uses_dense_only(device: str) -> None:
    """Say once that devices of this type take "dense"."""
    logger.info(
        "on %s backend='auto' takes 'dense': there are kernels for CPUs, and for NVIDIA's and AMD's GPUs", device
    )
