"""Options that several commands share."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from .errors import Parser, quiet_retries

__all__ = ["add_conversion", "add_file", "add_input_size", "add_trust", "convert", "given_conversion", "named_model"]

_CLASS_PATH = "the LightningModule's class (default: ImageClassifier; with --trust what the checkpoint names)"

_TRUST = (
    "let the file run the code in it and import what it names; only for files whose source you trust "
    "as you trust a program"
)

#: Those of ConvertConfig that a command line has.
_CONVERSION = ("kernel_sizes", "target_modules", "exclude_modules", "position_groups", "preset")


def add_file(parser: Parser, container: Any, *, required: bool = False) -> None:
    """``--ckpt``, in ``container``, and what says how far it is trusted."""
    arguments = {"required": True} if required else {}
    container.add_argument(
        "--ckpt", type=Path, metavar="FILE", help="a model: of save_acu, or a Lightning checkpoint", **arguments
    )
    add_trust(parser)


def add_trust(parser: Parser) -> None:
    """``--class_path`` and ``--trust``: which code a checkpoint may name."""
    parser.add_argument("--class_path", metavar="package.Class", help=_CLASS_PATH)
    parser.add_argument("--trust", action="store_true", help=_TRUST)


def add_input_size(parser: Parser) -> None:
    """``--input_size C H W``."""
    parser.add_argument(
        "--input_size",
        type=int,
        nargs=3,
        metavar=("C", "H", "W"),
        help="of an image (default: that of the training, or timm's, or 224x224)",
    )


def add_conversion(parser: Parser) -> None:
    """The arguments of convert_to_acu."""

    def position_groups(text: str) -> int | str:  # argparse's message has its name
        return text if text == "channels" else int(text)

    group = parser.add_argument_group("conversion", "of --model, as in convert_to_acu")
    group.add_argument("--kernel_sizes", type=int, nargs="+", metavar="K")
    group.add_argument("--target_modules", metavar="REGEX")
    group.add_argument("--exclude_modules", metavar="REGEX")
    group.add_argument("--position_groups", type=position_groups, metavar="P", help="a number, or channels")
    group.add_argument("--preset", help="all, or C23: all but the first stage")
    group.add_argument("--rules", metavar="MODULE", help="import this first: a module that calls register_rule")


def given_conversion(options: argparse.Namespace) -> dict[str, Any]:
    """Those arguments of the conversion that were given."""
    return {name: value for name in _CONVERSION if (value := getattr(options, name)) is not None}


def convert(model: nn.Module, options: argparse.Namespace) -> None:
    """Convert ``model`` as ``options`` say; what has no effect or stays plain is said on stderr."""
    from ..surgery import ConvertConfig, NoEffectWarning

    if options.rules is not None:
        try:
            importlib.import_module(options.rules)
        except ModuleNotFoundError as error:
            raise ValueError(f"--rules (={options.rules!r}) cannot be imported: {error}") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoEffectWarning)
        ConvertConfig(**given_conversion(options)).apply(model)
    for warning in caught:
        print(f"lightning-acu: {warning.message}", file=sys.stderr)


def named_model(name: str, **arguments: Any) -> nn.Module:
    """The model of that name: timm's, or else torchvision's."""
    import timm
    import torchvision

    from ..models import create_model

    if "/" not in name and not timm.is_model(name) and name in torchvision.models.list_models():
        name = f"torchvision/{name}"
    with quiet_retries():
        return create_model(name, **arguments)
