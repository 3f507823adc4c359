"""What callbacks ask of a trainer: its callbacks, the layers and averages it trains, the directory of its run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from ..conv import ACUConv2d, check_grids
from ..figures import LayerShape, shapes_of
from ..files import require_writable
from ..training import averaged_models, trained_layers

__all__ = [
    "averages_of",
    "averaging_callbacks",
    "callbacks_of",
    "is_fast_dev_run",
    "require_full_precision",
    "require_grids",
    "require_layers",
    "require_lightning",
    "require_local_directory",
    "require_whole_positions",
    "require_writable_directory",
    "reshard",
    "run_directory",
    "save_whole_checkpoint",
    "swapped_in",
    "trained_shapes",
    "warn_not_written",
]


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The trainer's own list of callbacks."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    return callbacks


def is_fast_dev_run(trainer: pl.Trainer) -> bool:
    """Whether it is a trial of a few steps (``Trainer(fast_dev_run=...)``), which writes no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector


def trained_shapes(module: nn.Module) -> list[LayerShape]:
    """The shapes of :func:`~lightning_acu.training.trained_layers`, for pictures."""
    names = {name for name, _ in trained_layers(module)}
    return [shape for shape in shapes_of(module) if shape.name in names]


def require_layers(callback: pl.Callback, module: pl.LightningModule) -> list[tuple[str, ACUConv2d]]:
    """The active convolutions that are trained.

    Raises:
        RuntimeError: there are none; the message says how to get some.
    """
    layers = trained_layers(module)
    if not layers:
        raise RuntimeError(
            f"{type(callback).__name__}: {type(module).__name__} has no active convolution; call convert_to_acu(model) "
            "in its __init__, add the callback ConvertToACU, or give ImageClassifier a `convert` that matches some"
        )
    return layers


def require_lightning(callback: pl.Callback, module: object) -> None:
    """Check that ``module`` is one of ``lightning``; the classes of ``pytorch_lightning`` are different ones.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(module, pl.LightningModule):
        raise TypeError(
            f"{type(callback).__name__}: {type(module).__name__} is not a lightning.pytorch.LightningModule; write "
            "`import lightning.pytorch as pl`, not `import pytorch_lightning as pl`"
        )


def require_whole_positions(callback: pl.Callback, trainer: pl.Trainer) -> None:
    """Check that the strategy keeps parameters as they are.

    Raises:
        RuntimeError: it flattens them (FSDP1, DeepSpeed).
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy):
        raise RuntimeError(
            f"{type(callback).__name__}: {type(trainer.strategy).__name__} flattens parameters, so that positions and "
            "their gradients cannot be reached; use ModelParallelStrategy with fully_shard (FSDP2), or DDP"
        )


def require_grids(callback: pl.Callback, layers: Iterable[tuple[str, ACUConv2d]]) -> None:
    """Check that all layers have a regular grid, where dilations are to be found.

    Raises:
        RuntimeError: one has a free shape.
    """
    try:
        check_grids(layers)
    except ValueError as error:
        raise RuntimeError(f"{type(callback).__name__}: {error}") from None


def require_full_precision(callback: pl.Callback, module: nn.Module) -> None:
    """Check that FSDP2 leaves positions in float32: 8 or 11 bits are not enough for them.

    Raises:
        RuntimeError: a mixed-precision policy casts them, or they are sharded together with half-precision weights.
    """
    modules = dict(module.named_modules())
    for name, layer in trained_layers(module):
        parents = [name.rsplit(".", count)[0] for count in range(name.count(".") + 1)] + [""]
        state = next((get() for p in parents if (get := getattr(modules[p], "_get_fsdp_state", None))), None)
        if state is None:
            continue
        half = (torch.bfloat16, torch.float16)
        policy = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
        if policy in half:
            raise RuntimeError(
                f"{type(callback).__name__}: the MixedPrecisionPolicy(param_dtype={policy}) of fully_shard would cast "
                f"the positions of {name}, which need float32; leave `mp_policy` out and train with "
                "Trainer(precision='bf16-mixed'), which casts weights and images only"
            )
        if layer.weight.dtype in half:
            raise RuntimeError(
                f"{type(callback).__name__}: FSDP2 cannot shard the {layer.weight.dtype} weights of {name} together "
                "with its positions, which stay in float32; keep the model in float32 and train with "
                "Trainer(precision='bf16-mixed')"
            )


def reshard(module: nn.Module) -> None:
    """Under FSDP2, free parameters gathered for a forward pass, so that changes are made to the shards that stay."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


def averaging_callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    """The callbacks that hold an average of the model; they may swap it in for a validation."""
    return [callback for callback in callbacks_of(trainer) if any(True for _ in _held_averages(callback))]


def averages_of(trainer: pl.Trainer) -> list[nn.Module]:
    """The averages of the model that WeightAveraging, StochasticWeightAveraging and users' own callbacks hold."""
    return [average for callback in callbacks_of(trainer) for average in _held_averages(callback)]


@contextmanager
def swapped_in(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """The model as in a validation: WeightAveraging swaps its average in for the weights."""
    swapping = [callback for callback in averaging_callbacks(trainer) if hasattr(callback, "_swap_models")]
    for callback in swapping:
        callback.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for callback in swapping:
            callback.on_validation_epoch_end(trainer, module)


def run_directory(trainer: pl.Trainer) -> Path:
    """The directory of this run, the same on every process; a collective operation, to be called on all of them.

    The ``log_dir`` of CSVLogger and TensorBoardLogger; for other loggers ``save_dir/name/version``, as in
    ModelCheckpoint (their ``Trainer.log_dir`` is the same for all runs); without a logger the trainer's
    ``default_root_dir``.
    """
    logger = trainer.logger
    path: str | Path | None
    if logger is None:
        path = trainer.default_root_dir
    elif (path := getattr(logger, "log_dir", None)) is None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        path = Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return Path(trainer.strategy.broadcast(path))


def require_local_directory(callback: pl.Callback, trainer: pl.Trainer, remedy: str) -> None:
    """Check that the run's directory is local.

    Raises:
        RuntimeError: it is a URL (of a bucket), where files written with ``open`` would never arrive.
    """
    where = str(getattr(trainer.logger, "save_dir", None) or trainer.default_root_dir)
    if "://" in where:
        raise RuntimeError(
            f"{type(callback).__name__} writes local files, but this run's directory is {where!r}; choose a local "
            f"directory for the logger or the trainer's default_root_dir, or set {remedy}"
        )


def require_writable_directory(callback: pl.Callback, trainer: pl.Trainer, remedy: str) -> None:
    """Check that files can be written to the run's directory; create it where it does not exist.

    Call it when training starts: some loggers have no directory before. A collective operation, to be called on every
    process; all raise the same error.

    Raises:
        RuntimeError: they cannot.
    """
    if is_fast_dev_run(trainer) or trainer.barebones:  # these write no files
        return
    directory, problem = run_directory(trainer), ""
    if trainer.is_global_zero:
        try:
            require_writable(directory)
        except OSError as error:
            problem = f"{type(error).__name__}: {error}"
    if problem := trainer.strategy.broadcast(problem):
        raise RuntimeError(
            f"{type(callback).__name__} cannot write files to this run's directory {str(directory)!r} ({problem}); "
            f"choose another for the logger or the trainer's default_root_dir, or set {remedy}"
        )


def save_whole_checkpoint(trainer: pl.Trainer, path: Path) -> None:
    """Save a checkpoint without the optimizer's state; ``path`` is the old one or the whole new one, never a part.

    Lightning writes it in the folder for temporary files and moves it from there, which copies it where that is on
    another disk: a training that is killed meanwhile leaves a part. A collective operation, to be called on every
    process.

    Raises:
        OSError: on process 0, where it cannot be written.
    """
    folder = path.with_name(f".{path.name}-draft")
    draft = folder / path.name
    try:
        try:
            trainer.save_checkpoint(draft, weights_only=True)
        except OSError:  # of process 0 alone: the others wait for it where saving ends
            trainer.strategy.barrier("Trainer.save_checkpoint")
            raise
        if trainer.is_global_zero:
            if path.is_dir():  # of shards, as the draft is
                shutil.rmtree(path)
            os.replace(draft, path)
    finally:
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
        trainer.strategy.barrier("save_whole_checkpoint")


def warn_not_written(callback: pl.Callback, path: Path, error: OSError) -> None:
    """Say that a file could not be written; the training goes on, because it is worth more than the file."""
    rank_zero_warn(f"{type(callback).__name__}: {path} could not be written ({type(error).__name__}: {error})")


def _held_averages(callback: pl.Callback) -> Iterator[nn.Module]:
    yield from averaged_models(vars(callback).values())
    average = getattr(callback, "_average_model", None)
    if isinstance(average, pl.LightningModule):  # StochasticWeightAveraging's is a plain copy
        yield average
