"""The console script ``lightning-acu``: LightningCLI for this package, and the commands beside it.

lightning-acu fit --config quickstart.yaml            train (also: validate, test, predict)
lightning-acu configs                                 list the configurations that come with the package
lightning-acu configs quickstart.yaml                 copy one to the current directory
lightning-acu report --model resnet50                 what a conversion makes active, and the arithmetic of its fold
lightning-acu export --ckpt final.ckpt --to onnx      fold a trained model and write it for other runtimes
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from ..callbacks import RoundThenFinetune, evaluate_stages
from ..callbacks._trainer import callbacks_of, is_fast_dev_run, run_directory, save_whole_checkpoint
from ..data import ImageDataModule
from ..files import write_whole
from ..statistics import model_statistics
from .commands import COMMANDS
from .config_files import ConfigFile

__all__ = ["ACULightningCLI", "main"]


#: A mistyped option is an error, and never taken for the option that it abbreviates.
_EXACT: dict[str, Any] = {"allow_abbrev": False}

_DISPLACEMENTS = ("mean_displacement", "max_displacement")


class ACULightningCLI(LightningCLI):
    """LightningCLI for any LightningModule and LightningDataModule, named in the configuration by class path.

    With ``--test_after_fit true``, ``fit`` ends with a test of the final model (and of the model just before and after
    rounding, if a RoundThenFinetune callback kept them), prints a table and writes ``summary.json`` to the log
    directory. The test images are not used before that (but an ImageFolderDataModule without a ``test`` folder tests on
    the validation images).

    With ``--ckpt_path``, the configuration says what the model is and the checkpoint brings its state: LightningCLI's
    own way, hyperparameters of the checkpoint over those of the command line, would drop what is said there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # what is ignored here is ignored until the command ends
            # Lightning's own use of torch and jsonargparse, once a loader: nothing that a user could change.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            super().__init__(*args, **kwargs)

    def after_instantiate_classes(self) -> None:
        """No advice to load images in worker processes that are in memory already."""
        if isinstance(self.datamodule, ImageDataModule) and not self.datamodule.needs_workers:
            warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's, with a ``--config`` that knows ``base``."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])  # type: ignore[attr-defined]
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="Path to a configuration file in YAML.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One argument more than LightningCLI."""
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="test the models of this fit, as a table"
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: see above."""

    def after_fit(self) -> None:
        """Test the models of this fit, with ``--test_after_fit true``."""
        if self.config["fit"]["test_after_fit"] and not is_fast_dev_run(self.trainer):
            directory = run_directory(self.trainer)
            save_whole_checkpoint(self.trainer, directory / "final.ckpt")
            stages = evaluate_stages(self.trainer, self.model, self._rounding, datamodule=self.datamodule)
            self._summarize(directory, stages)

    @property
    def _rounding(self) -> RoundThenFinetune | None:
        """The callback that rounded during this fit, if there is one."""
        callbacks = callbacks_of(self.trainer)
        return next((c for c in callbacks if isinstance(c, RoundThenFinetune) and c.rounded_at is not None), None)

    @rank_zero_only
    def _summarize(self, directory: Path, tests: dict[str, dict[str, float]]) -> None:
        layers = model_statistics(self.model)
        learned = self._rounding.learned if self._rounding is not None else layers
        summary = {
            "test": tests,
            "learned": {name: vars(row) for name, row in learned.items()},
            "final": {name: vars(row) for name, row in layers.items()},
        }
        text = json.dumps(summary, indent=2) + "\n"
        write_whole(directory / "summary.json", lambda draft: draft.write_text(text))

        console = Console(width=None if sys.stdout.isatty() else 100)
        names = list(next(iter(tests.values())))
        results = Table("model", *names, title="on the test images")
        for stage, metrics in tests.items():
            results.add_row(stage, *(f"{metrics[name]:.4f}" for name in names))
        console.print(results)
        if layers:
            moved = Table("layer", "learned: mean", "max", "final: mean", "max", title="how far taps moved, in pixels")
            for name, row in layers.items():
                numbers = [getattr(of, kind) for of in (learned[name], row) for kind in _DISPLACEMENTS]
                moved.add_row(name, *(f"{number:.2f}" for number in numbers))
            console.print(moved)
        console.print(f"In {directory}: {', '.join(sorted(path.name for path in directory.iterdir()))}")


def main(args: ArgsType = None) -> None:
    """Run ``lightning-acu`` with ``args`` (default: those of the command line)."""
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list) and given and given[0] in COMMANDS:
        COMMANDS[given[0]](given[1:])
        return
    ACULightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        parser_kwargs=dict.fromkeys(("fit", "validate", "test", "predict"), _EXACT) | _EXACT,
        args=args,
    )
