"""Layers whose positions get no gradient."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit
from torch import nn

from lightning_acu import convert_to_acu
from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune


class ReadsTheWeight(nn.Module):
    """As in networks that standardise weights, or share them, in their own forward."""

    def __init__(self, reads=("first",)):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.reads = reads

    def forward(self, images):
        for name in ("first", "last"):
            conv = getattr(self, name)
            images = F.conv2d(images, conv.weight, padding=1) if name in self.reads else conv(images)
        return images


class Module(TinyModule):
    def __init__(self, net, **arguments):
        super().__init__(convert=False, **arguments)
        self.net = convert_to_acu(net)


@pytest.mark.parametrize("reads", [("first",), ("last",), ("first", "last")])
def test_a_model_that_reads_the_weight_itself_is_told_at_the_first_step(tmp_path, reads):
    names = ", ".join(f"net.{name}" for name in reads)
    with pytest.warns(UserWarning, match=rf"positions of {names} got no gradient in the first step") as caught:
        fit(Module(ReadsTheWeight(reads)), [PositionLRSchedule(1.0, warmup_steps=3)], tmp_path)
    texts = [str(warning.message) for warning in caught if "got no gradient" in str(warning.message)]
    assert len(texts) == 1
    assert "reads its `weight`, as in F.conv2d" in texts[0]


def test_not_after_accumulation_or_by_a_second_optimizer(tmp_path):
    """Where every layer is called somewhere before the step, nothing is said (a warning would be an error)."""

    class Alternates(TinyModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[index].parameters(), lr=0.1) for index in (0, 2)]

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[batch_idx % 2]
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    fit(Alternates(), [PositionLRSchedule(1.0, warmup_steps=0)], tmp_path)
    fit(TinyModule(), [PositionLRSchedule(1.0, warmup_steps=0)], tmp_path, accumulate_grad_batches=3)


def test_frozen_positions_layers_that_rest_and_rounded_ones_are_no_fault(tmp_path):
    model = TinyModule()
    model.net[0].offsets.requires_grad_(False)
    model.unused = convert_to_acu(nn.Sequential(nn.Conv2d(2, 2, 3)))
    fit(model, [PositionLRSchedule(1.0, warmup_steps=0)], tmp_path)
    net = ReadsTheWeight(())
    trainer = fit(Module(net), [PositionLRSchedule(3.0, 0), RoundThenFinetune(at_step=6)], tmp_path)
    trainer.save_checkpoint(tmp_path / "rounded.ckpt")
    resumed = Module(ReadsTheWeight(("first",)))
    callbacks = [PositionLRSchedule(3.0, 0), RoundThenFinetune(at_step=6)]
    fit(resumed, callbacks, tmp_path, ckpt_path=tmp_path / "rounded.ckpt", max_epochs=3)
