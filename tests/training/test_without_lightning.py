"""The room knows torch only, and a plain loop with it does what the callbacks do, to the last bit."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit, loader

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.training import (
    confine_positions_,
    find_schedule,
    normalize_gradients_,
    rate_ratios,
    restart_rates,
    round_layers,
    split_off_positions,
    tie_learning_rates,
    trained_layers,
)

BLOCKED = ("lightning", "timm", "torchmetrics", "matplotlib")


@pytest.mark.slow
def test_importing_it_leaves_lightning_and_all_that_alone():
    code = f"import sys, lightning_acu.training; print([name for name in {BLOCKED!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


MULTIPLIER, WARMUP, LIMIT, ROUND, STEPS, FINETUNE = 2.0, 3, 0.9, 10, 18, 0.05


@pytest.mark.parametrize("schedule", ["constant", "cosine", "lattice"])
def test_a_plain_loop_is_the_callbacks_to_the_last_bit(tmp_path, schedule):
    torch.manual_seed(0)
    expected = TinyModule(scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 2 * STEPS))
    positions = PositionLRSchedule(MULTIPLIER, WARMUP, schedule=schedule, max_displacement=LIMIT)
    rounding = RoundThenFinetune(at_step=ROUND, finetune_lr=FINETUNE, finetune_schedule="linear", keep=False)
    fit(expected, [positions, rounding], tmp_path, max_epochs=STEPS // 6)

    torch.manual_seed(0)
    net = TinyModule().net
    layers = trained_layers(net)
    offsets = [layer.offsets for _, layer in layers]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 2 * STEPS)
    split_off_positions(optimizer, [scheduler], offsets, MULTIPLIER, 0.0)
    schedule, learning, ratios, step = find_schedule("schedule", schedule), ROUND - WARMUP, None, 0

    def time(step):
        return min(max(step - WARMUP, 0), learning)

    for _ in range(STEPS // 6):
        for images, labels in loader():
            if step == ROUND:
                round_layers(layers)
                for parameter in offsets:
                    optimizer.state.pop(parameter, None)
                ratios = rate_ratios(optimizer)
            if ratios is not None:
                share = find_schedule("schedule", "linear").rate(step - ROUND, STEPS - ROUND)
                restart_rates([optimizer], [ratios], FINETUNE * share)
            tie_learning_rates(optimizer, MULTIPLIER * schedule.rate(time(step), learning))
            optimizer.zero_grad()
            F.cross_entropy(net(images).mean((2, 3)), labels).backward()
            if WARMUP <= step < ROUND:
                normalize_gradients_([layer for _, layer in layers])
            else:
                for parameter in offsets:
                    parameter.grad = None
            optimizer.step()
            if WARMUP <= step < ROUND:
                pull = schedule.pull(time(step), time(step + 1), learning)
                confine_positions_([layer for _, layer in layers], pull, LIMIT)
            scheduler.step()
            step += 1

    assert expected.offsets.abs().max() == 1
    assert torch.equal(torch.cat([parameter.detach() for parameter in offsets]), expected.offsets)
    weights = [p.detach().flatten() for name, p in net.named_parameters() if "offsets" not in name]
    assert torch.equal(torch.cat(weights), expected.weights)
