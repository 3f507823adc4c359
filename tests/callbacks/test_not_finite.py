"""Gradients and positions that are not finite."""

import functools
import re
import warnings

import pytest
import torch
from helpers.tiny import Spy, TinyModule, fit

from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune


def said(train):
    """The numbers of gradients that warnings speak of while ``train()`` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [match[0] for w in caught if (match := re.search(r"number by step \d+: \d+", str(w.message)))]


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
}


class Poisoned(TinyModule):
    """The gradient of tap 1 of the first layer is not finite in step 5, that of all taps of the second in step 7."""

    def __init__(self, value=torch.nan, **arguments):
        super().__init__(**arguments)
        self.value = value

    def on_after_backward(self):
        if self.trainer.global_step == 5:
            self.net[0].offsets.grad[2] = self.value
        if self.trainer.global_step == 7:
            self.net[2].offsets.grad.fill_(self.value)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tap_stays_where_it_is_for_that_step(tmp_path, name, value, normalize):
    spy, model = Spy(), Poisoned(value, optimizer=OPTIMIZERS[name])
    schedule = PositionLRSchedule(3.0, 1, normalize, weight_decay=0.1)
    assert said(lambda: fit(model, [schedule, spy], tmp_path)) == ["number by step 6: 1", "number by step 12: 10"]
    assert model.offsets.isfinite().all()
    moved = [(a - b).view(18, 2).abs().amax(-1) > 0 for a, b in zip(spy.offsets[1:], spy.offsets, strict=False)]
    others = [tap for tap in range(9) if tap not in (1, 4)]  # 4 is the fixed centre
    assert not moved[5][1]
    assert moved[5][others].all()
    assert moved[6][[1, *others]].all()  # from the next step on it moves again
    assert not moved[7][9:].any()
    assert moved[7][[1, *others]].all()


def test_other_taps_move_as_if_nothing_were_wrong(tmp_path):
    """In the step itself, with another layer's tap poisoned: bit for bit."""
    seen = []
    for value in (torch.nan, 0.0):
        spy = Spy()
        torch.manual_seed(0)
        said(functools.partial(fit, Poisoned(value), [PositionLRSchedule(3.0, 1), spy], tmp_path))
        seen.append(spy.offsets[6])
    difference = (seen[0] - seen[1]).view(18, 2).abs().amax(-1)
    assert difference.nonzero().flatten().tolist() == [1]


def test_healthy_trainings_hear_nothing_and_poisoned_ones_twice_at_most(tmp_path):
    class Always(TinyModule):
        def on_after_backward(self):
            self.net[0].offsets.grad[0] = torch.nan

    model = TinyModule()
    fit(model, [PositionLRSchedule(1.0, 0)], tmp_path)  # a warning would be an error
    numbers = said(lambda: fit(Always(), [PositionLRSchedule(1.0, 0)], tmp_path, max_epochs=5))
    assert numbers == ["number by step 6: 6", "number by step 30: 30"]


def test_it_is_said_without_a_schedule_of_positions_too(tmp_path):
    model = Poisoned()
    assert said(lambda: fit(model, [RoundThenFinetune(at_step=9, keep=False)], tmp_path)) == ["number by step 12: 10"]
    assert model.offsets.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rounding_refuses_positions_that_are_not_finite(tmp_path, value):
    class Breaks(Spy):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 9:
                with torch.no_grad():
                    pl_module.net[2].offsets[5] = value

    rounding = RoundThenFinetune(at_step=9)
    with pytest.raises(ValueError, match=r"positions are not finite: tap 2 of net\.2; .*load an earlier checkpoint"):
        fit(TinyModule(), [Breaks(), PositionLRSchedule(3.0, 1), rounding], tmp_path)
    assert rounding.rounded_at is None
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.filterwarnings("ignore:PositionLRSchedule. gradients of taps were not finite")
def test_taps_that_diverged_to_nan_are_said(tmp_path):
    class Breaks(Spy):
        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.net[2].offsets[5] = torch.nan

    with pytest.warns(UserWarning, match="positions of net.2 are not finite"):
        fit(TinyModule(), [Breaks(), PositionLRSchedule(3.0, 1), OffsetLogger(5)], tmp_path)
    assert (tmp_path / "shapes.gif").exists()
