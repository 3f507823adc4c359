"""Directories that cannot be written to, and disks that are full."""

import os
import shutil
import warnings
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from helpers.tiny import Spy, TinyModule, fit
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from PIL import Image

from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune

FULL = OSError(28, "No space left on device")


@pytest.fixture
def unwritable(tmp_path):
    """A path that cannot become a folder, for any user."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "runs"


@pytest.mark.parametrize(
    "callback", [lambda: RoundThenFinetune(at_step=9), lambda: OffsetLogger(5), lambda: OffsetLogger(5, figures=False)]
)
def test_a_directory_that_cannot_be_written_to_is_an_error_before_training(unwritable, callback):
    spy, callback = Spy(), callback()
    with pytest.raises(RuntimeError, match=r"cannot write files to this run's directory '.*runs' \(NotADirectoryError"):
        fit(TinyModule(), [callback, spy], unwritable)
    assert spy.offsets == []


def test_nothing_is_asked_of_the_directory_where_nothing_is_written(unwritable):
    callbacks = [
        PositionLRSchedule(3.0, 1), RoundThenFinetune(at_step=9, keep=False), OffsetLogger(5, False, False)
    ]  # fmt: skip
    fit(TinyModule(), callbacks, unwritable)


def test_a_full_disk_is_noticed_before_training_too(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise FULL

    monkeypatch.setattr(os, "fsync", fsync)
    spy = Spy()
    with pytest.raises(RuntimeError, match=r"RoundThenFinetune cannot write files .*No space left on device"):
        fit(TinyModule(), [RoundThenFinetune(at_step=9), spy], tmp_path)
    assert spy.offsets == []


def fails(method):
    """``method`` writes the first bytes of its file and then finds the disk full."""

    def failing(self, path, *arguments, **keywords):
        Path(path).write_bytes(b"half")
        raise FULL

    return failing


def test_pictures_that_cannot_be_written_are_said_and_all_else_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails(matplotlib.figure.Figure.savefig))
    monkeypatch.setattr(Image.Image, "save", fails(Image.Image.save))
    model, rounding = TinyModule(), RoundThenFinetune(at_step=9)
    callbacks = [OffsetLogger(5), PositionLRSchedule(3.0, 1), rounding]
    logger = CSVLogger(tmp_path, name="", version="")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(model, callbacks, tmp_path, logger=logger)
    said = " ".join(str(warning.message) for warning in caught)
    for name in ("shapes_before_rounding.png", "shapes.png", "shapes.gif"):
        assert f"{tmp_path / name} could not be written (OSError: [Errno 28] No space left on device)" in said
    assert trainer.global_step == 12
    assert torch.equal(model.offsets, model.offsets.round())
    assert {path.name for path in tmp_path.iterdir()} == {
        "before_rounding.ckpt", "rounded.ckpt", "metrics.csv", "shapes.html"
    }  # fmt: skip


def test_a_checkpoint_that_cannot_be_written_ends_no_training(tmp_path, monkeypatch):
    save = Strategy.save_checkpoint

    def save_checkpoint(self, checkpoint, path, *arguments, **keywords):
        if path.name == "before_rounding.ckpt":
            raise FULL
        save(self, checkpoint, path, *arguments, **keywords)

    monkeypatch.setattr(Strategy, "save_checkpoint", save_checkpoint)
    model, rounding = TinyModule(), RoundThenFinetune(at_step=9)
    with pytest.warns(UserWarning, match=r"before_rounding.ckpt could not be written \(OSError: .Errno 28. No space"):
        fit(model, [PositionLRSchedule(3.0, 1), rounding], tmp_path)
    assert list(rounding.checkpoints) == ["rounded"]
    assert torch.equal(model.offsets, model.offsets.round())


@pytest.mark.parametrize("name", ["before_rounding.ckpt", "rounded.ckpt"])
def test_a_checkpoint_whose_writing_is_interrupted_is_not_there_in_part(tmp_path, monkeypatch, name):
    """As when Lightning copies it from a folder for temporary files on another disk."""

    def move(source, target):
        if Path(target).name != name:
            return shutil.copyfile(source, target)
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("fsspec.implementations.local.shutil.move", move)
    with pytest.raises(SystemExit):
        fit(TinyModule(), [PositionLRSchedule(3.0, 1), RoundThenFinetune(at_step=9)], tmp_path)
    assert not (tmp_path / name).exists()
    for path in tmp_path.rglob("*.ckpt"):
        torch.load(path, weights_only=True)


def test_a_film_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    fit(TinyModule(), [OffsetLogger(5, figures=False)], tmp_path)
    before = (tmp_path / "shapes.gif").read_bytes()
    monkeypatch.setattr(Image.Image, "save", fails(Image.Image.save))
    with pytest.warns(UserWarning, match="shapes.gif could not be written"):
        fit(TinyModule(), [OffsetLogger(2, figures=False)], tmp_path)
    assert (tmp_path / "shapes.gif").read_bytes() == before
