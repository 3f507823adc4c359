"""Positions in their own parameter group, under every torch scheduler."""

import pytest
import torch
from helpers.schedulers import SCHEDULERS
from torch.optim import lr_scheduler as lrs

from lightning_acu.training.param_groups import GROUP_NAME, split_off_positions, tie_learning_rates


def parameters():
    return torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))


def step(optimizer, scheduler):
    optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_of_weights_stay_and_those_of_positions_follow(name):
    plain = torch.optim.SGD([parameters()[0]], lr=0.1, momentum=0.9)
    plain_scheduler = SCHEDULERS[name](plain)
    weight, offsets = parameters()
    optimizer = torch.optim.SGD([("w", weight), ("o", offsets)], lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = SCHEDULERS[name](optimizer)
    assert split_off_positions(optimizer, [scheduler], [offsets], 0.1, 0.0) == [offsets]
    for _ in range(9):
        tie_learning_rates(optimizer, 0.1)
        weights, positions = optimizer.param_groups
        assert weights["lr"] == pytest.approx(plain.param_groups[0]["lr"], rel=1e-12)
        assert positions["lr"] == pytest.approx(0.1 * weights["lr"], rel=1e-12)
        step(plain, plain_scheduler)
        step(optimizer, scheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_state_survives_a_resume(name):
    def make():
        weight, offsets = parameters()
        optimizer = torch.optim.SGD([weight, offsets], lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        split_off_positions(optimizer, [scheduler], [offsets], 0.1, 0.0)
        return optimizer, scheduler

    (optimizer, scheduler), (other, other_scheduler) = make(), make()
    for _ in range(3):
        step(optimizer, scheduler)
    other.load_state_dict(optimizer.state_dict())
    other_scheduler.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        for one, its_scheduler in ((optimizer, scheduler), (other, other_scheduler)):
            step(one, its_scheduler)
            tie_learning_rates(one, 0.1)
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]


def test_the_new_group_is_named_has_the_settings_of_its_source_and_no_decay():
    weight, offsets = parameters()
    optimizer = torch.optim.AdamW([("w", weight), ("o", offsets)], lr=0.1, betas=(0.5, 0.6), weight_decay=0.3)
    split_off_positions(optimizer, [], [offsets], 0.01, 0.0)
    source, new = optimizer.param_groups
    assert source["params"] == [weight]
    assert source["param_names"] == ["w"]
    assert source["weight_decay"] == 0.3
    assert new["params"] == [offsets]
    assert new["param_names"] == ["o"]
    assert new["name"] == GROUP_NAME
    assert new["betas"] == (0.5, 0.6)
    assert new["weight_decay"] == 0.0
    assert new["lr"] == pytest.approx(0.001)


def test_each_source_group_gets_a_group_of_its_own():
    (w1, o1), (w2, o2) = parameters(), parameters()
    optimizer = torch.optim.SGD([{"params": [w1, o1], "lr": 0.1}, {"params": [o2, w2], "lr": 0.2}])
    split_off_positions(optimizer, [], [o1, o2], 0.5, 0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.05, 0.1]
    assert [group["params"] for group in optimizer.param_groups] == [[w1], [w2], [o1], [o2]]


def test_groups_have_different_names():
    """LearningRateMonitor refuses two of one name."""
    (w1, o1), (w2, o2) = parameters(), parameters()
    optimizer = torch.optim.SGD([{"params": [w1, o1]}, {"params": [w2, o2]}], lr=0.1)
    split_off_positions(optimizer, [], [o1, o2], 0.5, 0.0)
    names = [group.get("name") for group in optimizer.param_groups]
    assert names == [None, None, GROUP_NAME, f"{GROUP_NAME}_of_group_1"]
