"""How gradients of positions become directions: against the formulas in Python's floats, tap by tap."""

import copy
import io
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, loader
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import OneCycleLR

from lightning_acu.callbacks import PositionLRSchedule
from lightning_acu.training import PositionGradients, PositionTrainer, find_normalize, is_position_group

BATCHES = list(loader(dtype=torch.float64)) * 2


@pytest.fixture
def net():
    torch.manual_seed(0)
    return TinyModule().net.double()


def backward(net, batch, factor=1.0):
    loss = F.cross_entropy(net(batch[0]).mean((2, 3)), batch[1]) * factor
    net.zero_grad()
    loss.backward()


def trained(net, optimizer, steps=8, start=0, before_step=lambda: None):
    """Positions of the first layer after each step, and its raw gradients, as lists of floats."""
    positions, gradients = [], []
    for batch in BATCHES[start : start + steps]:
        backward(net, batch)
        gradients.append(net[0].offsets.grad.tolist())
        before_step()
        optimizer.step()
        positions.append(net[0].offsets.tolist())
    return positions, gradients


def unit_averages(gradients, coefficients):
    """The directions of rule "momentum", (steps, taps, 2)."""
    average, directions = [0.0] * len(gradients[0]), []
    for gradient, c in zip(gradients, coefficients, strict=True):
        average = [c * old + (1 - c) * new for old, new in zip(average, gradient, strict=True)]
        lengths = [math.hypot(*average[i : i + 2]) for i in range(0, len(average), 2)]
        directions.append([x / (lengths[i // 2] or 1) for i, x in enumerate(average)])
    return directions


def sgd_steps(directions, rates):
    positions, at = [], [0.0] * len(directions[0])
    for direction, rate in zip(directions, rates, strict=True):
        at = [x - rate * d for x, d in zip(at, direction, strict=True)]
        positions.append(at)
    return positions


def scaled_steps(directions, rate, decay, eps, corrected):
    """Steps divided by the root of an average of squares, of Adam (corrected for its start) or RMSprop."""
    positions, at, squares = [], [0.0] * len(directions[0]), [0.0] * len(directions[0])
    for step, direction in enumerate(directions, 1):
        squares = [decay * s + (1 - decay) * d * d for s, d in zip(squares, direction, strict=True)]
        over = 1 - decay**step if corrected else 1.0
        at = [x - rate * d / ((s / over) ** 0.5 + eps) for x, d, s in zip(at, direction, squares, strict=True)]
        positions.append(at)
    return positions


def assert_equal(positions, expected):
    torch.testing.assert_close(torch.tensor(positions), torch.tensor(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "coefficient", "expected"),
    [
        (lambda p: SGD(p, lr=0.1, momentum=0.8), 0.8, None),
        (lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, fused=True), 0.8, None),
        (lambda p: SGD(p, lr=0.1), 0.9, None),  # which has none
        (lambda p: AdamW(p, lr=0.1, betas=(0.7, 0.99)), 0.7, (0.99, 1e-8, True)),
        (lambda p: RMSprop(p, lr=0.1, alpha=0.95), 0.9, (0.95, 1e-8, False)),
    ],
    ids=["SGD with momentum", "fused Nesterov", "SGD", "AdamW", "RMSprop"],
)
def test_momentum_is_the_average_of_raw_gradients_with_length_1(net, make, coefficient, expected):
    optimizer = make(net.parameters())
    PositionTrainer(optimizer, net, multiplier=0.5, normalize="momentum")
    positions, gradients = trained(net, optimizer)
    directions = unit_averages(gradients, [coefficient] * 8)
    if expected is None:
        assert_equal(positions, sgd_steps(directions, [0.05] * 8))
    else:
        assert_equal(positions, scaled_steps(directions, 0.05, *expected))


def test_the_coefficient_follows_schedulers_of_momentum(net):
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
    PositionTrainer(optimizer, net, multiplier=0.5, normalize="momentum")
    scheduler = OneCycleLR(optimizer, 0.2, total_steps=10)
    weights, rates, coefficients, positions, gradients = optimizer.param_groups[0], [], [], [], []
    for step in range(8):
        rates.append(weights["lr"] / 2)
        coefficients.append(weights["momentum"])
        moved, raw = trained(net, optimizer, 1, step)
        positions += moved
        gradients += raw
        scheduler.step()
    assert len(set(coefficients)) > 4
    assert_equal(positions, sgd_steps(unit_averages(gradients, coefficients), rates))


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: AdamW(p, lr=0.1)])
@pytest.mark.parametrize("stop", [1, 4])
def test_the_average_is_in_the_optimizers_state_so_that_a_resume_is_exact(net, make, stop):
    def begin(model):
        optimizer = make(model.parameters())
        return optimizer, PositionTrainer(optimizer, model, multiplier=2.0, warmup_steps=2, normalize="momentum")

    start = copy.deepcopy(net)
    optimizer, _ = begin(net)
    trained(net, optimizer, stop)
    file = io.BytesIO()
    torch.save([net.state_dict(), optimizer.state_dict()], file)
    trained(net, optimizer, 8 - stop, stop)
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    start.load_state_dict(model)
    optimizer, _ = begin(start)
    optimizer.load_state_dict(state)
    trained(start, optimizer, 8 - stop, stop)
    assert torch.equal(start[0].offsets, net[0].offsets)
    assert torch.equal(start[0].weight, net[0].weight)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_another_rule_after_a_resume_has_the_optimizers_momentum_again(net, kind):
    arguments = {"momentum": 0.8} if kind is SGD else {"betas": (0.8, 0.99)}
    optimizer = kind(net.parameters(), lr=0.1, **arguments)
    with PositionTrainer(optimizer, net, normalize="momentum"):
        trained(net, optimizer, 2)
    (group,) = filter(is_position_group, optimizer.param_groups)
    assert [group.get("momentum", 0.0), group.get("betas", (0.0,))[0]] == [0.0, 0.0]
    PositionTrainer(optimizer, net)
    trained(net, optimizer, 1)
    assert {name: group[name] for name in arguments} == arguments


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_mixed_precision_skips_and_its_scale_do_not_change_the_average(net, fused):
    """The scale doubles after every step, and is halved by a skipped one."""
    plain = copy.deepcopy(net)
    optimizer = SGD(plain.parameters(), lr=0.1, momentum=0.9)
    PositionTrainer(optimizer, plain, multiplier=2.0, normalize="momentum")
    trained(plain, optimizer, 6)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
    PositionTrainer(optimizer, net, multiplier=2.0, normalize="momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    for step, batch in enumerate(BATCHES[:6]):
        for factor in [1.0, math.inf][: 1 + (step in (1, 3))][::-1]:
            backward(net, batch, scaler.scale(torch.tensor(factor)))
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(net[0].offsets, plain[0].offsets, rtol=0, atol=1e-12)
    torch.testing.assert_close(net[0].weight, plain[0].weight, rtol=0, atol=1e-12)


def test_a_gradient_that_is_not_finite_leaves_tap_and_average_alone(net):
    """The tap goes on as if that step had not been; the others as if nothing had happened."""

    def poison():
        net[0].offsets.grad[5] = math.nan

    healthy, optimizers = copy.deepcopy(net), []
    for model in (net, healthy):
        optimizers.append(SGD(model.parameters(), lr=0.1, momentum=0.9))
        PositionTrainer(optimizers[-1], model, multiplier=0.0, normalize="momentum")  # the same gradients in both
        trained(model, optimizers[-1], 2)
    before = optimizers[0].state[net[0].offsets]["acu_gradient_average"].clone()
    trained(net, optimizers[0], 1, 2, poison)
    trained(healthy, optimizers[1], 1, 2)
    after, other = (
        o.state[m[0].offsets]["acu_gradient_average"] for o, m in zip(optimizers, (net, healthy), strict=True)
    )
    assert torch.equal(after[4:6], before[4:6])
    assert torch.equal(after[:4], other[:4])
    assert torch.equal(after[6:], other[6:])
    assert not torch.equal(after[:4], before[:4])


def test_a_gradient_of_frozen_positions_is_dropped(net):
    backward(net, BATCHES[0])
    net[0].offsets.requires_grad_(False)
    PositionGradients().before_step(SGD(net.parameters(), lr=0.1), [net[0], net[2]], None)
    assert net[0].offsets.grad is None
    assert net[2].offsets.grad is not None


@pytest.mark.parametrize(
    ("given", "rule"),
    [("gradient", "gradient"), (True, "gradient"), ("momentum", "momentum"), (None, None), (False, None)],
)
def test_names_of_rules_and_those_of_older_configurations(net, given, rule):
    assert find_normalize(given) == rule
    assert PositionLRSchedule(normalize=given).normalize == rule
    assert PositionTrainer(SGD(net.parameters(), lr=0.1), net, normalize=given).normalize == rule


@pytest.mark.parametrize("given", ["Gradient", 1, "none"])
def test_other_rules_are_errors(given):
    with pytest.raises(ValueError, match=rf"`normalize` \(={re.escape(repr(given))}\) must be 'gradient' \(or True\)"):
        find_normalize(given)
