"""From finished runs to a table beside the poster's, its figure, and the learned shapes."""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image
from rich.console import Console
from rich.table import Table

from lightning_acu.figures.animation import palette

from .layers import displacements, draw_displacements, layers_learned, thinned
from .settings import callbacks_of, settings_of
from .tables import TABLES, Row

__all__ = ["check_settings", "compare", "finished_runs", "report"]

_OURS, _POSTER = "tab:blue", "0.7"


@dataclass
class _Cells:
    """A table as text, for the screen and for Markdown; the first ``names`` columns hold no numbers."""

    title: str
    columns: list[str]
    cells: list[list[str]]
    names: int

    def show(self) -> None:
        made = Table(title=self.title, pad_edge=False)
        for number, column in enumerate(self.columns):
            made.add_column(column, justify="left" if number < self.names else "right")
        for row in self.cells:
            made.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 120).print(made)

    def markdown(self) -> str:
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        lines = [self.columns, rule, *self.cells]
        return f"{self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(name: str, rows: Sequence[Row], folder: Path, seeds: int | None = None) -> None:
    """Print the table of the runs in ``folder`` and write it there, with figures. ``seeds``: below this; None: all.

    runs.csv: a line for each run. table.csv, table.png: their means. layers.csv: how far the taps of each layer moved;
    displacement.csv (up to 64 records), displacement.png: over the steps; shapes.png: where to. tables.md: both tables.

    Raises:
        FileNotFoundError: no run is finished.
        ValueError: runs that are to be compared were made with other settings.
    """
    runs = {row.name: finished_runs(folder, row, seeds) for row in rows}
    if not any(runs.values()):
        raise FileNotFoundError(f"{folder} has no finished run (ROW/seedN/result.json) of {', '.join(runs)}")
    check_settings(rows, runs)
    lines = [compare(row, runs) for row in rows if runs[row.name]]
    tables = [_table(name, lines)]
    every = [run for row in rows for run in runs[row.name]]
    written = [folder / f"{file}.csv" for file in ("runs", "table")]
    _write(written[0], [_flat(run) for run in every])
    _write(written[1], lines)
    written += _draw_table(name, lines, folder)
    if moved := displacements(folder, every):
        written.append(folder / "displacement.csv")
        _write(written[-1], thinned(moved))
        if learned := layers_learned(moved, every):
            tables.append(_table_of_layers(learned))
            written.append(folder / "layers.csv")
            _write(written[-1], learned)
            written.append(draw_displacements(moved, every, folder / "displacement.png"))
        written += _draw_shapes(folder, every)
    for table in tables:
        table.show()
    written.append(folder / "tables.md")
    written[-1].write_text("\n".join(table.markdown() for table in tables))
    print("written:", *(str(path) for path in written), sep="\n  ")


def finished_runs(folder: Path, row: Row, seeds: int | None = None) -> list[dict[str, Any]]:
    """The results of ``row``, by seed, of those below ``seeds``."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{row.name}/seed*/result.json")]
    return sorted((run for run in found if seeds is None or run["seed"] < seeds), key=lambda run: run["seed"])


def check_settings(rows: Sequence[Row], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Check that the runs of a row, and those of its base, differ in nothing that the command line decides.

    Raises:
        ValueError: they do; the message names two of them and what they differ in.
    """
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for row in rows:
        for run in runs[row.name]:
            folder = f"{row.name}/seed{run['seed']}"
            for option, value in settings_of(run["config"]).items():
                if option == "--multiplier" and value is None:  # no positions to learn
                    continue
                other, theirs = first.setdefault((row.base or row.name, option), (folder, value))
                if theirs != value:
                    raise ValueError(
                        f"{other} and {folder} cannot be compared: {option} was {theirs} there and {value} here; "
                        "choose other --rows or --seeds, or run one of them again with another --out"
                    )


def compare(row: Row, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A line of the table, in percent; the improvement is that over the base's run of the same seed.

    Standard deviations are those of the runs (n - 1), None where there is one run only.
    """
    values = {run["seed"]: run["value"] for run in runs[row.name]}
    bases = {run["seed"]: run["value"] for run in runs.get(row.base or "", [])}
    sign = 1 if row.higher_is_better else -1
    gains = [sign * (value - bases[seed]) for seed, value in values.items() if seed in bases]
    poster_base = next((other.poster for other in _table_of(row) if other.name == row.base), None)
    return {
        "row": row.name,
        "metric": row.metric,
        "parameters": runs[row.name][0]["parameters"],
        "steps": runs[row.name][0]["steps"],
        "seeds": len(values),
        "mean": statistics.fmean(values.values()),
        "std": statistics.stdev(values.values()) if len(values) > 1 else None,
        "improvement": statistics.fmean(gains) if gains else None,
        "improvement_std": statistics.stdev(gains) if len(gains) > 1 else None,
        "poster": row.poster,
        "poster_improvement": None if poster_base is None else sign * (row.poster - poster_base),
        "minutes": statistics.fmean(run["seconds"] for run in runs[row.name]) / 60,
    }


def _table_of(row: Row) -> list[Row]:
    return next(rows for rows in TABLES.values() if row in rows)


def _table(name: str, lines: Sequence[dict[str, Any]]) -> _Cells:
    metric = "top-5 accuracy" if "top5" in lines[0]["metric"] else "error"
    title = f"{name}: {metric} on the test images, mean ± standard deviation over seeds"
    columns = ["row", "parameters", "steps", "seeds", f"{metric} %", "gain on base", "poster %", "poster's gain", "min"]
    cells = [
        [
            line["row"],
            f"{line['parameters']:,}",
            f"{line['steps']:,}",
            str(line["seeds"]),
            _with_spread(line["mean"], line["std"]),
            _with_spread(line["improvement"], line["improvement_std"], "+"),
            f"{line['poster']:.2f}",
            _with_spread(line["poster_improvement"], None, "+"),
            f"{line['minutes']:.0f}",
        ]
        for line in lines
    ]
    return _Cells(title, columns, cells, names=1)


def _table_of_layers(lines: Sequence[dict[str, Any]]) -> _Cells:
    columns = ["row", "layer", "in warm-up", "mean at end", "furthest", "radius", "at first", "walked", "last third"]
    cells = [
        [
            line["row"],
            line["layer"],
            f"{line['in_warm_up']:.2f}",
            _with_spread(line["mean"], line["std"]),
            *(f"{line[key]:.2f}" for key in ("furthest", "radius", "radius_before", "walked", "walked_last_third")),
        ]
        for line in lines
    ]
    return _Cells("how far taps moved, in pixels", columns, cells, names=2)


def _with_spread(mean: float | None, std: float | None, sign: str = "") -> str:
    if mean is None:
        return "-"
    return f"{mean:{sign}.2f}" + ("" if std is None else f" ± {std:.2f}")


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    """A run in one line; its folder holds the rest."""
    config = run["config"]
    callbacks = callbacks_of(config)
    return {
        **{key: run[key] for key in ("row", "seed", "steps", "parameters", "metric", "value")},
        "errors_by_stage": "; ".join(f"{stage} {100 * test['test/error']:.2f}" for stage, test in run["test"].items()),
        "batch_size": config["data"]["init_args"]["batch_size"],
        "lr": config["model"]["init_args"]["optimizer"]["init_args"]["lr"],
        "position_multiplier": callbacks.get("PositionLRSchedule", {}).get("multiplier"),
        "minutes": round(run["seconds"] / 60, 2),
        **{key: run[key] for key in ("attempts", "device", "threads", "finished")},
        "versions": " ".join(f"{package}-{version}" for package, version in run["versions"].items()),
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})


def _draw_table(name: str, lines: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Improvements beside the poster's; nothing where there is no row with a base."""
    compared = [line for line in lines if line["improvement"] is not None]
    if not compared:
        return []
    figure, axes = plt.subplots(figsize=(2 + 1.1 * len(compared), 3.4), layout="constrained")
    places = range(len(compared))
    ours = [line["improvement"] for line in compared]
    spread = [line["improvement_std"] or 0.0 for line in compared]
    axes.bar([p - 0.2 for p in places], ours, 0.4, yerr=spread, capsize=3, color=_OURS, label="these runs")
    posters = [line["poster_improvement"] for line in compared]
    axes.bar([p + 0.2 for p in places], posters, 0.4, color=_POSTER, label="poster")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(list(places), [line["row"] for line in compared])
    axes.set_ylabel("improvement over base, points")
    axes.set_title(f"{name}, {compared[0]['seeds']} seeds", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return [_save(figure, folder / "table.png")]


def _draw_shapes(folder: Path, runs: Sequence[dict[str, Any]]) -> list[Path]:
    """For each row with learned shapes, those of its first seed under each other, as OffsetLogger drew them."""
    pictures = {}
    for run in runs:
        attempts = (
            folder / run["row"] / f"seed{run['seed']}" / f"attempt_{n}" for n in reversed(range(run["attempts"]))
        )
        drawn = [attempt / "shapes.png" for attempt in attempts if (attempt / "shapes.png").exists()]
        if drawn:  # the last attempt has none if it was for the test only
            pictures.setdefault(run["row"], drawn[0])
    if not pictures:
        return []
    images = {row: plt.imread(path) for row, path in pictures.items()}
    heights = [10 * image.shape[0] / image.shape[1] for image in images.values()]
    figure, panels = plt.subplots(
        len(images), 1, figsize=(10, sum(heights) + 0.3 * len(images)), height_ratios=heights, squeeze=False
    )
    figure.subplots_adjust(0, 0, 1, 0.95, hspace=0.1)
    for panel, (row, image) in zip(panels[:, 0], images.items(), strict=True):
        panel.imshow(image)
        panel.set_title(row, fontsize=10)
        panel.axis("off")
    path = _save(figure, folder / "shapes.png")
    with Image.open(path) as image:
        few_colours = image.convert("RGB").quantize(palette=palette(), dither=Image.Dither.NONE)
    few_colours.save(path, optimize=True)  # a fifth of the bytes
    return [path]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
