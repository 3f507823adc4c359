"""Predictions as a table: predictions.csv, with the most probable classes of each image."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..callbacks._trainer import is_fast_dev_run, run_directory
from ..files import write_whole

__all__ = ["PredictionWriter", "class_probabilities", "top_classes", "write_predictions"]

#: file, rank (1: the most probable), class, probability.
Row = tuple[str, int, str, float]


def class_probabilities(output: Any) -> Tensor | None:
    """(N, classes) from a model's output: as it is if it has probabilities, softmax of scores; None if neither."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2 or not output.is_floating_point():
        return None
    output = output.detach().float()
    are_probabilities = bool((output >= 0).all()) and torch.allclose(output.sum(1), output.new_ones(()), atol=1e-2)
    return output if are_probabilities else output.softmax(1)


def top_classes(
    names: Iterable[str], probabilities: Tensor, top_k: int, classes: Sequence[str] | None
) -> Iterator[Row]:
    """The ``top_k`` most probable classes of each image; their numbers if they have no names."""
    values, indices = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
    for name, own, labels in zip(names, values.tolist(), indices.tolist(), strict=True):
        for rank, (value, label) in enumerate(zip(own, labels, strict=True), start=1):
            yield name, rank, str(label) if classes is None else classes[label], value


def write_predictions(file: Path, rows: Iterable[Row]) -> None:
    """Write predictions.csv, with a line of names above the rows."""

    def write(draft: Path) -> None:
        with draft.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("file", "rank", "class", "probability"))
            writer.writerows((name, rank, label, f"{value:.6f}") for name, rank, label, value in rows)

    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, write)


class PredictionWriter(BasePredictionWriter):
    """Writes what ``trainer.predict`` predicts into the directory of the run.

    Class scores or probabilities (N, classes) become predictions.csv; anything else is saved as it is, a list of
    batches for ``torch.load``, in predictions.pt.

    Args:
        top_k: how many classes of each image are written.
    """

    def __init__(self, top_k: int) -> None:
        super().__init__("batch")
        self.top_k = top_k
        self._rows: dict[tuple[int, int], list[Row]] = {}  # by loader and number of the image
        self._others: list[Any] = []

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the most probable classes of a batch."""
        probabilities = class_probabilities(prediction)
        if probabilities is None:
            self._others.append(move_data_to_device(prediction, torch.device("cpu")))
            return
        numbers = batch_indices or range(len(self._rows), len(self._rows) + len(probabilities))
        loaders: Any = trainer.predict_dataloaders
        loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
        classes = getattr(trainer.datamodule, "class_names", None)  # type: ignore[attr-defined]
        for number, own in zip(numbers, probabilities.cpu(), strict=True):
            name = _file_of(loader.dataset, number)
            self._rows[dataloader_idx, number] = list(top_classes([name], own[None], self.top_k, classes))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files, those of all processes together."""
        if is_fast_dev_run(trainer):
            return
        directory = run_directory(trainer)
        rows = self._rows
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = {key: value for part in parts for key, value in part.items()}
        if self._others:
            file = directory / (
                "predictions.pt" if trainer.world_size == 1 else f"predictions_{trainer.global_rank}.pt"
            )
            write_whole(file, lambda draft: torch.save(self._others, draft))
            print(f"wrote {file}: what {type(pl_module).__name__} predicts is not (N, classes), so there is no table")
        elif trainer.is_global_zero:
            file = directory / "predictions.csv"
            write_predictions(file, (row for _, own in sorted(rows.items()) for row in own))
            print(f"wrote {file}: {len(rows)} images")


def _file_of(dataset: Dataset[Any], number: int) -> str:
    """The file of an image in a torchvision dataset of files, also in a part of one; else its number."""
    whole, index = dataset, number
    while isinstance(whole, Subset):
        index = whole.indices[index]
        whole = whole.dataset
    samples = getattr(whole, "samples", None)
    return str(samples[index][0]) if isinstance(samples, list) else str(number)
