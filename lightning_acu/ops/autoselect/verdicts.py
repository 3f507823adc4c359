"""What a measurement found, and the file that keeps it."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...files import write_whole

__all__ = ["Store", "Verdict", "cache_file", "device_key"]

logger = logging.getLogger("lightning_acu")

#: What a file says of itself; other numbers are files of other versions.
_FORMAT = "lightning_acu backend choices 1"

#: A thousand signatures have about 200 kB.
_MAX_BYTES = 2**23

_NAMES = ("cython", "triton", "dense")

_OUTCOMES = ("measured", "wrong", "failed", "crashed", "hung", "out of memory", "not started")

#: Outcomes that may be others next time: the process keeps them, the file does not.
_PASSING = ("out of memory", "not started")


@dataclass(frozen=True)
class Verdict:
    """The backend that calls of one signature take.

    Attributes:
        backend: its name; None where nothing was found out and the rule holds.
        outcome: "measured"; what disqualified a candidate: "wrong" results, "failed" (an exception), "crashed" or
            "hung"; or why nothing was found out: "out of memory", "not started" (the process that measures).
        seconds: the time of a call, for each backend that was timed.
        detail: what else there is to say, such as an error's message.
    """

    backend: str | None
    outcome: str = "measured"
    seconds: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""

    @property
    def lasts(self) -> bool:
        """Whether it is kept in the file."""
        return self.outcome not in _PASSING

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * time:.3f} ms" for name, time in self.seconds.items())
        notes = [self.outcome, *filter(None, [times, self.detail])]
        return f"{self.backend or 'by the rule'} ({'; '.join(notes)})"


class Store:
    """The verdicts of one kind of device, in memory and in a file that holds those of many kinds.

    A file that is damaged or not ours is left alone and ignored, with one warning; so is one that cannot be written.
    Processes may write at the same time: each adds to what is there, and who wrote a signature first has decided it.

    Args:
        path: the file; None keeps verdicts in memory only.
        key: the kind of device and the versions, of :func:`device_key`.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path
        self.key = key
        self.verdicts: dict[str, Verdict] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what other processes have added."""
        content = self._read()
        for signature, entry in (content or {}).get("devices", {}).get(self.key, {}).items():
            self.verdicts[signature] = Verdict(**entry)

    def add(self, signature: str, verdict: Verdict, replace: bool = False) -> None:
        """Keep ``verdict``, in the file too if it ``lasts``; ``replace``: also where the file has one already."""
        self.verdicts[signature] = verdict
        if self.path is None or not verdict.lasts:
            return
        from filelock import FileLock, Timeout  # which torch needs, too

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", timeout=10):
                content = self._read()
                if content is None:
                    return
                own = content["devices"].setdefault(self.key, {})
                if replace or signature not in own:
                    own[signature] = asdict(verdict)
                    text = json.dumps(content, indent=1) + "\n"
                    write_whole(self.path, lambda draft: draft.write_text(text))
                self.verdicts[signature] = Verdict(**own[signature])
        except (OSError, Timeout) as error:
            _warn_once(f"backend choices are not kept, since {self.path} cannot be written: {error}")

    def _read(self) -> dict[str, Any] | None:
        """The file's content, checked; without entries if there is no file, None if it is not to be used."""
        empty: dict[str, Any] = {"format": _FORMAT, "devices": {}}
        if self.path is None:
            return empty
        try:
            with self.path.open("rb") as file:
                text = file.read(_MAX_BYTES + 1)
            return _checked(text)
        except FileNotFoundError:
            return empty
        except (OSError, ValueError, RecursionError) as error:
            _warn_once(f"{self.path} is ignored ({error}); delete it, or tune into another folder")
            return None


def _checked(text: bytes) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ValueError: it is no file of ours, or damaged.
    """
    if len(text) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it does not say {_FORMAT!r}")
    devices = content.get("devices")
    if not isinstance(devices, dict) or not all(isinstance(entries, dict) for entries in devices.values()):
        raise ValueError("it has no choices by device")
    for entries in devices.values():
        for signature, entry in entries.items():
            if not _is_entry(entry):
                raise ValueError(f"{signature!r} has {str(entry)[:100]}, which is no choice")
    return content


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"backend", "outcome", "seconds", "detail"}:
        return False
    seconds = entry["seconds"]
    return (
        entry["backend"] in _NAMES
        and entry["outcome"] in _OUTCOMES
        and isinstance(entry["detail"], str)
        and isinstance(seconds, dict)
        and all(name in _NAMES and isinstance(time, int | float) for name, time in seconds.items())
    )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def cache_file() -> Path | None:
    """``backend_choices.json`` in $LIGHTNING_ACU_CACHE or the user's cache; None without a home."""
    from ..triton.tiles import tuned_tiles

    try:
        return tuned_tiles().with_name("backend_choices.json")
    except RuntimeError:
        return None


@functools.cache
def device_key(device: torch.device) -> str:
    """The kind of device and every version that times and results depend on; files travel between equal ones."""
    versions = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
        versions += [
            f"driver {driver}",
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        ]
        versions += [f"cuDNN {torch.backends.cudnn.version()}", f"triton {_triton_version()}"]
        folder, pattern = "triton", "*.py"
    else:
        name, folder, pattern = _processor(), "cpu", "*.so" if os.name != "nt" else "*.pyd"
    return " | ".join([name, *versions, f"kernels {_hash(Path(__file__).parents[1] / folder, pattern)}"])


def _triton_version() -> str:
    from importlib import metadata

    for name in ("triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "none"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _hash(folder: Path, pattern: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
