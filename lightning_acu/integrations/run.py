"""Run a training script as it is, with its models converted and their positions trained.

python -m lightning_acu.integrations.run --positions.warmup_steps 5000 train.py --model resnet50 --epochs 90
torchrun --nproc_per_node 8 -m lightning_acu.integrations.run --config acu.yaml train.py --model resnet50

What comes before the script are options of this program (see ``--help``), what comes after it are arguments of the
script. The models are those that timm's ``create_model`` and torchvision's ``get_model`` make: see :mod:`.watch`.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checks import require_package
from ..surgery import convert_to_acu
from ..training import PositionTrainer
from .watch import ScriptWatch

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the script that ``args`` name (by default those of the command line).

    Raises:
        SystemExit: an unknown option, a value that does not fit, a script that does not exist; or the script's own.
        RuntimeError: the script made no model that could be converted.
    """
    script, arguments, options = _parse(sys.argv[1:] if args is None else args)
    argv, path = sys.argv, sys.path
    with ScriptWatch(**options) as watch:
        sys.argv, sys.path = [script, *arguments], [str(Path(script).resolve().parent), *path]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finally:
            sys.argv, sys.path = argv, path
    watch.check_and_report()


def _parse(args: Sequence[str]) -> tuple[str, list[str], dict[str, Any]]:
    require_package("jsonargparse", "the command line of lightning_acu.integrations.run")
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="python -m lightning_acu.integrations.run", description=__doc__, allow_abbrev=False, exit_on_error=True
    )
    parser.add_argument("-c", "--config", action="config", help="a file in YAML with `convert` and `positions`")
    parser.add_function_arguments(convert_to_acu, "convert", skip={"model", "filter_fn"})
    parser.add_method_arguments(
        PositionTrainer, "__init__", "positions", skip={"optimizer", "model", "copies", "schedulers"}
    )
    parser.add_argument("script", type=str, help="the script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    parsed = parser.parse_args(list(args))
    if not Path(parsed.script).is_file():
        parser.error(f"`{parsed.script}` does not exist or is not a file; options are given before the script")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    made = instantiate(parsed)
    return parsed.script, list(parsed.arguments), {"convert": vars(made.convert), "positions": vars(made.positions)}


if __name__ == "__main__":
    main()
