"""``multiplier="auto"``: learning rates of positions from a displacement in pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit, loader
from torch.optim import SGD, Adagrad, AdamW, NAdam
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.training import PositionRates, PositionTrainer, is_position_group


@pytest.fixture
def net():
    return TinyModule().net


def sgd(net, **arguments):
    return SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | arguments))


def position_rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups if is_position_group(group)]


def train(net, optimizer, scheduler=None, steps=1):
    """The learning rates of the weights' first group and of the positions' in each step."""
    rates = []
    for batch in list(loader())[:steps]:
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]).mean((2, 3)), batch[1]).backward()
        weights = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.append((weights, position_rates(optimizer)[0]))
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("optimizer", "normalize", "target", "steps", "pixels"),
    [
        ({"momentum": 0.9}, "gradient", 0.5, 100, 2 * 0.1 / 10),  # 8 * 0.5 ** 2 = 2
        ({"momentum": 0.9}, "gradient", None, 100, 2 * 0.1 / 10),
        ({"momentum": 0.9}, "gradient", 1.0, 400, 8 * 0.1 / 20),
        ({"momentum": 0.5}, "gradient", 0.5, 100, 2 * 0.5 / 10),
        ({}, "gradient", 0.5, 100, 2 / 10),
        ({"momentum": 0.6}, "momentum", 0.5, 100, 2 / 2 / 10),  # (1 + 0.6) / (1 - 0.6) = 2 ** 2
        ({}, "momentum", 0.5, 100, 2 / math.sqrt(19) / 10),
        (AdamW, "gradient", 0.5, 10_000, 2 / 100),
        (NAdam, "momentum", 0.5, 1, 2 / math.sqrt(19)),
        (NAdam, "gradient", 0.5, 0, 2),
    ],
)
def test_the_rule(net, optimizer, normalize, target, steps, pixels):
    optimizer = SGD(net.parameters(), 0.1, **optimizer) if isinstance(optimizer, dict) else optimizer(net.parameters())
    rates = PositionRates("auto", target, normalize)
    assert rates.pixels(optimizer, optimizer.param_groups[0], steps) == pytest.approx(pixels, rel=1e-12)


@pytest.mark.parametrize("existing", [False, True], ids=["made later", "made before"])
@pytest.mark.parametrize(
    "make",
    [
        lambda o: CosineAnnealingLR(o, 8),
        lambda o: OneCycleLR(o, 0.1, total_steps=8),
        lambda o: LambdaLR(o, lambda step: (step + 1) / 4),  # a warm-up
    ],
)
def test_the_rate_follows_schedulers_from_the_highest_of_the_weights(net, make, existing):
    optimizer = sgd(net)
    scheduler = make(optimizer) if existing else None
    arguments = {"warmup_steps": 1, "total_steps": 26, "schedule": "linear", "target_displacement": 0.5}
    PositionTrainer(optimizer, net, multiplier="auto", schedulers=[scheduler] if existing else None, **arguments)
    pixels = 2 * 0.1 / 5  # 25 steps
    if isinstance(scheduler, OneCycleLR):
        pixels = 2 * 0.15 / 5  # its momentum is 0.85 at its highest rate
    for step, (weights, positions) in enumerate(train(net, optimizer, scheduler or make(optimizer), 6)):
        factor = 1 - max(0, step - 1) / 25
        assert positions == pytest.approx(pixels * factor * weights / 0.1, rel=1e-9, abs=0)


def test_groups_of_different_rates_move_alike_and_late_ones_too(net):
    optimizer = SGD(net[2].parameters(), lr=0.3)
    PositionTrainer(optimizer, net, multiplier="auto", total_steps=100)
    train(net, optimizer)
    optimizer.add_param_group({"params": net[0].parameters(), "lr": 0.01})
    train(net, optimizer)
    assert position_rates(optimizer) == pytest.approx([0.2, 0.2])


def test_a_resumed_training_keeps_the_multiplier_unless_the_target_changes(net):
    def begin(**arguments):
        optimizer = sgd(net)
        PositionTrainer(optimizer, net, multiplier="auto", **arguments)
        return optimizer

    optimizer = begin(total_steps=100)
    scheduler = CosineAnnealingLR(optimizer, 4)
    train(net, optimizer, scheduler, 3)
    state = optimizer.state_dict()
    (expected,) = train(net, optimizer, scheduler)
    for arguments, factor in [
        ({"total_steps": 100}, 1),
        ({"total_steps": 400}, 1),  # it trains on for longer
        ({"total_steps": 100, "target_displacement": 1.0}, 4),
    ]:
        resumed = begin(**arguments)
        resumed.load_state_dict(state)
        assert train(net, resumed) == [(expected[0], pytest.approx(expected[1] * factor))]


def test_a_state_of_a_training_with_a_number_is_no_obstacle(net):
    optimizer = sgd(net)
    PositionTrainer(optimizer, net, multiplier=1.0)
    state = optimizer.state_dict()
    resumed = sgd(net)
    PositionTrainer(resumed, net, multiplier="auto", total_steps=100)
    resumed.load_state_dict(state)
    assert train(net, resumed) == [(0.1, pytest.approx(0.02))]


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.1)])
def test_the_callback_learns_what_a_position_trainer_does(tmp_path, make):
    torch.manual_seed(0)
    expected = TinyModule(make, lambda optimizer: OneCycleLR(optimizer, 0.1, 18))
    arguments = {"multiplier": "auto", "warmup_steps": 2, "target_displacement": 1.2}
    callbacks = [PositionLRSchedule(**arguments), RoundThenFinetune(at_step=11, keep=False)]
    fit(expected, callbacks, tmp_path, max_epochs=2)
    torch.manual_seed(0)
    module = TinyModule()
    optimizer = make(module.parameters())
    scheduler = OneCycleLR(optimizer, 0.1, 18)
    PositionTrainer(optimizer, module, round_at=11, schedulers=[scheduler], **arguments)
    train(module.net, optimizer, scheduler, 6)
    train(module.net, optimizer, scheduler, 6)
    assert expected.offsets.abs().max() > 0
    assert torch.equal(module.offsets, expected.offsets)


def test_errors_say_what_to_do(net, tmp_path):
    def fails(error, match, optimizer=None, **arguments):
        optimizer = optimizer or sgd(net)
        with pytest.raises(error, match=match):
            PositionTrainer(optimizer, net, **({"multiplier": "auto", "total_steps": 9} | arguments))
        return optimizer

    fails(ValueError, "`multiplier`='auto' needs a training with a known end; give `total_steps`", total_steps=None)
    optimizer = fails(ValueError, "not those of Adagrad; give a number", Adagrad(net.parameters(), lr=0.1))
    assert len(optimizer.param_groups) == 1
    fails(ValueError, "`multiplier`='auto' needs `normalize`='gradient' or 'momentum'", normalize=None)
    fails(ValueError, "`multiplier`='auto' needs a learning rate of the weights that is not 0", sgd(net, lr=0.0))
    fails(TypeError, r"`multiplier` \(='Auto'\) must be a number or 'auto'", multiplier="Auto")
    fails(ValueError, r"`target_displacement` \(=0.5\) has no effect with `multiplier`=1.0", multiplier=1.0,
          target_displacement=0.5)  # fmt: skip
    for value in (0, math.inf):
        fails(ValueError, r"`target_displacement` \(=.*\) must be (positive|finite)", target_displacement=value)
    with pytest.raises(
        RuntimeError, match=r"PositionLRSchedule: `multiplier` \(='auto'\) needs a training with a know"
    ):
        fit(TinyModule(), [PositionLRSchedule("auto", 1)], tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="not those of Adagrad"):
        fit(TinyModule(lambda p: Adagrad(p, lr=0.1)), [PositionLRSchedule("auto", 1)], tmp_path)
