"""fit, validate, test and predict: LightningCLI, and what this package adds to it."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..callbacks import RoundThenFinetune, evaluate_stages
from ..callbacks._trainer import callbacks_of, is_fast_dev_run, run_directory, save_whole_checkpoint
from ..classifier import ImageClassifier  # noqa: F401  # LightningCLI knows classes by their names once imported
from ..data import ImageDataModule
from ..files import write_whole
from ..statistics import model_statistics
from ..surgery import report_acu
from .config_files import ConfigFile
from .errors import UsageError, quiet_retries
from .misspelt import explain
from .predictions import PredictionWriter
from .run_files import with_saved_configuration

__all__ = ["ACULightningCLI", "run", "run_lightning"]


#: A mistyped option is an error, and never taken for the option that it abbreviates.
_EXACT: dict[str, Any] = {"allow_abbrev": False}

#: The loader that each command needs.
_LOADERS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}

_DISPLACEMENTS = ("mean_displacement", "max_displacement")


def _is_wanted(record: logging.LogRecord) -> bool:
    """Not Lightning's advertisements, nor that there is no TPU."""
    return "Tip: For seamless" not in record.getMessage() and "TPU available: False" not in record.getMessage()


class _Parser(LightningArgumentParser):
    """LightningCLI's, whose errors are a few lines that name the nearest option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UsageError, which ends the command with 2."""
        if not self.exit_on_error:  # jsonargparse tries something else then
            super().error(message, ex)
        parsers = [self, *(p for a in self._actions if isinstance(a.choices, dict) for p in a.choices.values())]
        options = [option for parser in parsers for action in parser._actions for option in action.option_strings]
        raise UsageError(explain(message, options)) from ex


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
        handlers = [h for name in ("lightning.pytorch", "lightning.fabric") for h in logging.getLogger(name).handlers]
        with warnings.catch_warnings(), ExitStack() as stack:  # what is ignored here is ignored until the command ends
            stack.enter_context(quiet_retries())
            for handler in handlers:
                handler.addFilter(_is_wanted)
                stack.callback(handler.removeFilter, _is_wanted)
            # Lightning's own use of torch and jsonargparse, once a loader: nothing that a user could change.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            super().__init__(*args, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """LightningCLI's, without its warning about ``args`` beside those of the command line."""
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args)

    def after_instantiate_classes(self) -> None:
        """Check that there are data. No advice to load images in worker processes that are in memory already."""
        loader = f"{_LOADERS[str(self.subcommand)]}_dataloader"
        if self.datamodule is None and not is_overridden(loader, self.model):
            raise UsageError(
                f"there are no data: {type(self.model).__name__} has no `{loader}`; give --data, such as\n"
                "--data=ImageFolderDataModule --data.root=FOLDER (FOLDER/train/CLASS/*.jpg, FOLDER/val/CLASS/*.jpg)\n"
                "or, to try something out, --data=DigitsDataModule"
            )
        if isinstance(self.datamodule, ImageDataModule) and not self.datamodule.needs_workers:
            warnings.filterwarnings("ignore", ".*does not have many workers which may be a bottleneck")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """LightningCLI's, with a ``--config`` that knows ``base``."""
        kwargs.setdefault("dump_header", [f"lightning.pytorch=={pl.__version__}"])  # type: ignore[attr-defined]
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=ConfigFile, help="Path to a configuration file in YAML.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Two arguments more than LightningCLI."""
        parser.add_argument(
            "--top_k", type=PositiveInt, default=1, help="how many classes of each image predict writes"
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="test the models of this fit, as a table"
        )

    def _parse_ckpt_path(self) -> None:
        """Nothing: see above."""

    def before_fit(self) -> None:
        """Start the clock."""
        self._began = time.monotonic()

    def after_fit(self) -> None:
        """Test the models of this fit, with ``--test_after_fit true``."""
        seconds = time.monotonic() - self._began
        if self.config["fit"]["test_after_fit"] and not is_fast_dev_run(self.trainer):
            directory = run_directory(self.trainer)
            save_whole_checkpoint(self.trainer, directory / "final.ckpt")
            stages = evaluate_stages(self.trainer, self.model, self._rounding, datamodule=self.datamodule)
            self._summarize(directory, stages, seconds)

    def before_predict(self) -> None:
        """Write what is predicted, and do not keep it."""
        config = self.config_init["predict"]
        config["return_predictions"] = False
        callbacks_of(self.trainer).append(PredictionWriter(config["top_k"]))

    @property
    def _rounding(self) -> RoundThenFinetune | None:
        """The callback that rounded during this fit, if there is one."""
        callbacks = callbacks_of(self.trainer)
        return next((c for c in callbacks if isinstance(c, RoundThenFinetune) and c.rounded_at is not None), None)

    @rank_zero_only
    def _summarize(self, directory: Path, tests: dict[str, dict[str, float]], seconds: float) -> None:
        layers = model_statistics(self.model)
        learned = self._rounding.learned if self._rounding is not None else layers
        summary = {
            "test": tests,
            "learned": {name: vars(row) for name, row in learned.items()},
            "final": {name: vars(row) for name, row in layers.items()},
            "price": self._price(seconds),
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

    def _price(self, seconds: float) -> dict[str, float | None]:
        """Parameters, seconds of the fit, and the arithmetic of an image: plain and folded, None where not known."""
        example = getattr(self.model, "example_input_array", None)
        macs = folded = None
        if isinstance(example, Tensor) and example.ndim == 4:
            _, channels, height, width = example.shape
            report = report_acu(self.model, (channels, height, width))
            macs, folded = report.macs, report.folded_macs
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "fit_seconds": round(seconds, 1),
            "macs": macs,
            "folded_macs": folded,
        }


def run(words: list[str]) -> None:
    """``lightning-acu fit``, ``validate``, ``test`` and ``predict``."""
    run_lightning(with_saved_configuration(words))


def run_lightning(args: ArgsType, cli: type[LightningCLI] | None = None) -> None:
    """LightningCLI (or a subclass ``cli`` of ACULightningCLI) with ``args``."""
    (cli or ACULightningCLI)(
        pl.LightningModule,
        None,  # so that the data are not required: a LightningModule may have its own loaders
        subclass_mode_model=True,
        seed_everything_default=0,
        parser_class=_Parser,
        parser_kwargs=dict.fromkeys(("fit", "validate", "test", "predict"), _EXACT) | _EXACT,
        args=args,
    )
