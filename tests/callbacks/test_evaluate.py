"""A validation in the middle of a training: what it says, and that nothing else knows of it."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit, loader
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import nn
from torchmetrics import MaxMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_acu.callbacks._evaluate import evaluate, log_evaluation


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", 0

    def __init__(self, save_dir=None):
        super().__init__()
        self.records, self.pictures, self._save_dir = [], [], save_dir

    @property
    def save_dir(self):
        return self._save_dir

    @property
    def experiment(self):
        return self

    def add_picture(self, name):
        self.pictures.append(name)

    def log_metrics(self, metrics, step=None):
        self.records.append((step, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, params, *arguments):
        pass


class Module(TinyModule):
    """Validates with a loss, metrics, the best so far, and hooks; trains with random numbers and a frozen part."""

    def __init__(self, loaders=1):
        super().__init__()
        self.dropout, self.frozen, self.loaders = nn.Dropout(0.3), nn.BatchNorm2d(2), loaders
        self.accuracy, self.seen_in_training = MulticlassAccuracy(3), MulticlassAccuracy(3)
        self.best = MaxMetric()
        self.steps_seen, self.modes = [], []

    def on_train_start(self):
        self.frozen.eval()

    def training_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.dropout(self.net(self.frozen(images))).mean((2, 3))
        loss = F.cross_entropy(scores, labels)
        self.seen_in_training(scores, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_accuracy", self.seen_in_training, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        images, labels = batch
        scores = self.net(self.frozen(images)).mean((2, 3)) + 0 * torch.randn(1)
        self.modes.append(self.net.training)
        self.accuracy(scores, labels)
        self.log("val_loss", F.cross_entropy(scores, labels), prog_bar=True)
        self.log("val_accuracy", self.accuracy)
        self.log("noisy", scores.mean(), on_step=True, on_epoch=True)
        self.logger.experiment.add_picture(f"{self.trainer.global_rank}")

    def on_validation_epoch_end(self):
        self.steps_seen.append(self.trainer.global_step)
        if not self.trainer.sanity_checking and self.loaders == 1:
            self.best(self.accuracy.compute())
            self.log("best", self.best.compute())  # computed: logged as a metric, it would be reset

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(batches=3) if self.loaders == 1 else [loader(batches=3), loader(3, 2)]


class Evaluates(pl.Callback):
    """Calls ``evaluate`` before these steps, and at the end."""

    def __init__(self, *steps):
        self.steps, self.results, self.states = steps, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.steps and trainer.global_step not in self.results:
            self.states[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            before = everything(trainer)
            self.results[trainer.global_step] = evaluate(trainer)
            assert everything(trainer) == before

    def on_train_end(self, trainer, pl_module):
        if self.steps:
            before = everything(trainer)
            self.results["end"] = evaluate(trainer)
            assert everything(trainer) == before


def everything(trainer):
    """All that a validation might change, as text."""
    module, loop = trainer.lightning_module, trainer.fit_loop.epoch_loop.val_loop
    return {
        "metrics": repr((trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics)),
        "random": hash(torch.get_rng_state().numpy().tobytes()),
        "modes": [child.training for child in module.modules()],
        "progress": repr(loop.batch_progress.state_dict()),
        "seen": dict(loop._seen_batches_per_dataloader),
        "stage": (trainer.training, trainer.validating, trainer.sanity_checking),
        "callbacks": [type(callback) for callback in trainer.callbacks],
        "states": repr([callback.state_dict() for callback in trainer.callbacks]),
        "loggers": [(id(logger), len(logger.records)) for logger in trainer.loggers],
        "states of metrics": repr({k: m.metric_state for k, m in module.named_modules() if hasattr(m, "metric_state")}),
        "connector": (trainer._logger_connector._first_loop_iter, trainer._logger_connector._current_fx),
        "gradients": repr([p.grad for p in module.parameters()]),
    }


def run(tmp_path, evaluates, loaders=1, ckpt_path=None, extra=(), **arguments):
    torch.manual_seed(3)
    module = Module(loaders)
    logger = Recorder(str(tmp_path))
    monitor = "val_loss" if loaders == 1 else "val_loss/dataloader_idx_0"
    callbacks = [
        evaluates,
        EarlyStopping(monitor, patience=50, check_on_train_epoch_end=False),
        ModelCheckpoint(tmp_path / "checkpoints", monitor=monitor, save_top_k=2, save_on_train_epoch_end=False),
        *extra,
    ]
    defaults = {"max_epochs": 3, "log_every_n_steps": 1, "enable_checkpointing": True, "logger": logger}
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, **(defaults | arguments),
    )  # fmt: skip
    trainer.fit(module, ckpt_path=ckpt_path)
    scores = [
        {k: v for k, v in callback.state_dict().items() if k not in ("best_model_path", "dirpath", "best_k_models")}
        for callback in callbacks[1:3]
    ]
    scores[1] = {k: v for k, v in scores[1].items() if "path" not in k}
    return module, trainer, logger.records, repr((scores, trainer.callback_metrics))


SETTINGS = {
    "once an epoch": {},
    "every 4 batches": {"val_check_interval": 4},
    "every half epoch": {"val_check_interval": 0.5},
    "every 4 batches across epochs": {"val_check_interval": 4, "check_val_every_n_epoch": None},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "accumulating": {"accumulate_grad_batches": 2},
    "no sanity check": {"num_sanity_val_steps": 0},
    "reloading": {"reload_dataloaders_every_n_epochs": 2},
    "several loaders": {"loaders": 2},
    "a part of the data": {"limit_val_batches": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_training_goes_on_as_if_there_had_been_no_evaluation(tmp_path, name):
    plain, _, records, rest = run(tmp_path / "a", Evaluates(), **SETTINGS[name])
    evaluates = Evaluates(*((2, 3, 7) if name == "accumulating" else (2, 6, 7, 13)))
    module, _, other_records, other_rest = run(tmp_path / "b", evaluates, **SETTINGS[name])
    assert len(evaluates.results) >= 4
    assert torch.equal(module.weights, plain.weights)
    assert torch.equal(module.offsets, plain.offsets)
    assert other_records == records
    assert any("best" in metrics or "val_loss/dataloader_idx_1" in metrics for _, metrics in records)
    assert other_rest == rest
    assert len(module.steps_seen) > len(plain.steps_seen)
    assert not any(module.modes)


@pytest.mark.parametrize("loaders", [1, 2])
def test_the_numbers_are_those_of_validating_the_same_weights(tmp_path, loaders):
    evaluates = Evaluates(8)
    run(tmp_path, evaluates, loaders)
    module = Module(loaders)
    module.load_state_dict(evaluates.states[8])
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=Recorder(), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    results = trainer.validate(module, verbose=False)
    expected = {name: value for metrics in results for name, value in metrics.items()}
    names = {"val_loss", "val_accuracy", "noisy_epoch"}
    if loaders == 1:
        names |= {"best"}
    else:
        names = {f"{name}/dataloader_idx_{i}" for name in names for i in (0, 1)}
    assert set(expected) == set(evaluates.results[8]) == names
    for name in names - {"best"}:  # (that is of the whole training)
        assert evaluates.results[8][name] == expected[name], name


class Exact(TinyModule):
    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.net(images).mean((2, 3))
        self.log("loss", F.cross_entropy(scores, labels), on_step=True, on_epoch=True)
        self.log("hidden", scores.mean(), logger=False)


def test_numbers_of_single_batches_and_hidden_ones_are_left_out(tmp_path):
    class Callback(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                self.result = evaluate(trainer)
                self.state = {k: v.clone() for k, v in pl_module.state_dict().items()}

    module, callback = Exact(), Callback()
    arguments = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    data = loader(batches=4)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[callback], enable_checkpointing=False, default_root_dir=tmp_path,
        **arguments,
    )  # fmt: skip
    trainer.fit(module, loader(), data)
    module.load_state_dict(callback.state)
    (expected,) = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **arguments).validate(
        module, data, verbose=False
    )
    assert callback.result == expected
    assert set(expected) == {"loss_epoch"}


@pytest.mark.parametrize("arguments", [{"limit_val_batches": 0}, {}], ids=["limit 0", "no validation"])
def test_without_validation_there_are_no_numbers_and_no_records(tmp_path, arguments):
    class Callback(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert evaluate(trainer) == {}
            log_evaluation(trainer, "somewhere", {})

    logger = Recorder()
    if arguments:
        module = Exact()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[Callback()], enable_checkpointing=False, logger=logger,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **arguments,
        )  # fmt: skip
        trainer.fit(module, loader(), loader())
    else:
        fit(TinyModule(), [Callback()], tmp_path, logger=logger)
    assert logger.records == []


def test_numbers_go_to_every_logger_and_the_log(tmp_path, caplog):
    class Callback(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                log_evaluation(trainer, "before_rounding", {"loss": 0.5, "accuracy": 0.25})

    loggers = [Recorder(), Recorder()]
    with caplog.at_level("INFO"):
        fit(TinyModule(), [Callback()], tmp_path, logger=loggers)
    for logger in loggers:
        assert logger.records == [(4, {"acu/before_rounding/loss": 0.5, "acu/before_rounding/accuracy": 0.25})]
    assert "before rounding, step 4: loss 0.5, accuracy 0.25" in caplog.text


def test_pictures_of_the_modules_own_hooks_go_nowhere(tmp_path):
    logger = Recorder()
    run(tmp_path, Evaluates(2, 6, 7), logger=logger, num_sanity_val_steps=0)
    assert len(logger.pictures) == 3 * 3  # of three validations


def test_hooks_find_the_names_and_directories_of_the_loggers(tmp_path):
    class Curious(Exact):
        def on_validation_epoch_end(self):
            found.append((self.logger.name, self.logger.version, self.logger.save_dir, self.trainer.log_dir))

    found = []
    module = Curious()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Evaluates(2)], logger=Recorder(str(tmp_path)),
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    assert found == [("recorder", 0, str(tmp_path), str(tmp_path))] * 4  # sanity check, step 2, epoch, end


def test_an_error_in_a_validation_leaves_the_trainer_as_it_was(tmp_path):
    class Fails(Exact):
        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                raise ArithmeticError

    seen = []

    class Callback(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            with pytest.raises(ArithmeticError):
                evaluate(trainer)
            seen.append((trainer.callbacks[0] is self, trainer.training, trainer.loggers == loggers))
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    loggers = [Recorder()]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[Callback()], logger=loggers, limit_train_batches=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Fails(), loader(), loader())
    assert seen == [(True, True, True)]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("arguments", [{}, {"val_check_interval": 4}], ids=str)
def test_in_a_training_resumed_in_the_middle_of_an_epoch(tmp_path, arguments):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    run(tmp_path / "first", Evaluates(), extra=[Saves()], **arguments)
    path = tmp_path / "middle.ckpt"
    plain, _, records, rest = run(tmp_path / "a", Evaluates(), ckpt_path=path, **arguments)
    evaluates = Evaluates(9, 10, 14)
    module, _, other_records, other_rest = run(tmp_path / "b", evaluates, ckpt_path=path, **arguments)
    assert list(evaluates.results) == [9, 10, 14, "end"]
    assert torch.equal(module.weights, plain.weights)
    assert (other_records, other_rest) == (records, rest)
