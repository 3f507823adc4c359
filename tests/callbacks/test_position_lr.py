"""PositionLRSchedule under a Trainer: own learning rate, exact warm-up, clear errors."""

import pytest
import torch
from tiny import ManualModule, Spy, TinyModule, fit

from lightning_acu.callbacks import PositionLRSchedule

OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_positions_are_bit_identical_during_warmup_and_move_after(tmp_path, name, module):
    spy = Spy()
    model = module(optimizer=OPTIMIZERS[name])
    with torch.no_grad():
        model.net[0].offsets.copy_(torch.rand(18))  # decay would move these even without a gradient
    # (manual optimisation counts steps through the same global_step)
    fit(model, [PositionLRSchedule(0.1, warmup_steps=7, weight_decay=0.1), spy], tmp_path)
    first, *rest = spy.offsets
    for step, offsets in enumerate(rest, start=1):  # offsets before step number `step`
        assert torch.equal(offsets, first) == (step <= 7), step


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
def test_a_step_is_the_learning_rate_in_pixels_under_sgd(tmp_path, module):
    spy = Spy()
    model = module(optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    fit(model, [PositionLRSchedule(0.05, warmup_steps=0), spy], tmp_path)
    for before, after in zip(spy.offsets, spy.offsets[1:], strict=False):
        moved = (after - before).view(2, 9, 2).norm(dim=-1)
        expected = torch.tensor([0.01] * 4 + [0.0] + [0.01] * 4)
        torch.testing.assert_close(moved, expected.expand(2, 9), rtol=1e-4, atol=1e-7)


def test_without_normalize_the_gradient_itself_is_used(tmp_path):
    spy = Spy()
    model = TinyModule(optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    fit(model, [PositionLRSchedule(1.0, warmup_steps=0, normalize=False), spy], tmp_path)
    steps = (spy.offsets[1] - spy.offsets[0]).view(2, 9, 2).norm(dim=-1)
    assert steps.max() > 1.5 * steps[steps > 0].min()


def test_the_ratio_holds_at_every_step_under_an_absolute_schedule(tmp_path):
    spy = Spy()
    model = TinyModule(scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=12))
    fit(model, [PositionLRSchedule(0.01, warmup_steps=0), spy], tmp_path)
    rates = spy.rates[1:]
    assert len({weights for weights, _ in rates}) > 5
    for weights, positions in rates:
        assert positions == pytest.approx(0.01 * weights, rel=1e-9)


def test_the_module_is_left_as_it_was(tmp_path):
    model = TinyModule()
    fit(model, [PositionLRSchedule(0.01, 0)], tmp_path)
    assert "configure_gradient_clipping" not in vars(model)
    fit(model, [PositionLRSchedule(0.01, 0)], tmp_path)  # and can train again


@pytest.mark.parametrize("name", ["multiplier", "warmup_steps", "weight_decay"])
def test_negative_arguments(name):
    with pytest.raises(ValueError, match=rf"`{name}` \(=-1\) must not be negative"):
        PositionLRSchedule(**{name: -1})


def test_a_model_without_active_convolutions(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"PositionLRSchedule: TinyModule has no active convolution; call convert_to_acu"
    ):
        fit(TinyModule(convert=False), [PositionLRSchedule()], tmp_path)


def test_positions_that_no_optimizer_holds(tmp_path):
    model = TinyModule()
    model.make_optimizer = lambda parameters: torch.optim.SGD([model.net[0].weight], lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"no optimizer holds the positions of net\.0, net\.2; convert the model before"
    ):
        fit(model, [PositionLRSchedule()], tmp_path)


def test_a_warmup_that_never_ends_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"`warmup_steps` \(=10000\) is no less than the 12 steps of this training"):
        fit(TinyModule(), [PositionLRSchedule()], tmp_path)
