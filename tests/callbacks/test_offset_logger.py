"""OffsetLogger: scalars to every logger, the figure as a file."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny import TinyModule, fit

from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule


class Recorder(CSVLogger):
    """Notes what it is given; stands for W&B, which takes images by path."""

    def __init__(self, directory):
        super().__init__(directory)
        self.metrics, self.images = [], []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_image(self, key, images, step=None):
        self.images.append((key, images, step))


def test_scalars_at_the_steps_that_are_due_and_at_the_end(tmp_path):
    recorder, model = Recorder(tmp_path / "r"), TinyModule(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    fit(model, [PositionLRSchedule(0.1, 0), OffsetLogger(5)], tmp_path, logger=recorder, max_epochs=2)
    records = {step: metrics for step, metrics in recorder.metrics if "acu/mean_displacement" in metrics}
    assert list(records) == [5, 10, 12]
    last = records[12]
    for name, layer in (("net.0", model.net[0]), ("net.2", model.net[2])):
        distance = layer.offsets.detach().view(9, 2).norm(dim=-1)
        assert last[f"acu/mean_displacement/{name}"] == pytest.approx(distance.sum().item() / 8, rel=1e-5)
        assert last[f"acu/max_displacement/{name}"] == pytest.approx(distance.max().item(), rel=1e-5)
        assert last[f"acu/receptive_radius/{name}"] == pytest.approx(
            layer.positions.norm(dim=-1).max().item(), rel=1e-5
        )
    means = [last["acu/mean_displacement/net.0"], last["acu/mean_displacement/net.2"]]
    assert last["acu/mean_displacement"] == pytest.approx(sum(means) / 2)
    assert last["acu/mean_displacement"] > records[5]["acu/mean_displacement"] > 0


def test_once_a_step_under_accumulation(tmp_path):
    recorder = Recorder(tmp_path / "r")
    fit(TinyModule(), [OffsetLogger(1, figures=False)], tmp_path, logger=recorder, accumulate_grad_batches=3)
    steps = [step for step, metrics in recorder.metrics if "acu/mean_displacement" in metrics]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4]
    assert len(steps) == 5


def test_figure_to_a_file_and_to_loggers_that_take_images(tmp_path):
    recorder = Recorder(tmp_path / "r")
    trainer = fit(TinyModule(), [OffsetLogger()], tmp_path, logger=recorder)
    path = tmp_path / "r" / "lightning_logs" / "version_0" / "shapes.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert recorder.images == [("acu/shapes", [str(path)], trainer.global_step)]


def test_figure_to_tensorboard(tmp_path):
    figures = []

    class Experiment:
        def add_figure(self, tag, figure, step):
            figures.append((tag, len(figure.axes), step))

    class Board(Recorder):
        experiment = Experiment()

        def save(self):
            pass

    fit(TinyModule(), [OffsetLogger()], tmp_path, logger=Board(tmp_path / "b"))
    assert figures == [("acu/shapes", 2, 12)]


def test_without_a_logger_only_the_figure_is_written(tmp_path):
    fit(TinyModule(), [OffsetLogger()], tmp_path)
    assert (tmp_path / "shapes.png").exists()


def test_csv_file_has_the_columns(tmp_path):
    fit(TinyModule(), [OffsetLogger(4)], tmp_path, logger=CSVLogger(tmp_path))
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["acu/max_displacement/net.2"]] == ["4", "8", "12"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`every_n_steps` \(=0\) must be at least 1"):
        OffsetLogger(0)
    with pytest.raises(RuntimeError, match="OffsetLogger: TinyModule has no active convolution"):
        fit(TinyModule(convert=False), [OffsetLogger()], tmp_path)
