"""One run: a row with one seed, trained, resumed where it was stopped, tested on all test images.

OUT/ROW/seedN/ holds
    state.pt         model, optimizer and step, to go on from
    branch_N.pt      the same after step N, for the rows that branch off there
    result.json      of the finished run
    answers.npz      for each test image whether the network is right
    positions.pt     of the finished network: taps (y, x) in pixels by layer
    lock             held while a process works here
"""

from __future__ import annotations

import fcntl
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from lightning_acu import acu_layers, report_acu
from lightning_acu.files import write_whole
from lightning_acu.statistics import layer_statistics
from lightning_acu.training import PositionTrainer, compute_as_plain

from .batches import Images
from .networks import network
from .rows import ROWS, Row

__all__ = ["Settings", "finished", "ready", "run"]

#: Seconds between two saved states.
_SAVE_EVERY = 60.0


class Settings(NamedTuple):
    """What all runs have in common.

    ``width`` of the network as a fraction of the paper's; ``steps``; ``batch_size``; ``lr`` at first, which falls along
    a half cosine; ``pixels``: learning rate of positions at first, in pixels a step.
    """

    width: float
    steps: int
    batch_size: int
    lr: float
    pixels: float


#: Fractions of the steps: in which weights warm up, and after which positions learn.
_WEIGHTS_WARM_UP, _POSITIONS_WARM_UP = 1 / 30, 0.1


def finished(folder: Path, row: str, seed: int) -> bool:
    """Whether the run has its results."""
    return (folder / row / f"seed{seed}" / "result.json").exists()


def ready(folder: Path, row: Row, seed: int) -> bool:
    """Whether what ``row`` needs is there."""
    return all(finished(folder, name, seed) for name in row.needs)


def run(row: Row, seed: int, folder: Path, settings: Settings, images: Images, say: Callable[[str], None]) -> bool:
    """Train and test what is missing of the run; False where another process is at it.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    place = folder / row.name / f"seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    with _only_one(place) as alone:
        if alone and not finished(folder, row.name, seed):
            _Run(row, seed, folder, settings, images).finish(say)
        return alone


@contextmanager
def _only_one(place: Path) -> Iterator[bool]:
    with (place / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class _Run:
    """The network, its optimizer and how far it is."""

    def __init__(self, row: Row, seed: int, folder: Path, settings: Settings, images: Images) -> None:
        self.row, self.seed, self.settings, self.images = row, seed, settings, images
        self.folder, self.place = folder, folder / row.name / f"seed{seed}"
        self.steps = round(row.longer * settings.steps)
        self.step, self.seconds = 0, 0.0
        self.model = network(row, seed, folder, settings.width).to(memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=1e-4, nesterov=True
        )
        self.positions = None
        if row.groups:
            self.positions = PositionTrainer(
                self.optimizer,
                self.model,
                multiplier=settings.pixels / settings.lr,
                warmup_steps=round(_POSITIONS_WARM_UP * self.steps),
                total_steps=self.steps,
                round_to="dilation" if row.change == "dilation" else "pixels",
                fold_after_rounding=row.change == "dilation",
            )
        self._load()

    def _load(self) -> None:
        state, own = None, self.place / "state.pt"
        if own.exists():
            state = torch.load(own, weights_only=True)
            if state["settings"] != list(self.settings):
                raise ValueError(
                    f"{self.place} holds a run with other settings ({state['settings']}, not {list(self.settings)}): "
                    "use these, or choose another --out"
                )
        elif self.row.source is not None:
            source = self.folder / self.row.source / f"seed{self.seed}"
            state = torch.load(source / f"branch_{round(self.row.at * self.steps)}.pt", weights_only=True)
            state["seconds"] = 0.0
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        self._change()

    def _change(self) -> None:
        """Do what the row does where it branches off; nothing more if that was done before."""
        if self.positions is None or self.row.change is None or self.positions.rounded:
            return
        if self.row.change in ("pixels", "dilation"):
            with warnings.catch_warnings():  # that the plain grid was found is a result here, and is written
                warnings.filterwarnings("ignore", "after rounding all taps are where they started")
                self.positions.round_and_freeze()
            return
        for _, layer in acu_layers(self.model):
            layer.offsets.requires_grad_(False)
            if self.row.change == "grid":
                layer.offsets.zero_()
        if self.row.change == "grid":
            compute_as_plain(acu_layers(self.model))

    def finish(self, say: Callable[[str], None]) -> None:
        """Train to the end, test, and write the results."""
        branches = {round(row.at * self.steps) for row in ROWS.values() if row.source == self.row.name}
        saved = time.monotonic()
        while self.step < self.steps:
            self._train_step()
            if self.step in branches:
                self._save(f"branch_{self.step}.pt")
            if time.monotonic() - saved > _SAVE_EVERY:
                self._save("state.pt")
                saved = time.monotonic()
                say(f"step {self.step:,} of {self.steps:,}")
        self._write()

    def _train_step(self) -> None:
        began = time.process_time()
        warm_up = min(1.0, (self.step + 1) / (_WEIGHTS_WARM_UP * self.steps))
        # The group of the weights; PositionTrainer sets that of the positions by it.
        self.optimizer.param_groups[0]["lr"] = (
            self.settings.lr * warm_up * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        )
        images, labels = self.images.batch(self.seed, self.step, self.settings.batch_size)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(images), labels).backward()
        if self.row.walk:
            self._random_directions()
        self.optimizer.step()
        self.step += 1
        self.seconds += time.process_time() - began

    def _random_directions(self) -> None:
        """In place of gradients of positions; PositionTrainer makes both of length 1."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        for _, layer in acu_layers(self.model):
            assert layer.offsets.grad is not None
            moves = layer.offsets.grad != 0
            layer.offsets.grad.copy_(torch.randn(layer.offsets.shape, generator=random)).mul_(moves)

    def _save(self, name: str) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": list(self.settings),
        }
        write_whole(self.place / name, lambda path: torch.save(state, path))

    @torch.no_grad()
    def _write(self) -> None:
        self.model.eval()
        pieces = self.images.test.split(500)
        answers = torch.cat([self.model(piece.contiguous(memory_format=torch.channels_last)) for piece in pieces])
        right = (answers.argmax(1) == self.images.test_labels).numpy()
        layers = list(acu_layers(self.model))
        report = report_acu(self.model, input_size=(3, self.images.size, self.images.size))
        result: dict[str, Any] = {
            "row": self.row.name,
            "seed": self.seed,
            **self.settings._asdict(),
            "own_steps": self.steps - round(self.row.at * self.steps),
            "error": round(100 * (1 - right.mean()), 2),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "macs": report.macs,
            "cpu_minutes": round(self.seconds / 60, 4),
            "displacement": {name: round(layer_statistics(layer).mean_displacement, 3) for name, layer in layers},
            "dilations": report.dilations,
            "torch": torch.__version__,
        }
        np.savez_compressed(self.place / "answers.npz", right=right)
        torch.save({name: layer.positions for name, layer in layers}, self.place / "positions.pt")
        write_whole(self.place / "result.json", lambda path: path.write_text(json.dumps(result, indent=1)))
        (self.place / "state.pt").unlink(missing_ok=True)
