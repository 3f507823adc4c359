"""RoundThenFinetune: the restarted learning rate."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit, loader

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune

pytestmark = pytest.mark.slow


def schedule():
    return PositionLRSchedule(3.0, warmup_steps=1)


class Validating(TinyModule):
    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.net(images).mean((2, 3))
        self.log("val_loss", F.cross_entropy(scores, labels))
        self.log("val_accuracy", (scores.argmax(1) == labels).float().mean())

    def val_dataloader(self):
        return loader(batches=3)


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
