"""``lightning-acu predict --ckpt FILE IMAGE_OR_FOLDER``; without ``--ckpt``, LightningCLI's predict."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from rich.console import Console
from rich.progress import track
from timm.data import create_transform, resolve_model_data_config  # type: ignore[attr-defined]
from torch import Tensor, nn

from ..choices import did_you_mean
from ..data.image_files import images_below, read_image
from ..saving.checkpoint import load_any, recorded_images
from ..surgery.arithmetic import default_input_size
from .errors import Parser
from .options import add_file, add_input_size
from .predictions import Row, class_probabilities, top_classes, write_predictions

__all__ = ["make_parser", "run"]


def make_parser() -> Parser:
    """The options."""
    parser = Parser(
        "predict",
        "classify image files and write predictions.csv. Without --ckpt this is LightningCLI's command, for the images "
        "of a data module: lightning-acu predict --ckpt_path FILE [--config FILE] [--help]",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="folders with all below them")
    add_file(parser, parser, required=True)
    parser.add_argument(
        "--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default: predictions.csv"
    )
    parser.add_argument("--top_k", type=int, default=1, metavar="K", help="so many classes of each image (default: 1)")
    parser.add_argument("--batch_size", type=int, default=32, metavar="N")
    add_input_size(parser)
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X", help="of each channel in [0, 1] (default: as trained)"
        )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    return parser


def run(words: Sequence[str]) -> None:
    """``lightning-acu predict``."""
    is_ours = any(word.partition("=")[0] == "--ckpt" for word in words) or words[1:] in ([], ["-h"], ["--help"])
    if not is_ours:
        from . import training

        training.run(list(words))
        return
    parser = make_parser()
    options = parser.parse_args(words[1:])
    for name in ("top_k", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} (={getattr(options, name)}) must be at least 1")
    files = list(_files(options.images))
    model = load_any(options.ckpt, options.class_path, trust=options.trust)
    record = recorded_images(options.ckpt) or {}
    transform = _transform(model, record, options)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = list(_predict(model.to(device), files, transform, device, options, record.get("classes")))
    write_predictions(options.output, rows)
    print(f"wrote {options.output}: {len(files)} images")


def _files(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_dir():
            found = images_below(str(path))
            if not found:
                raise FileNotFoundError(f"{path} has no images")
            yield from found
        elif path.is_file():
            yield str(path)
        else:
            beside = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
            raise FileNotFoundError(f"{path} does not exist{did_you_mean(path.name, beside)}")


def _transform(model: nn.Module, record: dict[str, Any], options: Any) -> Callable[[Image], Tensor]:
    """From an RGB image to the input of the model, as in the training that wrote the file where that is known."""
    arguments = dict(record.get("transform") or {})
    if not arguments:
        if record and not (options.mean and options.std):
            raise ValueError(
                f"{options.ckpt} does not say how an image file becomes an input (its data module prepares images in a "
                "way that files cannot follow, such as whitening); give --mean and --std, or use --ckpt_path"
            )
        arguments = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        arguments["input_size"] = record.get("input_size") or default_input_size(model)
    given = {"input_size": options.input_size, "mean": options.mean, "std": options.std}
    arguments |= {name: value for name, value in given.items() if value}
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    channels = arguments["input_size"][0]
    for name in ("mean", "std"):
        if len(arguments[name]) == 3 and channels == 1:  # of colours; a grey image has their average
            arguments[name] = (sum(arguments[name]) / 3,)
        if len(arguments[name]) != channels:
            raise ValueError(f"--{name} (={arguments[name]}) must have a number for each of the {channels} channels")
    if not record:
        shown = (f"--{name} {' '.join(map(str, arguments[name]))}" for name in given)
        print(f"{options.ckpt} does not say how images were prepared; assuming {' '.join(shown)}", file=sys.stderr)
    prepare: Callable[[Image], Tensor] = create_transform(**arguments, is_training=False)
    return (lambda image: prepare(image.convert("L"))) if channels == 1 else prepare


@torch.inference_mode()
def _predict(
    model: nn.Module,
    files: Sequence[str],
    transform: Callable[[Image], Tensor],
    device: torch.device,
    options: Any,
    classes: Sequence[str] | None,
) -> Iterator[Row]:
    starts = range(0, len(files), options.batch_size)
    for start in track(starts, "predicting", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        names = files[start : start + options.batch_size]
        images = torch.stack([transform(read_image(name)) for name in names])
        probabilities = class_probabilities(model(images.to(device)))
        if probabilities is None:
            raise ValueError(f"{options.ckpt}: its model does not give class scores (N, classes)")
        yield from top_classes(names, probabilities.cpu(), options.top_k, classes)
