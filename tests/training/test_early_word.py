"""What is said after a tenth of the steps in which positions learn, by PositionTrainer and by PositionLRSchedule."""

import math
import re
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import ACUConv2d
from lightning_acu.callbacks import PositionLRSchedule
from lightning_acu.training import LearningPhase, PositionTrainer, time_for_a_word


def layer():
    torch.manual_seed(0)
    return nn.Sequential(ACUConv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(50, 2))


def train(steps, sgd=True, **arguments):
    """All warnings of a training of ``steps`` steps, each with the step before which it came."""
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if sgd else torch.optim.RMSprop(model.parameters(), lr=0.1)
    PositionTrainer(optimizer, model, warmup_steps=20, total_steps=steps, **arguments)
    random, said = torch.Generator().manual_seed(0), []
    for step in range(1, 60):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.zero_grad()
            model(torch.randn(4, 1, 5, 5, generator=random)).square().mean().backward()
            optimizer.step()
        said += [(step, str(warning.message)) for warning in caught]
    return said


def test_when():
    phase = LearningPhase(20, 201)  # a tenth is 21 steps
    assert [step for step in range(1, 300) if time_for_a_word(phase, step - 1, step)] == [41]
    assert time_for_a_word(phase, 30, 50)  # a batch of several steps
    assert not time_for_a_word(LearningPhase(20, 199), 0, 100)
    assert not time_for_a_word(LearningPhase(0, math.inf), 0, 100)


def test_taps_that_hardly_move_and_a_multiplier_that_would_move_them():
    ((step, text),) = train(320, multiplier=0.001)
    assert step == 50
    assert re.match(r"after 30 of the 300 steps in which positions learn taps are 0\.00\d+ pixels", text)
    assert "hardly move; `multiplier` (=0.001): about 1.2, or 'auto', would take them half a pixel" in text
    # as position_rates.py has it: W = 8 * 0.5^2 = s * sqrt(300), s the pixels of a step
    assert float(re.search(r"about (\S+),", text)[1]) == pytest.approx(8 * 0.25 / math.sqrt(300) / 0.1, rel=0.05)


def test_taps_that_run_away():
    ((step, text),) = train(320, multiplier=10.0)
    assert step == 50
    assert "and run away; `multiplier` (=10.0): about 1.2" in text


def test_nothing_is_said_of_a_good_rate_or_a_short_training():
    assert train(320, multiplier=1.0) == []
    assert train(200, multiplier=0.001) == []


def test_without_a_number_where_the_steps_of_the_optimizer_are_not_known():
    ((_, text),) = train(320, sgd=False, multiplier=1e-6)
    assert text.endswith("`multiplier` (=1e-06): change it")


def test_the_callback_says_it_too():
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = layer()

        def training_step(self, batch):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(TensorDataset(torch.randn(40, 1, 5, 5)), batch_size=1)
    trainer = Trainer(
        max_steps=220, limit_train_batches=40, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        callbacks=[PositionLRSchedule(multiplier=1e-4, warmup_steps=10)],
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"PositionLRSchedule: after 21 of the 210 steps .* hardly move; `multiplier`"):
        trainer.fit(Module(), data)
