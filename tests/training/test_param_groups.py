"""Positions in their own parameter group, under every torch scheduler."""

import pytest
import torch
from helpers.schedulers import SCHEDULERS
from torch.optim import lr_scheduler as lrs

from lightning_acu import ACUConv2d
from lightning_acu.training import (
    GROUP_NAME,
    add_late_positions,
    is_position_group,
    parameter_ids,
    rate_ratios,
    restart_rates,
    split_off_positions,
    tie_learning_rates,
)


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


def test_positions_that_no_optimizer_holds_go_to_the_group_of_their_weight():
    one, two, other = (ACUConv2d(1, 1, 3) for _ in range(3))
    groups = [{"params": [("a", one.bias)]}, {"params": [("b", one.weight), ("c", two.weight)]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    layers = [("one", one), ("two", two), ("other", other)]
    assert add_late_positions([optimizer], layers) == ["one", "two"]
    assert optimizer.param_groups[1]["params"] == [one.weight, two.weight, one.offsets, two.offsets]
    assert optimizer.param_groups[1]["param_names"] == ["b", "c", "one.offsets", "two.offsets"]
    assert add_late_positions([optimizer], layers) == []
    held = (one.bias, one.weight, two.weight, one.offsets, two.offsets)
    assert parameter_ids([optimizer]) == {id(parameter) for parameter in held}


def test_restarted_rates_keep_their_ratios_and_leave_positions_and_later_groups():
    (w1, o1), (w2, _), (late, _) = parameters(), parameters(), parameters()
    optimizer = torch.optim.SGD([{"params": [w1, o1], "lr": 0.1}, {"params": [w2], "lr": torch.tensor(0.4)}])
    split_off_positions(optimizer, [], [o1], 0.5, 0.0)
    assert [is_position_group(group) for group in optimizer.param_groups] == [False, False, True]
    ratios = rate_ratios(optimizer)
    assert ratios == pytest.approx([0.25, 1.0, 0.0])
    optimizer.add_param_group({"params": [late], "lr": 0.007})
    tensor = optimizer.param_groups[1]["lr"]
    restart_rates([optimizer], [ratios], 0.2)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.2, 0.05, 0.007])
    assert optimizer.param_groups[1]["lr"] is tensor
    tie_learning_rates(optimizer, 0.1)
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.005)


def test_ratios_where_all_rates_are_zero():
    assert rate_ratios(torch.optim.SGD([{"params": [p]} for p in parameters()], lr=0.0)) == [1.0, 1.0]


def test_an_optimizer_without_a_learning_rate():
    weight, offsets = parameters()
    optimizer = torch.optim.Adafactor([weight, offsets])
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(RuntimeError, match=r"Adafactor has no learning rate \(lr=None\) to set that of positions from"):
        split_off_positions(optimizer, [], [offsets], 0.1, 0.0)


def test_an_optimizer_that_has_shared_out_its_parameters_is_refused_before_anything_changes():
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Stands in for torch's, which needs a process group."""

    weight, offsets = parameters()
    optimizer = ZeroRedundancyOptimizer([weight, offsets], lr=0.1)
    with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer cannot have a parameter group of positions"):
        split_off_positions(optimizer, [], [offsets], 0.01, 0.0)
    assert [group["params"] for group in optimizer.param_groups] == [[weight, offsets]]
