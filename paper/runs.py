"""One run of one row: trained by ``lightning-acu fit`` in a process of its own, resumed where it stopped, collected.

OUT/TABLE/ROW/seedN/ holds
    config.yaml                the configuration as it is run
    checkpoints/last.ckpt      to resume from, and for rows that start from this network
    attempts.json              when each attempt began, at which step, and for how long it ran
    attempt_0/ attempt_1/ ...  what each wrote: metrics.csv, shapes.png, shapes.gif, summary.json
    attempt_0.log ...          what each printed
    metrics.csv, result.json   of the finished run, from all attempts
    lock                       held while a process works here
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import timm
import torch
import yaml

import lightning_acu
from benchmarks.timing import device_name
from lightning_acu.models import create_model

from .settings import effective_config, length_of
from .tables import Row

__all__ = ["run_row"]

_ROOT = Path(__file__).parents[1]

#: Seconds between two looks at a training.
_POLL = 2.0


def run_row(row: Row, seed: int, folder: Path, options: argparse.Namespace, say: Callable[[str], None]) -> bool:
    """Train and collect ``row`` in ``folder``/ROW/seedN, or what is missing of it; False where it was finished before.

    Raises:
        RuntimeError: the training failed (the message has the end of what it printed), another process trains in that
            folder, or the checkpoint to go on from is damaged.
        ValueError: the folder holds a run with other settings.
    """
    run = folder / row.name / f"seed{seed}"
    run.mkdir(parents=True, exist_ok=True)
    with _only_one(run):
        config = effective_config(row, seed, options)
        _claim(run, config)
        if (run / "result.json").exists():
            return False
        _run(row, seed, run, config, say)
        return True


@contextmanager
def _only_one(run: Path) -> Iterator[None]:
    """Until this ends, or its process does, no other one works in the folder."""
    with (run / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is training in {run}: wait for it, or choose another --out") from None
        yield


def _run(row: Row, seed: int, run: Path, config: dict[str, Any], say: Callable[[str], None]) -> None:
    start = run / "checkpoints" / "last.ckpt"
    if not start.exists() and row.continues is not None:
        start = run.parents[1] / row.continues / f"seed{seed}" / "checkpoints" / "last.ckpt"
    attempts = _attempts(run)
    if attempts and attempts[-1]["seconds"] is None:  # killed: what came after its last checkpoint is lost
        last = start.stat().st_mtime if start.exists() else 0.0
        attempts[-1]["seconds"] = round(max(0.0, last - attempts[-1]["began"]), 1)
    step = _step_of(start) if start.exists() else 0
    number = len(attempts)
    attempts.append({"began": time.time(), "from_step": step, "seconds": None})
    _write_json(run / "attempts.json", attempts)
    _train(run, number, start if start.exists() else None, (step, length_of(config)), say)
    attempts[-1]["seconds"] = round(time.time() - attempts[-1]["began"], 1)
    _write_json(run / "attempts.json", attempts)
    _collect(row, seed, run, config, attempts)


def _step_of(checkpoint: Path) -> int:
    try:
        step: int = torch.load(checkpoint, map_location="cpu", weights_only=False)["global_step"]
    except Exception as error:  # whatever torch and pickle raise for a damaged file
        raise RuntimeError(
            f"{checkpoint} is damaged ({error}): delete {checkpoint.parents[1]} to start over"
        ) from error
    return step


def _claim(run: Path, config: dict[str, Any]) -> None:
    """Write the configuration, or check that it is what the folder was begun with."""
    path = run / "config.yaml"
    if path.exists():
        if (found := yaml.safe_load(path.read_text())) != config:
            keys = ", ".join(sorted(_differences(found, config)))
            raise ValueError(f"{run} holds a run with other settings ({keys}): use these, or choose another --out")
        return
    text = yaml.safe_dump(config, sort_keys=False)
    _write_whole(path, f"# Made by paper/reproduce.py, to be run in this folder.\n{text}")


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        return [d for key in keys for d in _differences(one.get(key), other.get(key), f"{name}.{key}".lstrip("."))]
    return [] if one == other else [name]


def _attempts(run: Path) -> list[dict[str, Any]]:
    path = run / "attempts.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def _train(run: Path, number: int, start: Path | None, steps: tuple[int, int], say: Callable[[str], None]) -> None:
    """The training as a process; ``say`` hears how far it is."""
    version = f"attempt_{number}"
    command = [sys.executable, "-m", "paper.train", "fit", "--config", "config.yaml"]
    command.append(f"--trainer.logger.init_args.version={version}")
    if start is not None:
        command.append(f"--ckpt_path={os.path.relpath(start, run)}")
    # From a checkout that is not installed, too.
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    log = run / f"{version}.log"
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=run,
            stdin=subprocess.PIPE,  # see train.py
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL)
                say(_progress(run / version / "metrics.csv", steps, time.monotonic() - began))
        except BaseException:
            process.terminate()
            raise
        finally:
            process.communicate()  # waits for its end, and closes its standard input
    if process.returncode != 0:
        lines = log.read_text().splitlines()[-15:]
        raise RuntimeError(f"the training in {run} failed (exit status {process.returncode}):\n" + "\n".join(lines))


def _progress(metrics: Path, steps: tuple[int, int], seconds: float) -> str:
    first, last = steps
    step, loss = first, ""
    if metrics.exists():
        with metrics.open(newline="") as file:
            for row in csv.DictReader(file):
                with suppress(ValueError):  # a line that is being written
                    if row.get("train/loss"):
                        step, loss = int(row["step"]) + 1, f", loss {float(row['train/loss']):.3f}"
    left = f", {seconds / (step - first) * (last - step) / 60:.0f} min left" if step > first else ""
    return f"step {step:,} of {last:,}{loss}{left}"


def _collect(row: Row, seed: int, run: Path, config: dict[str, Any], attempts: list[dict[str, Any]]) -> None:
    """metrics.csv and result.json."""
    _write_rows(run / "metrics.csv", _merged_metrics(run, attempts))
    summary = json.loads((run / f"attempt_{len(attempts) - 1}" / "summary.json").read_text())
    model = config["model"]["init_args"]
    plain = create_model(model["model"], num_classes=model["num_classes"], **model.get("model_kwargs") or {})
    result = {
        "row": row.name,
        "seed": seed,
        "steps": length_of(config),
        "value": 100 * summary["test"][row.stage][row.metric],
        "metric": row.metric,
        "test": summary["test"],
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "learned": summary["learned"],
        "final": summary["final"],
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 1),
        "attempts": len(attempts),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name("cuda" if torch.cuda.is_available() and _on_gpu(config) else "cpu"),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{package.__name__: package.__version__ for package in (torch, lightning, timm, lightning_acu)},
        },
        "config": config,
    }
    _write_json(run / "result.json", result)


def _on_gpu(config: dict[str, Any]) -> bool:
    return config["trainer"]["accelerator"] != "cpu"


def _merged_metrics(run: Path, attempts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The records of all attempts, of each up to the checkpoint that the next one started from."""
    merged: list[dict[str, str]] = []
    ends = [attempt["from_step"] for attempt in attempts[1:]] + [float("inf")]
    for number, end in enumerate(ends):
        path = run / f"attempt_{number}" / "metrics.csv"
        if path.exists():  # one that was killed early has none
            with path.open(newline="") as file:
                merged += [record for record in csv.DictReader(file) if _steps_done(record) <= end]
    return merged


def _steps_done(record: dict[str, str]) -> int:
    """Positions are recorded under the number of steps done, losses under that of the batch, one less."""
    return int(record["step"]) + (1 if record.get("train/loss") else 0)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _write_json(path: Path, content: Any) -> None:
    _write_whole(path, json.dumps(content, indent=2) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Whole or not at all, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)
