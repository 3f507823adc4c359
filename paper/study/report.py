"""From finished runs to one table of paired differences and its figures.

OUT/ gets runs.csv (a line for each run), table.csv and table.md (a line for each row), gain.png (difference from plain
with its interval) and error_by_parameters.png, error_by_macs.png, error_by_time.png and, once ``latency.py`` has
measured it, error_by_latency.png.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from .rows import ROWS, Row

__all__ = ["gain", "report"]

#: Samples of a bootstrap, and the share of them that an interval holds.
_SAMPLES, _COVERED = 4000, 0.95

_PRICES = {
    "parameters": ("parameters", "parameters"),
    "macs": ("macs", "multiply-accumulates of an image"),
    "time": ("cpu_minutes", "minutes of one core for the training"),
    "latency": ("latency_ms", "milliseconds an image in ONNX Runtime, one thread"),
}


def report(rows: Sequence[Row], folder: Path) -> None:
    """Print the table of the finished runs in ``folder`` and write it there, with figures.

    Raises:
        FileNotFoundError: no run is finished.
    """
    runs = {row.name: finished_runs(folder, row) for row in rows}
    runs = {name: own for name, own in runs.items() if own}
    if not runs:
        raise FileNotFoundError(f"{folder} has no finished run (ROW/seedN/result.json)")
    _add_whole_time(runs)
    _add_latency(runs, folder / "latency.csv")
    lines = [_line(name, runs) for name in runs]
    _write(folder / "runs.csv", [_flat(run) for own in runs.values() for run in own])
    _write(folder / "table.csv", lines)
    text = _markdown(lines)
    (folder / "table.md").write_text(text)
    print(text)
    _draw_gain(lines, folder / "gain.png")
    for name, (column, label) in _PRICES.items():
        if all(line[column] is not None for line in lines):
            _draw_price(lines, column, label, folder / f"error_by_{name}.png")


def finished_runs(folder: Path, row: Row) -> list[dict[str, Any]]:
    """The results of ``row``, by seed, each with "right": for each test image, whether the network is."""
    found = []
    for path in sorted(folder.glob(f"{row.name}/seed*/result.json")):
        run = json.loads(path.read_text())
        run["right"] = np.load(path.with_name("answers.npz"))["right"]
        found.append(run)
    return found


def gain(ours: Sequence[NDArray[np.bool_]], plain: Sequence[NDArray[np.bool_]]) -> tuple[float, float, float]:
    """Mean paired difference of accuracy in points, and its 95 % interval: bootstrap over seeds and over images.

    ``ours`` and ``plain``: for each seed (in the same order) and test image whether the network is right. Seeds and
    images are drawn with replacement, independently; with few seeds such an interval is somewhat too narrow.
    """
    differences = np.stack(ours).astype(np.float64) - np.stack(plain)  # (seeds, images)
    seeds, images = differences.shape
    random = np.random.default_rng(0)
    means = np.empty(_SAMPLES)
    for sample in range(_SAMPLES):
        chosen = differences[random.integers(seeds, size=seeds)].mean(0)
        means[sample] = chosen[random.integers(images, size=images)].mean()
    tail = 100 * (1 - _COVERED) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return 100 * float(differences.mean()), 100 * float(low), 100 * float(high)


def _line(name: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    own = runs[name]
    errors = [run["error"] for run in own]
    line = {
        "row": name,
        "what": ROWS[name].what,
        "seeds": len(own),
        "error": round(statistics.mean(errors), 2),
        "error_sd": round(statistics.stdev(errors), 2) if len(errors) > 1 else None,
        "gain": None,
        "gain_low": None,
        "gain_high": None,
        "gains": "",
        **{column: own[0].get(column) for column in ("parameters", "macs", "latency_ms")},
        "cpu_minutes": round(statistics.mean(run["cpu_minutes"] for run in own), 4),
    }
    plain = {run["seed"]: run for run in runs.get("plain", [])}
    pairs = [(run, plain[run["seed"]]) for run in own if run["seed"] in plain]
    if name != "plain" and pairs:
        middle, low, high = gain([run["right"] for run, _ in pairs], [base["right"] for _, base in pairs])
        line |= {"gain": round(middle, 2), "gain_low": round(low, 2), "gain_high": round(high, 2)}
        line["gains"] = " ".join(f"{base['error'] - run['error']:+.2f}" for run, base in pairs)
    return line


def _add_whole_time(runs: dict[str, list[dict[str, Any]]]) -> None:
    """A row that branches off also took the time of its source until there."""
    for name, own in runs.items():
        row = ROWS[name]
        for run in own if row.source else []:
            source = next(other for other in runs[row.source] if other["seed"] == run["seed"])
            run["cpu_minutes"] = round(run["cpu_minutes"] + row.at * source["cpu_minutes"], 4)


def _add_latency(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    if not path.exists():
        return
    with path.open(newline="") as file:
        latency = {line["row"]: float(line["latency_ms"]) for line in csv.DictReader(file)}
    for name, own in runs.items():
        for run in own:
            run["latency_ms"] = latency.get(name)


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    numbers = {key: value for key, value in run.items() if key not in ("right", "displacement", "dilations")}
    moved = [str(value) for value in run["displacement"].values()]
    found = ["x".join(map(str, pair)) for pair in run["dilations"].values()]
    return numbers | {"displacement": " ".join(moved), "dilations": " ".join(found)}


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for line in lines for key in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _markdown(lines: list[dict[str, Any]]) -> str:
    plain = next((line for line in lines if line["row"] == "plain"), None)
    text = [
        "| row | | error % | gain on plain, points (95 %) | each seed | parameters | training time |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for line in lines:
        spread = "" if line["error_sd"] is None else f" ± {line['error_sd']:.2f}"
        gained = (
            "-"
            if line["gain"] is None
            else f"{line['gain']:+.2f} ({line['gain_low']:+.2f} to {line['gain_high']:+.2f})"
        )
        time = "" if plain is None else f"{line['cpu_minutes'] / plain['cpu_minutes']:.2f}"
        text.append(
            f"| {line['row']} | {line['what']} | {line['error']:.2f}{spread} | {gained} | {line['gains']} | "
            f"{line['parameters']:,} | {time} |"
        )
    return "\n".join(text) + "\n"


def _draw_gain(lines: list[dict[str, Any]], path: Path) -> None:
    shown = [line for line in lines if line["gain"] is not None][::-1]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(shown) + 1), layout="constrained")
    for height, line in enumerate(shown):
        colour = "tab:blue" if ROWS[line["row"]].groups else "0.45"
        axes.plot([line["gain_low"], line["gain_high"]], [height, height], color=colour)
        axes.plot(line["gain"], height, "o", color=colour)
        each = [float(number) for number in line["gains"].split()]
        axes.plot(each, [height] * len(each), "|", color=colour, markersize=8)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set_yticks(range(len(shown)), [line["row"] for line in shown])
    axes.set_xlabel("points of accuracy more than plain; line: 95 % interval, ticks: seeds, blue: active")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_price(lines: list[dict[str, Any]], column: str, label: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for line in lines:
        colour = "tab:blue" if ROWS[line["row"]].groups else "0.45"
        axes.errorbar(line[column], line["error"], line["error_sd"], fmt="o", color=colour, capsize=2)
        axes.annotate(line["row"], (line[column], line["error"]), (5, 3), textcoords="offset points", fontsize=7)
    axes.set_xlabel(label)
    axes.set_ylabel("test error %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
