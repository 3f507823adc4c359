"""``lightning-acu view``: what a run, a checkpoint or a saved model has learned, as one HTML file."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from ..figures.view import view_run
from ..files import write_whole

__all__ = ["view"]


def view(arguments: Sequence[str]) -> None:
    """``lightning-acu view RUN_OR_FILE [--out FILE] [--open]``."""
    parser = argparse.ArgumentParser(
        "lightning-acu view", description="write an HTML page of the learned shapes; it needs no server and no network"
    )
    parser.add_argument("source", type=Path, help="folder of a run, a checkpoint (.ckpt), or a file of save_acu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: shapes.html beside the source")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument(
        "--input_size", type=int, nargs=3, metavar=("C", "H", "W"), help="of an image (default: its own)"
    )
    parser.add_argument("--class_path", help="the LightningModule's class (default: ImageClassifier)")
    parser.add_argument("--trust", action="store_true", help="let the file run its code; only if you trust it")
    options = parser.parse_args(arguments)
    size = None if options.input_size is None else tuple(options.input_size)
    try:
        page = view_run(options.source, input_size=size, class_path=options.class_path, trust=options.trust)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    folder = options.source if options.source.is_dir() else options.source.parent
    path = options.out or folder / "shapes.html"
    try:
        write_whole(path, lambda draft: draft.write_text(page, encoding="utf-8"))
    except OSError as error:
        parser.error(f"--out {path}: {error}")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    if options.open:
        webbrowser.open(path.resolve().as_uri())
