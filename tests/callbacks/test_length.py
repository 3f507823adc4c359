"""Fractions of a training are of the training as it was when it began."""

import pytest
import torch
from helpers.tiny import STEPS_PER_EPOCH, Spy, TinyModule, fit
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune

EPOCHS = 4
STEPS = EPOCHS * STEPS_PER_EPOCH


class WithBatchNorm(TinyModule):
    def __init__(self):
        super().__init__()
        self.net.insert(1, nn.BatchNorm2d(4))

    @property
    def offsets(self):
        return torch.cat([self.net[0].offsets.detach(), self.net[3].offsets.detach()])


def averaging():
    """Adds an epoch for the statistics of batch norm, whose steps it makes one."""
    return StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_rounding_under_stochastic_weight_averaging(tmp_path, fraction, first):
    rounding, spy, average = RoundThenFinetune(at_fraction=fraction, keep=False), Spy(), averaging()
    schedule = PositionLRSchedule(3.0, 1)
    callbacks = [average, schedule, rounding, spy] if first else [schedule, rounding, average, spy]
    model = WithBatchNorm()
    fit(model, callbacks, tmp_path, max_epochs=EPOCHS)
    assert rounding.rounded_at == {0.5: 12, 0.9: 22}[fraction]
    assert torch.equal(model.offsets, spy.offsets[rounding.rounded_at])


def test_a_schedule_ends_with_the_training_as_it_was(tmp_path):
    """With "lattice" taps are on whole pixels after the last step, before averages are put in their place."""

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.offsets)

    model, seen = WithBatchNorm(), []
    callbacks = [PositionLRSchedule(3.0, 1, schedule="lattice"), averaging(), Look()]
    fit(model, callbacks, tmp_path, max_epochs=EPOCHS)
    assert len(seen) == STEPS + STEPS_PER_EPOCH
    assert not torch.equal(seen[STEPS - 2], seen[STEPS - 2].round())
    closed = seen[STEPS - 1]
    assert torch.equal(closed, closed.round())
    assert closed.abs().max() >= 1


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_epoch_start"])
def test_a_callback_that_makes_the_training_longer(tmp_path, hook):
    class Longer(Callback):
        pass

    def longer(self, trainer, pl_module):
        trainer.fit_loop.max_epochs = 2 * EPOCHS

    setattr(Longer, hook, longer)
    rounding = RoundThenFinetune(at_fraction=0.5, keep=False)
    trainer = fit(TinyModule(), [Longer(), PositionLRSchedule(3.0, 1), rounding], tmp_path, max_epochs=EPOCHS)
    assert trainer.global_step == 2 * STEPS
    assert rounding.rounded_at == STEPS // 2
