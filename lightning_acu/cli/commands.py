"""What ``lightning-acu`` does besides LightningCLI: list configurations, report on a model, export one."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm
import torchvision
from rich.console import Console
from torch import nn

from ..export import FORMATS, export_model
from ..files import write_whole
from ..forms import FORMS
from ..models import create_model
from ..saving.checkpoint import load_any
from ..surgery import ACUReport, ConvertConfig, NoEffectWarning, report_acu
from ..surgery.arithmetic import default_input_size
from .config_files import with_bases

__all__ = ["COMMANDS", "configs_directory"]

_CLASS_PATH = "the LightningModule's class (default: ImageClassifier; with --trust what the checkpoint names)"

_TRUST = (
    "let the file run the code in it and import what it names; only for files whose source you trust "
    "as you trust a program"
)


def configs_directory() -> Path:
    """Where the example configurations are: inside an installed package, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.with_name("configs")


def _configs(arguments: Sequence[str]) -> None:
    """``lightning-acu configs [NAME] [--to DIRECTORY]``."""
    parser = argparse.ArgumentParser("lightning-acu configs", description="list the configurations, or copy one")
    parser.add_argument("name", nargs="?", help="name of the one to copy")
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIRECTORY", help="where to copy (default: here)")
    options = parser.parse_args(arguments)
    root = configs_directory()
    paths = sorted(root.rglob("*.yaml"), key=lambda path: (len(path.parts), path))  # folders last
    known = {path.relative_to(root).as_posix(): path for path in paths}
    if options.name is None:
        for name, path in known.items():
            print(f"{name:{max(map(len, known))}}  {path.read_text().splitlines()[0].removeprefix('# ')}")
        return
    name = options.name if options.name.endswith(".yaml") else f"{options.name}.yaml"
    if name not in known:
        parser.error(f"there is no configuration {options.name!r}; choose one of {', '.join(known)}")
    target = options.to / known[name].name
    if _differs(target, known[name]):
        parser.error(f"{target} already exists and differs; remove it or choose another directory with --to")
    sources = with_bases(known[name])  # the bases beside it, where the copy looks for them
    for base in sources[:-1]:
        copy = options.to / base.name
        if _differs(copy, base):
            parser.error(f"{copy} already exists and differs from a base of {name}; choose another directory with --to")
    options.to.mkdir(parents=True, exist_ok=True)
    for source in sources:
        write_whole(options.to / source.name, partial(shutil.copyfile, source))
    print(f"copied to {target}; run: lightning-acu fit --config {target}")


def _differs(copy: Path, source: Path) -> bool:
    """Whether ``copy`` exists and is not a copy of ``source``."""
    return copy.exists() and not (copy.is_file() and copy.read_bytes() == source.read_bytes())


def _report(arguments: Sequence[str]) -> None:
    """``lightning-acu report --model NAME`` or ``--ckpt FILE``."""

    def position_groups(text: str) -> int | str:  # argparse's message has its name
        return text if text == "channels" else int(text)

    parser = argparse.ArgumentParser(
        "lightning-acu report",
        description="which convolutions a conversion makes active, why not the others, and the arithmetic of its fold",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="a model of timm or torchvision, with random weights")
    what.add_argument(
        "--ckpt", type=Path, metavar="FILE", help="a converted model: of save_acu, or a Lightning checkpoint"
    )
    _add_input_size(parser)
    parser.add_argument("--class_path", metavar="package.Class", help=_CLASS_PATH)
    parser.add_argument("--trust", action="store_true", help=_TRUST)
    conversion = parser.add_argument_group("conversion", "of --model, as in convert_to_acu")
    conversion.add_argument("--kernel_sizes", type=int, nargs="+", metavar="K")
    conversion.add_argument("--target_modules", metavar="REGEX")
    conversion.add_argument("--exclude_modules", metavar="REGEX")
    conversion.add_argument("--position_groups", type=position_groups, metavar="P", help="a number, or channels")
    conversion.add_argument("--preset", help="all, or C23: all but the first stage")
    parser.add_argument("--every", action="store_true", help="one row for each skipped layer")
    parser.add_argument("--forms", action="store_true", help="estimate which form of each fold is cheapest")
    options = parser.parse_args(arguments)
    names = ("kernel_sizes", "target_modules", "exclude_modules", "position_groups", "preset")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if given and options.ckpt is not None:
        parser.error(f"--{next(iter(given))} says how to convert a --model; a --ckpt is converted already")
    try:
        if options.ckpt is not None:
            model = load_any(options.ckpt, options.class_path, trust=options.trust)
        else:
            model = _create(options.model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", NoEffectWarning)
                ConvertConfig(**given).apply(model)
            for warning in caught:
                print(f"lightning-acu report: {warning.message}", file=sys.stderr)
        size = tuple(options.input_size) if options.input_size else None
        report = report_acu(model, size, forms=options.forms) if size else _report_at_its_size(model, options.forms)
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        parser.exit(2, f"lightning-acu report: {error}\n")
    Console(width=None if sys.stdout.isatty() else 140).print(report.table(every=options.every))


def _export(arguments: Sequence[str]) -> None:
    """``lightning-acu export --ckpt FILE --to onnx|pt2|torchscript``."""
    parser = argparse.ArgumentParser(
        "lightning-acu export",
        description="fold a trained model into plain convolutions, write it for other runtimes, and check the file",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ckpt", type=Path, required=True, metavar="FILE", help="of save_acu, or a Lightning checkpoint"
    )
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: next to the checkpoint, with this suffix")
    parser.add_argument("--class_path", metavar="package.Class", help=_CLASS_PATH)
    parser.add_argument("--trust", action="store_true", help=_TRUST)
    _add_input_size(parser)
    parser.add_argument("--no_fold", action="store_true", help="keep active convolutions (pt2 only)")
    parser.add_argument(
        "--form", choices=FORMS, default="auto", help="of the fold (default: what a rule expects to be fastest)"
    )
    parser.add_argument("--dynamic_size", action="store_true", help="leave height and width open")
    parser.add_argument("--one_image", action="store_true", help="fix the batch size to 1")
    options = parser.parse_args(arguments)
    output = options.output or options.ckpt.with_suffix(f".{options.to}")
    if output.suffix != f".{options.to}":
        parser.error(f"--output {output} must end in .{options.to}")
    try:
        model = load_any(options.ckpt, options.class_path, trust=options.trust)
        size = tuple(options.input_size) if options.input_size else default_input_size(model)
        worst = export_model(
            model,
            output,
            to=options.to,
            input_size=size,  # type: ignore[arg-type]
            fold=not options.no_fold,
            form=options.form,
            dynamic_batch=not options.one_image,
            dynamic_size=options.dynamic_size,
        )
    except (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"lightning-acu export: {error}\n")
    if not options.input_size:
        print(
            f"assuming images of {'x'.join(map(str, size))}; pass --input_size C H W otherwise",
            file=sys.stderr,
        )
    axes = ["1" if options.one_image else "N", *(("C", "H", "W") if options.dynamic_size else map(str, size))]
    axes[1] = str(size[0])
    print(
        f"{output}: {os.path.getsize(output) / 1e6:.1f} MB, images ({', '.join(axes)}); "
        f"differs from the model by {worst:.1e} of the largest value"
    )


def _add_input_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input_size",
        type=int,
        nargs=3,
        metavar=("C", "H", "W"),
        help="of an image (default: timm's, or 224x224)",
    )


def _create(name: str) -> nn.Module:
    """The model of that name: timm's, or else torchvision's."""
    if "/" not in name and not timm.is_model(name) and name in torchvision.models.list_models():
        name = f"torchvision/{name}"
    return create_model(name)


def _report_at_its_size(model: nn.Module, forms: bool) -> ACUReport:
    """At the default size; without the arithmetic, which it says, if the model takes something other than one image."""
    try:
        return report_acu(model, default_input_size(model), forms=forms)
    except ValueError as error:
        print(f"the arithmetic of the whole model is left out: {error}", file=sys.stderr)
        return report_acu(model)


#: By the first word after ``lightning-acu``.
COMMANDS = {"configs": _configs, "report": _report, "export": _export}
