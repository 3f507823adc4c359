"""``lightning-acu export``: fold a trained model, write it for other runtimes, and check the file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..export import FORMATS, export_model
from ..forms import FORMS
from ..saving.checkpoint import load_any, recorded_images
from ..surgery.arithmetic import default_input_size
from .errors import Parser
from .options import add_file, add_input_size

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        "export", "fold a trained model into plain convolutions, write it for other runtimes, and check the file"
    )
    add_file(parser, parser, required=True)
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: next to the checkpoint, with this suffix")
    add_input_size(parser)
    parser.add_argument("--no_fold", action="store_true", help="keep active convolutions (pt2 only)")
    parser.add_argument(
        "--form", choices=FORMS, default="auto", help="of the fold (default: what a rule expects to be fastest)"
    )
    parser.add_argument("--dynamic_size", action="store_true", help="leave height and width open")
    parser.add_argument("--one_image", action="store_true", help="fix the batch size to 1")
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu export --ckpt FILE --to onnx|pt2|torchscript``."""
    parser = make_parser()
    options = parser.parse_args(words[1:])
    output = options.output or options.ckpt.with_suffix(f".{options.to}")
    if output.suffix != f".{options.to}":
        parser.error(f"--output {output} must end in .{options.to}")
    model = load_any(options.ckpt, options.class_path, trust=options.trust)
    size = options.input_size or (recorded_images(options.ckpt) or {}).get("input_size")
    worst = export_model(
        model,
        output,
        to=options.to,
        input_size=tuple(size or default_input_size(model)),
        fold=not options.no_fold,
        form=options.form,
        dynamic_batch=not options.one_image,
        dynamic_size=options.dynamic_size,
    )
    if not size:
        size = default_input_size(model)
        print(f"assuming images of {'x'.join(map(str, size))}; pass --input_size C H W otherwise", file=sys.stderr)
    axes = ["1" if options.one_image else "N", *(("C", "H", "W") if options.dynamic_size else map(str, size))]
    axes[1] = str(size[0])
    print(
        f"{output}: {os.path.getsize(output) / 1e6:.1f} MB, images ({', '.join(axes)}); "
        f"differs from the model by {worst:.1e} of the largest value"
    )
