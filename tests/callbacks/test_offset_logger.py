"""OffsetLogger: scalars to every logger, the figure as a file."""

import csv
import itertools

import pytest
import torch
from helpers.tiny import ManualModule, Spy, TinyModule, fit
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule

pytestmark = pytest.mark.slow


class Recorder(CSVLogger):
    """Notes what it is given; stands for W&B, which takes images by path."""

    def __init__(self, directory):
        super().__init__(directory)
        self.metrics, self.images, self.videos = [], [], []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_image(self, key, images, step=None):
        self.images.append((key, images, step))

    def log_video(self, key, videos, step=None, format=None):
        self.videos.append((key, videos, step, format))


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
    for kind, over_all in (("mean_displacement", mean), ("max_displacement", max), ("receptive_radius", mean)):
        per_layer = [last[f"acu/{kind}/net.0"], last[f"acu/{kind}/net.2"]]
        assert last[f"acu/{kind}"] == pytest.approx(over_all(per_layer))
    assert last["acu/mean_displacement"] > records[5]["acu/mean_displacement"] > 0
    assert last["acu/off_lattice"] == 1
    assert last["acu/collisions"] == 0


def test_records_are_on_disk_before_a_checkpoint_that_does_not_make_them_again(tmp_path):
    logger, seen = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1000), []

    class Reader(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            with (tmp_path / "metrics.csv").open(newline="") as file:
                seen.append([int(row["step"]) for row in csv.DictReader(file) if row["acu/mean_displacement"]])

    callbacks = [OffsetLogger(2), Reader(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)]
    fit(TinyModule(), callbacks, tmp_path, logger=logger, max_epochs=1, enable_checkpointing=True)
    assert seen == [[2], [2, 4, 6]]


def mean(values):
    return sum(values) / len(values)


def test_step_speed_is_the_mean_way_of_the_taps_since_the_last_record_per_step(tmp_path):
    recorder, spy = Recorder(tmp_path / "r"), Spy()
    model = TinyModule(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    fit(model, [PositionLRSchedule(0.1, 2), OffsetLogger(5), spy], tmp_path, logger=recorder, max_epochs=2)
    records = {step: metrics for step, metrics in recorder.metrics if "acu/step_speed" in metrics}
    moments = [0, 5, 10, 12]
    places = [*spy.offsets, model.offsets]
    for before, now in itertools.pairwise(moments):
        way = (places[now] - places[before]).view(2, 9, 2).norm(dim=-1).sum(-1) / 8 / (now - before)
        assert records[now]["acu/step_speed/net.0"] == pytest.approx(way[0].item(), rel=1e-5)
        assert records[now]["acu/step_speed"] == pytest.approx(way.mean().item(), rel=1e-5)
    assert 0 < records[10]["acu/step_speed"] <= 0.1 + 1e-6  # a unit gradient times the learning rate


def test_once_a_step_under_accumulation(tmp_path):
    recorder = Recorder(tmp_path / "r")
    fit(TinyModule(), [OffsetLogger(1, figures=False)], tmp_path, logger=recorder, accumulate_grad_batches=3)
    steps = [step for step, metrics in recorder.metrics if "acu/mean_displacement" in metrics]
    assert steps == [1, 2, 3, 4]


def test_figure_to_a_file_and_to_loggers_that_take_images(tmp_path):
    recorder = Recorder(tmp_path / "r")
    trainer = fit(TinyModule(), [OffsetLogger()], tmp_path, logger=recorder)
    path = tmp_path / "r" / "lightning_logs" / "version_0" / "shapes.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert recorder.images == [("acu/shapes", [str(path)], trainer.global_step)]
    film = path.with_name("shapes.gif")
    assert recorder.videos == [("acu/film", [str(film)], trainer.global_step, ["gif"])]


def test_figure_and_scalars_to_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoardLogger(tmp_path / "b")
    fit(TinyModule(), [OffsetLogger(5, figures_every_n_steps=6)], tmp_path, logger=board)
    events = accumulator.EventAccumulator(board.log_dir).Reload()
    assert [image.step for image in events.Images("acu/shapes")] == [6, 12, 12]
    assert events.Images("acu/shapes")[0].width > 100
    assert [scalar.step for scalar in events.Scalars("acu/mean_displacement/net.2")] == [5, 10, 12]


def test_several_loggers_all_get_everything(tmp_path):
    one, two = Recorder(tmp_path / "one"), Recorder(tmp_path / "two")
    fit(TinyModule(), [OffsetLogger(4)], tmp_path, logger=[one, two])
    assert one.metrics == two.metrics != []
    assert one.images == two.images
    assert (tmp_path / "one" / "lightning_logs" / "version_0" / "shapes.gif").exists()


def frames(path):
    with Image.open(path) as film:
        return film.n_frames


def test_the_film_has_a_frame_for_each_record_and_for_both_ends(tmp_path):
    model = TinyModule(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    fit(model, [PositionLRSchedule(0.3, 0), OffsetLogger(5)], tmp_path)
    assert frames(tmp_path / "shapes.gif") == 4  # 0, 5, 10, 12


@pytest.mark.parametrize(("figures", "animation"), [(True, False), (False, True), (False, False)])
def test_figures_and_film_can_be_left_out(tmp_path, figures, animation):
    fit(TinyModule(), [OffsetLogger(5, figures=figures, animation=animation)], tmp_path)
    assert (tmp_path / "shapes.png").exists() == figures
    assert (tmp_path / "shapes.gif").exists() == animation


def test_figures_during_training(tmp_path):
    fit(TinyModule(), [OffsetLogger(100, figures_every_n_steps=5)], tmp_path, accumulate_grad_batches=2, max_epochs=4)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "shapes.png",
        "shapes_000005.png",
        "shapes_000010.png",
    ]


def test_a_long_training_keeps_every_second_frame(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_acu.callbacks.offset_logger._MAX_FRAMES", 5)
    logger = OffsetLogger(1)
    fit(TinyModule(), [PositionLRSchedule(1.0, 0), logger], tmp_path, max_epochs=3)
    assert [step for step, _ in logger._frames] == [0, 4, 8, 12, 16]
    assert frames(tmp_path / "shapes.gif") == 6  # and the end, 18


def test_a_film_of_very_many_positions_keeps_few_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_acu.callbacks.offset_logger._MAX_NUMBERS", 3 * 36)
    logger = OffsetLogger(1)
    fit(TinyModule(), [logger], tmp_path)
    assert len(logger._frames) <= 3


def test_a_resumed_training_goes_on_with_the_film_and_the_speed(tmp_path):
    def train(epochs, name, ckpt_path=None):
        torch.manual_seed(0)
        recorder, logger = Recorder(tmp_path / name), OffsetLogger(4)
        callbacks = [PositionLRSchedule(1.0, 0), logger]
        trainer = fit(TinyModule(), callbacks, tmp_path, logger=recorder, max_epochs=epochs, ckpt_path=ckpt_path)
        return recorder, logger, trainer

    whole, logger, _ = train(3, "whole")
    _, _, trainer = train(2, "part")
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    rest, resumed, _ = train(3, "rest", tmp_path / "part.ckpt")
    assert [step for step, _ in logger._frames] == [0, 4, 8, 12, 16, 18]
    assert [step for step, _ in resumed._frames] == [0, 4, 8, 12, 16, 18]
    for (_, one), (_, other) in zip(logger._frames, resumed._frames, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [record for record in whole.metrics if record[0] > 12] == rest.metrics


def test_says_when_positions_cannot_move(tmp_path):
    model = TinyModule()
    model.make_optimizer = lambda parameters: torch.optim.SGD([model.net[0].weight], lr=0.1)
    with pytest.warns(UserWarning, match="OffsetLogger: no optimizer holds any positions, so they will not move"):
        fit(model, [OffsetLogger()], tmp_path)


def test_without_a_logger_only_the_figure_is_written(tmp_path):
    fit(TinyModule(), [OffsetLogger()], tmp_path)
    assert (tmp_path / "shapes.png").exists()
    assert (tmp_path / "shapes.gif").exists()


def test_csv_file_has_the_columns(tmp_path):
    fit(TinyModule(), [OffsetLogger(4)], tmp_path, logger=CSVLogger(tmp_path))
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["acu/max_displacement/net.2"]] == ["4", "8", "12"]


def test_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`every_n_steps` \(=0\) must be at least 1"):
        OffsetLogger(0)
    with pytest.raises(ValueError, match=r"`figures_every_n_steps` \(=-3\) must be at least 1"):
        OffsetLogger(5, figures_every_n_steps=-3)
    with pytest.raises(RuntimeError, match="OffsetLogger: TinyModule has no active convolution"):
        fit(TinyModule(convert=False), [OffsetLogger()], tmp_path)


def test_records_are_as_often_when_a_batch_takes_several_steps(tmp_path):
    class Twice(ManualModule):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[index].parameters(), lr=0.1) for index in (0, 2)]

        def training_step(self, batch, batch_idx):
            self.manual_backward(TinyModule.training_step(self, batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    logger = OffsetLogger(5, figures=False)
    fit(Twice(), [logger], tmp_path)
    assert [step for step, _ in logger._frames] == [0, 6, 10, 16, 20, 24]


def test_fast_dev_run_and_barebones_write_nothing(tmp_path):
    for arguments in ({"fast_dev_run": True}, {"barebones": True}):
        fit(TinyModule(), [OffsetLogger(1, figures_every_n_steps=1)], tmp_path, **arguments)
    assert not list(tmp_path.glob("*.gif"))


def test_figures_in_between_without_figures():
    with pytest.raises(ValueError, match=r"`figures_every_n_steps` \(=5\) has no effect with `figures`=False"):
        OffsetLogger(10, figures=False, figures_every_n_steps=5)


def test_the_page_and_the_progress_bar_show_shapes_while_training_goes_on(tmp_path, monkeypatch):
    from lightning_acu.callbacks import offset_logger

    monkeypatch.setattr(offset_logger, "_SHORTEST_WAIT", 0.0)
    monkeypatch.setattr(offset_logger, "_TIMES_AS_LONG", 0)
    seen = []

    class Reader(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            page = tmp_path / "shapes.html"
            moved = trainer.progress_bar_metrics.get("moved_px")
            seen.append((trainer.global_step, page.read_text() if page.exists() else "", moved))

    model = TinyModule(optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    logger = CSVLogger(tmp_path, name="", version="")
    fit(model, [PositionLRSchedule(0.1, 0), OffsetLogger(2), Reader()], tmp_path, logger=logger, max_epochs=1)
    pages = {step: (page, moved) for step, page, moved in seen}
    assert pages[1] == ("", None)
    page, moved = pages[4]
    assert "Step 4" in page
    assert 'http-equiv="refresh"' in page
    assert '"steps":[0,2,4]' in page
    assert moved > pages[2][1] > 0
    last = (tmp_path / "shapes.html").read_text()
    assert 'http-equiv="refresh"' not in last
    assert '"steps":[0,2,4,6]' in last


def test_pages_take_at_most_a_hundredth_of_the_time(tmp_path, monkeypatch):
    from lightning_acu.callbacks import offset_logger

    now, written = [100.0], []
    monkeypatch.setattr(offset_logger.time, "monotonic", lambda: now[0])

    def write(self, file, *arguments):
        written.append(now[0])
        now[0] += 0.5  # as long as it takes
        return True

    monkeypatch.setattr(OffsetLogger, "_write", write)

    class Clock(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            now[0] += 30

    logger = OffsetLogger(1, figures=False, animation=False, live=True)
    fit(TinyModule(), [PositionLRSchedule(0.1, 0), Clock(), logger], tmp_path, max_epochs=1)
    assert written == [130.0, 190.5, 251.0, 281.5]  # every 50 seconds at most, of steps of 30; and at the end


def test_without_live_there_is_no_page(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(TinyModule(), [PositionLRSchedule(0.1, 0), OffsetLogger(2, live=False)], tmp_path, logger=logger, max_epochs=1)
    assert not (tmp_path / "shapes.html").exists()
    assert (tmp_path / "shapes.png").exists()


def test_the_receptive_field_on_request(tmp_path):
    recorder = Recorder(tmp_path / "r")

    def callbacks():
        return [PositionLRSchedule(0.1, 0), OffsetLogger(3, receptive_field_images=2)]

    class WithForward(TinyModule):
        def forward(self, images):
            return self.net(images)

    fit(WithForward(), callbacks(), tmp_path, logger=recorder, max_epochs=1)
    fields = {step: each["acu/receptive_field"] for step, each in recorder.metrics if "acu/receptive_field" in each}
    assert min(fields) == 3
    assert 0 < fields[3] < 10
    with pytest.raises(RuntimeError, match=r"`receptive_field_images` \(=2\) calls TinyModule with images"):
        fit(TinyModule(), callbacks(), tmp_path, logger=recorder, max_epochs=1)
    with pytest.raises(TypeError, match="`receptive_field_images`"):
        OffsetLogger(receptive_field_images=0.5)
