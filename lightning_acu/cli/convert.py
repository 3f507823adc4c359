"""``lightning-acu convert``: a converted model, pretrained or not, in a file of save_acu."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..conv import acu_layers
from ..saving import save_acu
from ..surgery import report_acu
from .errors import Parser
from .options import add_conversion, convert, named_model

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser("convert", "convert a model of timm or torchvision and write it; load_acu(FILE) reads it")
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of timm or torchvision")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="ends in .safetensors or .pt")
    parser.add_argument("--pretrained", action="store_true", help="with published weights (default: random ones)")
    parser.add_argument("--num_classes", type=int, default=1000, metavar="N")
    parser.add_argument("--in_chans", type=int, default=3, metavar="C", help="channels of an image")
    add_conversion(parser)
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu convert --model NAME --out FILE``."""
    parser = make_parser()
    options = parser.parse_args(words[1:])
    if options.out.suffix not in (".safetensors", ".pt", ".pth"):
        parser.error(f"--out (={options.out}) must end in .safetensors, .pt or .pth")
    model = named_model(
        options.model, pretrained=options.pretrained, num_classes=options.num_classes, in_chans=options.in_chans
    )
    convert(model, options)
    if not any(True for _ in acu_layers(model)):
        raise ValueError(f"nothing in {options.model} was converted, so {options.out} is not written")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_acu(model, options.out)
    report = report_acu(model)
    print(
        f"{options.out}: {os.path.getsize(options.out) / 1e6:.1f} MB, {len(report.converted)} of {len(report.rows)} "
        f"convolutions active, {report.added} parameters added"
    )
