"""``lightning-acu compare``: finished runs beside one another: what each reached, and at which price."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .errors import Parser

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser("compare", "compare runs that `fit --test_after_fit true` has finished, by their summary.json")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or of versions of one")
    parser.add_argument("--metric", default="test/accuracy", metavar="NAME", help="default: test/accuracy")
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu compare RUN RUN ...``."""
    options = make_parser().parse_args(words[1:])
    table = Table("run", options.metric, "parameters", "training", "fold's arithmetic", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for path in options.runs:
        file = _newest(path) / "summary.json"
        summary = json.loads(file.read_text())
        table.add_row(str(path), _last(summary, options.metric, file), *_price(summary))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _newest(path: Path) -> Path:
    """The run in ``path``, or the newest of its versions."""
    if (path / "summary.json").is_file():
        return path
    versions = sorted(path.glob("*/summary.json"), key=lambda file: file.stat().st_mtime)
    if not versions:
        raise FileNotFoundError(f"{path} has no summary.json; `lightning-acu fit --test_after_fit true` writes one")
    return versions[-1].parent


def _last(summary: dict[str, Any], metric: str, file: Path) -> str:
    stage = list(summary["test"].values())[-1]
    if metric not in stage:
        raise ValueError(f"--metric (={metric!r}): {file} has {', '.join(stage)}")
    return f"{stage[metric]:.4f}"


def _price(summary: dict[str, Any]) -> list[str]:
    """Parameters, seconds, and the arithmetic of the fold as a multiple of a plain network's; "" where not known."""
    price = summary.get("price", {})
    parameters, seconds = price.get("parameters"), price.get("fit_seconds")
    plain, folded = price.get("macs"), price.get("folded_macs")
    return [
        "" if parameters is None else f"{parameters:,}",
        "" if seconds is None else f"{seconds:.0f} s",
        f"{folded / plain:.2f} x" if plain and folded else "",
    ]
