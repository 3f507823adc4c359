"""``lightning-acu report``: what a conversion makes active, its arithmetic, and a picture of the shapes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from torch import nn

from ..conv import acu_layers
from ..figures import plot_shapes
from ..files import write_whole
from ..saving.checkpoint import load_any, recorded_images
from ..surgery import ACUReport, report_acu
from ..surgery.arithmetic import default_input_size
from .errors import Parser
from .options import add_conversion, add_file, add_input_size, convert, given_conversion, named_model

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        "report", "which convolutions a conversion makes active, why not the others, and the arithmetic of its fold"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="a model of timm or torchvision, with random weights")
    add_file(parser, what)
    add_input_size(parser)
    add_conversion(parser)
    parser.add_argument("--every", action="store_true", help="one row for each skipped layer")
    parser.add_argument("--forms", action="store_true", help="estimate which form of each fold is cheapest")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the shapes: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print the rows and totals as JSON, for programs")
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu report --model NAME`` or ``--ckpt FILE``."""
    parser = make_parser()
    options = parser.parse_args(words[1:])
    given = given_conversion(options)
    if given and options.ckpt is not None:
        parser.error(f"--{next(iter(given))} says how to convert a --model; a --ckpt is converted already")
    if options.figure is not None and options.figure.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--figure (={options.figure}) must end in .png, .svg or .pdf")
    size = options.input_size
    if options.ckpt is not None:
        model = load_any(options.ckpt, options.class_path, trust=options.trust)
        size = size or (recorded_images(options.ckpt) or {}).get("input_size")
    else:
        model = named_model(options.model)
        convert(model, options)
    report = report_acu(model, tuple(size), forms=options.forms) if size else _report_at_its_size(model, options.forms)
    if options.json:
        print(json.dumps(_as_dict(report), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(report.table(every=options.every))
    if options.figure is not None:
        _draw(model, options.figure)


def _report_at_its_size(model: nn.Module, forms: bool) -> ACUReport:
    """At the default size; without the arithmetic, which it says, if the model takes something other than one image."""
    try:
        return report_acu(model, default_input_size(model), forms=forms)
    except ValueError as error:
        print(f"the arithmetic of the whole model is left out: {error}", file=sys.stderr)
        return report_acu(model)


def _as_dict(report: ACUReport) -> dict[str, object]:
    totals = {name: getattr(report, name) for name in ("added", "macs", "folded_macs", "fractional_fold_macs")}
    return {
        "model": report.model,
        "input_size": report.input_size,
        **totals,
        "dilations": dict(report.dilations),
        "convolutions": [asdict(row) for row in report.rows],
    }


def _draw(model: nn.Module, file: Path) -> None:
    if not any(True for _ in acu_layers(model)):
        raise ValueError(f"--figure (={file}): the model has no active convolution, so there are no shapes to draw")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, plot_shapes(model, title=type(model).__name__).savefig)
    print(f"the shapes: {file}", file=sys.stderr)
