"""How the positions of each layer moved while they learned, from the metrics.csv of finished runs."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .settings import callbacks_of

__all__ = ["displacements", "draw_displacements", "layers_learned", "thinned"]

#: Records of a layer in a run that go to displacement.csv, at most.
_RECORDS = 64

_MEAN = "acu/mean_displacement/"


def displacements(folder: Path, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How far the taps of each layer were from grid and centre, and how fast they moved, at each record of each run."""
    found = []
    for run in runs:
        with (folder / run["row"] / f"seed{run['seed']}" / "metrics.csv").open(newline="") as file:
            for record in csv.DictReader(file):
                found += [
                    {
                        "row": run["row"],
                        "seed": run["seed"],
                        "step": int(record["step"]),
                        "layer": _short(key.removeprefix(_MEAN)),
                        "mean_displacement": float(value),
                        "max_displacement": float(record[key.replace("mean", "max")]),
                        "receptive_radius": float(record[key.replace("mean_displacement", "receptive_radius")]),
                        "step_speed": float(record[key.replace("mean_displacement", "step_speed")]),
                    }
                    for key, value in record.items()
                    if value and key.startswith(_MEAN)
                ]
    return found


def thinned(moved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 64 records of each layer in each run: every n-th, the last among them.

    ``step_speed`` is the mean since the record before, as in ``moved``, so that taps walked as far.
    """
    ways: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in moved:
        ways.setdefault((record["row"], record["seed"], record["layer"]), []).append(record)
    found = []
    for way in ways.values():
        way.sort(key=_step)
        every, before = -(-len(way) // _RECORDS), 0
        for end in range((len(way) - 1) % every, len(way), every):
            some, step = way[max(0, end - every + 1) : end + 1], way[end]["step"]
            walked = _walked(some, before, before)
            found.append(way[end] | {"step_speed": walked / max(1, step - before)})
            before = step
    return found


def layers_learned(moved: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row whose positions learn and each layer, over the seeds, in pixels:

    ``in_warm_up``: the furthest tap of any seed in the warm-up; ``mean`` and ``std``: of the mean displacement at the
    end; ``furthest``: the mean over seeds of the furthest tap; ``radius_before`` and ``radius``: how far the outermost
    tap was from the centre at first, and is at the end; ``walked``: the mean length of the way of a tap, and
    ``walked_last_third`` the part of it in the last third of the steps (between records a way counts as straight).
    """
    found = []
    for row in dict.fromkeys(record["row"] for record in moved):
        mine = [run for run in runs if run["row"] == row]
        if not _learns(row, runs):
            continue
        callbacks = callbacks_of(mine[0]["config"])
        warm_up, steps = callbacks["PositionLRSchedule"]["warmup_steps"], mine[0]["steps"]
        for layer in dict.fromkeys(record["layer"] for record in moved if record["row"] == row):
            ways = [
                sorted((r for r in moved if (r["row"], r["layer"], r["seed"]) == (row, layer, run["seed"])), key=_step)
                for run in mine
            ]
            ends = [way[-1]["mean_displacement"] for way in ways]
            found.append(
                {
                    "row": row,
                    "layer": layer,
                    "in_warm_up": max(r["max_displacement"] for way in ways for r in way if r["step"] <= warm_up),
                    "mean": statistics.fmean(ends),
                    "std": statistics.stdev(ends) if len(ends) > 1 else None,
                    "furthest": statistics.fmean(way[-1]["max_displacement"] for way in ways),
                    "radius_before": statistics.fmean(way[0]["receptive_radius"] for way in ways),
                    "radius": statistics.fmean(way[-1]["receptive_radius"] for way in ways),
                    "walked": statistics.fmean(_walked(way, 0) for way in ways),
                    "walked_last_third": statistics.fmean(_walked(way, steps * 2 / 3) for way in ways),
                }
            )
    return found


def _learns(row: str, runs: Sequence[dict[str, Any]]) -> bool:
    """Whether the positions of ``row`` learned in its own runs, and not in the row that it continues."""
    config = next(run["config"] for run in runs if run["row"] == row)
    return "RoundThenFinetune" not in callbacks_of(config)


def _step(record: dict[str, Any]) -> int:
    step: int = record["step"]
    return step


def _walked(way: Sequence[dict[str, Any]], start: float, before: int = 0) -> float:
    """Pixels from step ``start`` on. A speed is the mean since the record before, the first one's since ``before``."""
    length = 0.0
    for record in way:
        length += record["step_speed"] * max(0.0, record["step"] - max(before, start))
        before = record["step"]
    return length


def draw_displacements(moved: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """A panel for each row whose positions learn: mean displacement of each layer, mean and range of the seeds."""
    rows = [row for row in dict.fromkeys(record["row"] for record in moved) if _learns(row, runs)]
    layers = list(dict.fromkeys(record["layer"] for record in moved))
    colours = plt.get_cmap("viridis")
    figure, panels = plt.subplots(
        1, len(rows), figsize=(1 + 4 * len(rows), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for panel, row in zip(panels[0], rows, strict=True):
        for number, layer in enumerate(layers):
            by_step: dict[int, list[float]] = {}
            for record in moved:
                if record["row"] == row and record["layer"] == layer:
                    by_step.setdefault(record["step"], []).append(record["mean_displacement"])
            steps = sorted(by_step)
            colour = colours(number / max(1, len(layers) - 1))
            panel.plot(steps, [statistics.fmean(by_step[s]) for s in steps], color=colour, label=layer)
            low, high = ([choose(by_step[s]) for s in steps] for choose in (min, max))
            panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        for step, style in _moments(next(run for run in runs if run["row"] == row)["config"]):
            panel.axvline(step, color="0.5", linestyle=style, linewidth=0.8)
        panel.set_title(row, fontsize=10)
        panel.set_xlabel("step")
        panel.set_xlim(left=0)
    panels[0][0].set_ylabel("mean displacement, pixels")
    if len(layers) <= 8:
        panels[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _moments(config: dict[str, Any]) -> list[tuple[int, str]]:
    """End of the warm-up (dashed), learning-rate steps (dotted), rounding (solid)."""
    found = [(step, ":") for step in config["model"]["init_args"]["lr_scheduler"]["init_args"]["milestones"]]
    for arguments in callbacks_of(config).values():
        found += [(arguments[k], style) for k, style in (("warmup_steps", "--"), ("at_step", "-")) if k in arguments]
    return found


def _short(layer: str) -> str:
    """As the paper calls it: "conv3/2" for "model.conv3.2.conv"."""
    return layer.removeprefix("model.").removesuffix(".conv").replace(".", "/")
