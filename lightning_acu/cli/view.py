"""``lightning-acu view``: what a run, a checkpoint or a saved model has learned, as one HTML file."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from ..files import write_whole
from ..saving.checkpoint import recorded_images
from ..view import view_run
from .errors import Parser
from .options import add_input_size, add_trust

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser("view", "write an HTML page of the learned shapes, which needs no server and no network")
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="folder of a run, or a model in a file")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: shapes.html in the folder of the source")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    add_input_size(parser)
    add_trust(parser)
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu view RUN_OR_FILE``."""
    options = make_parser().parse_args(words[1:])
    source: Path = options.source
    size = options.input_size
    if size is None and source.is_file():
        size = (recorded_images(source) or {}).get("input_size")
    page = view_run(
        source, input_size=None if size is None else tuple(size), class_path=options.class_path, trust=options.trust
    )
    output = options.output or (source if source.is_dir() else source.parent) / "shapes.html"
    write_whole(output, lambda draft: draft.write_text(page, encoding="utf-8"))
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB); open it in a browser")
    if options.open:
        webbrowser.open(output.resolve().as_uri())
