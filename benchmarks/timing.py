"""Timing side by side: calls take turns, so that all of them meet the same machine; and peak memory."""

import ctypes
import functools
import importlib
import platform
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

_SAMPLE = 2e-3  # seconds that one sample lasts at least: less is the clock's and the scheduler's


def device_name(device: str) -> str:
    """The model of the GPU or of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


@functools.cache
def versions(*packages: str) -> dict[str, str]:
    """{package: its version}, empty where it is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.import_module(package).__version__
        except ImportError:
            found[package] = ""
    return found


def slug(text: str) -> str:
    """``text`` as a part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def synchronize(device: str) -> None:
    """Wait for a GPU, so that what failed there is raised here."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    """Mean time of ``repeats`` calls in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


class CapturedCalls:
    """``number`` calls recorded as one CUDA graph; calling this replays them, without what the host does for each.

    A host needs tens of microseconds to launch what a GPU computes in ten. This times the GPU, as programs under
    ``mode="reduce-overhead"`` or with their own graphs run it; calls as they are time whichever takes longer.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # torch asks for a warm-up outside the default stream
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.number = min(20, max(1, int(_SAMPLE / seconds(call, 3, "cuda"))))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _ in range(self.number):
                call()

    def __call__(self) -> None:
        self._graph.replay()


def in_turns(
    calls: dict[str, Callable[[], object]],
    device: str,
    budget: float,
    most: int,
    least: dict[str, int],
) -> dict[str, list[float]]:
    """Samples of each call in seconds. They take turns; each round has an order of its own.

    A sample is so many calls that it lasts 2 ms. A call gets as many samples as ``budget`` seconds allow, ``most`` at
    most and ``least[name]`` at least; where they are fewer than another's they are spread over its rounds. Callers warm
    up, at least once. The call that finds out how long a call takes is a sample itself where that is over ``budget``.
    """
    repeats, samples = {}, {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        once = seconds(call, 1, device)
        if once < _SAMPLE:  # the first call after another method is slow: not what the number should rest on
            once = seconds(call, 3, device)
        repeats[name] = max(1, -int(-_SAMPLE // once))
        samples[name] = min(most, max(least[name], int(budget / (once * repeats[name]))))
        if once > budget:
            times[name].append(once)
            samples[name] -= 1
    rounds = max(samples.values())
    shuffle = random.Random(0).shuffle  # not always after the same neighbour, which leaves its data in the caches
    for turn in range(rounds):
        names = [n for n in calls if (turn + 1) * samples[n] // rounds > turn * samples[n] // rounds]
        shuffle(names)
        for name in names:
            times[name].append(seconds(calls[name], repeats[name], device))
    return times


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Bytes in use at the height of ``call``, more than before it.

    Call it once before: a library's first use of a shape generates and loads code, which is megabytes but no data.
    What a call keeps for the next one is therefore not seen. On the CPU this is the process's resident memory, best of
    a fresh process, whose allocator keeps little. Linux only.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # so that what was freed is not reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
