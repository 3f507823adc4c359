"""``lightning-acu import-caffe``: the authors' released network from its Caffe file, in a file of save_acu."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..conv import acu_layers
from ..models.caffe import import_caffe
from ..saving import save_acu
from ..statistics import layer_statistics
from .errors import Parser

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser("import-caffe", "read the paper's network from a .caffemodel of its authors")
    parser.add_argument("file", type=Path, metavar="FILE", help="such as plain_iter_64000.caffemodel")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside it, ending in .safetensors")
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu import-caffe FILE``."""
    parser = make_parser()
    options = parser.parse_args(words[1:])
    output = options.out or options.file.with_suffix(".safetensors")
    if output.suffix not in (".safetensors", ".pt", ".pth"):
        parser.error(f"--out (={output}) must end in .safetensors, .pt or .pth")
    model = import_caffe(options.file)
    save_acu(model, output)
    moved = ", ".join(f"{name} {layer_statistics(layer).mean_displacement:.2f}" for name, layer in acu_layers(model))
    print(f"{output}: acu_plain; taps moved, in pixels on average: {moved}")
