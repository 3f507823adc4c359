"""A process that measures for another one: what kills or blocks it does no harm there.

An illegal memory access of a GPU kernel leaves a process unable to use that GPU again, and a kernel that hangs
cannot be stopped; so kernels that have not been proven on a kind of GPU never run in the user's process. The worker is
kept for the next call, since it takes seconds to start, and ends by itself when there is none for a while.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from .calls import Call, call_from_json, call_to_json
from .verdicts import Verdict

__all__ = ["Worker", "serve"]

#: What begins a line of the protocol; compilers and libraries print others.
_MARK = "lightning_acu: "

_START_SECONDS, _CALL_SECONDS = 120.0, 120.0

#: The worker ends after as many seconds without a call: its context holds some of the GPU's memory.
_IDLE_SECONDS = 30.0


class Worker:
    """The other process, seen from the user's.

    Args:
        command: starts it; it speaks the protocol of :func:`serve`.
        start_seconds: in which it has to be ready.
        call_seconds: in which it has to answer; the first call of a kind compiles kernels.
    """

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-m", "lightning_acu.ops.autoselect"),
        start_seconds: float = _START_SECONDS,
        call_seconds: float = _CALL_SECONDS,
    ) -> None:
        self._command = list(command)
        self._start_seconds, self._call_seconds = start_seconds, call_seconds
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def measure(self, call: Call, device: torch.device, rule: str, positions: Sequence[Any] | None = None) -> Verdict:
        """The verdict of the worker; where it died or did not answer, "dense"."""
        request = {"call": call_to_json(call), "device": str(device), "rule": rule, "positions": positions}
        for attempt in range(2):
            problem = self._start()
            if problem:
                return Verdict(None, "not started", detail=problem)
            assert self._process is not None
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            except OSError:  # it ended meanwhile, idle
                self.stop()
                continue
            answer = self._answer(self._call_seconds)
            if answer == "idle" and attempt == 0:  # it ended before it saw the call
                self.stop()
                continue
            break
        if answer is None or answer == "idle":
            status = self.stop()
            return Verdict("dense", "crashed", detail=f"the process that measured ended with status {status}")
        if answer == "":
            self.stop()
            return Verdict("dense", "hung", detail=f"no answer within {self._call_seconds:g} seconds")
        return Verdict(**json.loads(answer))

    def stop(self) -> int | None:
        """End the process; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was still to be written to it
                    stream.close()
        return process.returncode

    def _start(self) -> str:
        """Why it could not be started, or ""."""
        if self._process is not None and self._process.poll() is None:
            return ""
        self.stop()
        self._lines = queue.Queue()
        root = str(Path(__file__).parents[3])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "LIGHTNING_ACU_AUTO": "off"}
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as error:
            return f"{self._command[0]}: {error}"
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        if self._answer(self._start_seconds) != "ready":
            return f"the process that measures ended with status {self.stop()} before it was ready"
        return ""

    def _answer(self, seconds: float) -> str | None:
        """The next line of the protocol; "" where there is none in time, None where the process has ended."""
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            return ""


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    """Pass on the lines of the protocol, and None at the end."""
    with contextlib.suppress(ValueError):  # it was closed
        for line in stream:
            if line.startswith(_MARK):
                lines.put(line.removeprefix(_MARK).strip())
    lines.put(None)


def serve(
    measure: Callable[[Call, torch.device, str, Sequence[Any] | None], Verdict], idle_seconds: float = _IDLE_SECONDS
) -> None:
    """Answer a call a line on stdin with a verdict a line on stdout, until there is none for a while."""
    requests: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    print(f"{_MARK}ready", flush=True)
    while True:
        try:
            line = requests.get(timeout=idle_seconds)
        except queue.Empty:
            print(f"{_MARK}idle", flush=True)
            os._exit(0)  # the other thread waits for input
        if line is None:
            return
        request = json.loads(line)
        call = call_from_json(request["call"])
        verdict = measure(call, torch.device(request["device"]), request["rule"], request["positions"])
        print(f"{_MARK}{json.dumps(asdict(verdict))}", flush=True)
