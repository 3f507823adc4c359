"""RoundThenFinetune: the numbers it logs of the model before, after and in the end; the restarted learning rate."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import Spy, TinyModule, fit, loader, validate
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune


def schedule():
    return PositionLRSchedule(3.0, warmup_steps=1)


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self, directory):
        super().__init__()
        self.records, self.directory = [], str(directory)

    @property
    def save_dir(self):
        return self.directory

    def log_metrics(self, metrics, step=None):
        self.records.append((step, metrics))

    def log_hyperparams(self, params, *arguments):
        pass


class Validating(TinyModule):
    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.net(images).mean((2, 3))
        self.log("val_loss", F.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean())

    def val_dataloader(self):
        return loader(batches=3)


def validated(path, tmp_path):
    model = Validating()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return validate(model, tmp_path)


def test_every_logger_hears_how_good_the_model_is_before_and_after_and_in_the_end(tmp_path):
    loggers = [Recorder(tmp_path / "a"), Recorder(tmp_path / "b"), CSVLogger(tmp_path / "c")]
    model, rounding = Validating(), RoundThenFinetune(at_step=9)
    trainer = fit(model, [schedule(), rounding], tmp_path, logger=loggers)
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    expected = {
        "before_rounding": (9, validated(rounding.checkpoints["before_rounding"], tmp_path)),
        "after_rounding": (9, validated(rounding.checkpoints["rounded"], tmp_path)),
        "final": (12, validated(tmp_path / "final.ckpt", tmp_path)),
    }
    assert len({values["val_loss"] for _, values in expected.values()}) == 3
    assert rounding.results == {moment: values for moment, (_, values) in expected.items()}
    for logger in loggers[:2]:
        records = [record for record in logger.records if any(name.startswith("acu/") for name in record[1])]
        assert records == [
            (step, {f"acu/{moment}/{name}": value for name, value in values.items()})
            for moment, (step, values) in expected.items()
        ]
    text = (tmp_path / "c" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "acu/final/val_accuracy" in text


def test_without_evaluation_or_validation_data_nothing_is_logged(tmp_path):
    for model, rounding in (
        (Validating(), RoundThenFinetune(at_step=9, evaluate=False)),
        (TinyModule(), RoundThenFinetune(at_step=9)),
    ):
        logger = Recorder(tmp_path)
        fit(model, [schedule(), rounding], tmp_path, logger=logger)
        assert not any(rounding.results.values())
        assert not any(name.startswith("acu/") for _, metrics in logger.records for name in metrics)


def test_the_evaluations_change_nothing(tmp_path):
    runs = []
    for evaluate in (True, False):
        torch.manual_seed(0)
        model, spy, logger = Validating(), Spy(), Recorder(tmp_path)
        model.net.append(torch.nn.Dropout(0.3))
        rounding = RoundThenFinetune(at_step=9, finetune_lr=0.05, evaluate=evaluate)
        fit(model, [schedule(), rounding, spy], tmp_path, logger=logger, max_epochs=3)
        records = [(step, {k: v for k, v in m.items() if "acu/" not in k}) for step, m in logger.records]
        runs.append((torch.stack(spy.weights), torch.stack(spy.offsets), [r for r in records if r[1]]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]
    assert len(runs[0][2]) == 3


class Scheduled(Validating):
    """Two groups, at 0.1 and 0.02, under a scheduler."""

    def __init__(self, scheduler=None, **config):
        super().__init__(optimizer=None)
        self.scheduler, self.config = scheduler, config

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), **self.config}}


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e3, factor=0.1)


SCHEDULERS = {
    "none": {},
    "OneCycle at each step": {
        "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.2, 0.04], total_steps=24),
        "interval": "step",
    },
    "cosine at each epoch": {"scheduler": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4)},
    "plateau": {"scheduler": plateau, "monitor": "val_loss"},
    "plateau at each step": {
        "scheduler": plateau, "monitor": "val_loss", "interval": "step", "strict": False,
    },
}  # fmt: skip


class Rates(pl.Callback):
    """The learning rates at the very steps, by step."""

    def __init__(self):
        self.rates = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates[trainer.global_step] = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.filterwarnings("ignore:RoundThenFinetune. after rounding all taps are where they started")
@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_loss which is not available")
@pytest.mark.parametrize("rounding_first", [True, False])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_restarted_learning_rate_falls_to_zero_whatever_the_scheduler_says(tmp_path, name, rounding_first):
    model, rates = Scheduled(**SCHEDULERS[name]), Rates()
    rounding = RoundThenFinetune(at_step=9, finetune_lr=0.4)
    positions = PositionLRSchedule(0.5, warmup_steps=1)
    callbacks = [rounding, positions] if rounding_first else [positions, rounding]
    trainer = fit(model, [*callbacks, rates], tmp_path, max_epochs=4)
    for step in range(9, 24):
        high = 0.4 * (1 + torch.cos(torch.tensor(torch.pi * (step - 9) / 15)).item()) / 2
        share = rounding._ratios[0][1]
        assert rates.rates[step] == pytest.approx([high, share * high, 0.5 * high, 0.5 * share * high], rel=1e-5)
    assert rounding._ratios[0][1] == pytest.approx(0.2)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups[:2]] == [0, 0]


@pytest.mark.parametrize(("finetune_schedule", "last"), [("linear", 1 / 3), ("constant", 1.0)])
def test_other_shapes_of_the_restarted_rate(tmp_path, finetune_schedule, last):
    rates = Rates()
    rounding = RoundThenFinetune(at_step=9, finetune_lr=0.3, finetune_schedule=finetune_schedule)
    fit(Validating(), [schedule(), rounding, rates], tmp_path)
    assert [rates.rates[step][0] for step in (8, 9, 11)] == pytest.approx([0.1, 0.3, 0.3 * last])


@pytest.mark.parametrize("stop", [9, 12, 17])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("name", ["none", "OneCycle at each step", "cosine at each epoch"])
def test_resumed_fine_tuning_has_the_same_rates(tmp_path, name, stop):
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    def train(extra, ckpt_path=None):
        model, rates, rounding = Scheduled(**SCHEDULERS[name]), Rates(), RoundThenFinetune(at_step=9, finetune_lr=0.4)
        fit(model, [schedule(), rounding, rates, *extra], tmp_path, ckpt_path=ckpt_path, max_epochs=4)
        assert torch.equal(model.offsets, model.offsets.round())
        return rates.rates

    whole = train([Saves()])
    resumed = train([], tmp_path / "stopped.ckpt")
    assert min(resumed) == stop
    # Inside an epoch, Lightning starts again with the first batch and the epoch's scheduler steps again: only
    # the rates are compared.
    for step in set(resumed) & set(whole):
        assert resumed[step] == pytest.approx(whole[step], rel=1e-9), step


@pytest.mark.filterwarnings("ignore:RoundThenFinetune. after rounding all taps are where they started")
def test_groups_that_come_after_rounding_keep_their_own_rate(tmp_path):
    """As BackboneFinetuning adds them."""

    class Adds(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                pl_module.late.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": [pl_module.late], "lr": 0.007})

    model, rates = Validating(), Rates()
    model.late = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    model.make_optimizer = lambda parameters: torch.optim.SGD(model.net.parameters(), lr=0.1)
    fit(model, [RoundThenFinetune(at_step=9, finetune_lr=0.3), Adds(), rates], tmp_path, max_epochs=3)
    assert rates.rates[17][0] < 0.05
    assert rates.rates[17][1] == 0.007
