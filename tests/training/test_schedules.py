"""Schedules of positions as pure functions: their values, by hand."""

import importlib
import math

import pytest

from lightning_acu import callbacks
from lightning_acu.training import schedules
from lightning_acu.training.schedules import (
    Constant,
    Cosine,
    DilationDecay,
    LatticeDecay,
    Linear,
    Schedule,
    Step,
    find_schedule,
)

HALF = (1 + math.sqrt(0.5)) / 2

#: schedule: factor on the learning rate at steps 0, 100, 200, 300, 400 of 400.
RATES = [
    (Constant(), [1, 1, 1, 1, 1]),
    (Cosine(), [1, HALF, 0.5, 1 - HALF, 0]),
    (Cosine(floor=0.2), [1, 0.2 + 0.8 * HALF, 0.6, 0.2 + 0.8 * (1 - HALF), 0.2]),
    (Linear(), [1, 0.75, 0.5, 0.25, 0]),
    (Linear(floor=0.5), [1, 0.875, 0.75, 0.625, 0.5]),
    (Step(), [1, 1, 0.1, 0.01, 0.01]),
    (Step(milestones=(0.25, 1.0), factor=0.5), [1, 0.5, 0.5, 0.5, 0.25]),
    (Step(milestones=()), [1, 1, 1, 1, 1]),
    (LatticeDecay(), [1, 1, 1, 0.5, 0]),
    (LatticeDecay(start=0), [1, 0.75, 0.5, 0.25, 0]),
    (LatticeDecay(start=0.75, power=3), [1, 1, 1, 1, 0]),
    (DilationDecay(), [1, 1, 1, 0.5, 0]),
]


@pytest.mark.parametrize(("schedule", "expected"), RATES, ids=str)
def test_values_of_the_rate(schedule, expected):
    assert [schedule.rate(step, 400) for step in range(0, 401, 100)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LatticeDecay(), [1, 1, 1, 0.5, 0]),
        (DilationDecay(start=0, power=2), [1, 0.5625, 0.25, 0.0625, 0]),
        (LatticeDecay(start=0, power=2), [1, 0.5625, 0.25, 0.0625, 0]),
        (LatticeDecay(start=0.25, power=0.5), [1, 1, math.sqrt(2 / 3), math.sqrt(1 / 3), 0]),
        *[(schedule, [1] * 5) for schedule, _ in RATES if not isinstance(schedule, LatticeDecay)],
    ],
    ids=str,
)
def test_values_of_the_slack(schedule, expected):
    assert [schedule.slack(step, 400) for step in range(0, 401, 100)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LatticeDecay(start=0), [1 / 4, 1 / 3, 1 / 2, 1, 1]),  # of what is left: 1, 3/4, 1/2, 1/4, 0
        (LatticeDecay(start=0.5), [0, 0, 1 / 2, 1, 1]),
        (LatticeDecay(start=0, power=2), [1 - 9 / 16, 1 - 4 / 9, 1 - 1 / 4, 1, 1]),
        (Cosine(), [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_the_pull_makes_of_one_slack_the_next(schedule, expected):
    pulls = [schedule.pull(step, step + 100, 400) for step in range(0, 401, 100)]
    assert pulls == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in RATES], ids=str)
def test_beyond_the_end_they_stay_at_their_last_value(schedule):
    assert schedule.rate(500, 400) == schedule.rate(400, 400)
    assert schedule.rate(0, 0) == schedule.rate(400, 400)
    assert schedule.slack(500, 400) == schedule.slack(400, 400)


def test_only_a_constant_runs_without_an_end():
    assert Constant().rate(10**9, math.inf) == 1
    assert [schedule.needs_total for schedule in (Constant(), Cosine(), Linear(), Step(), LatticeDecay())] == [
        False, True, True, True, True,
    ]  # fmt: skip


def test_names():
    names = {"constant": Constant(), "cosine": Cosine(), "linear": Linear(), "step": Step(), "lattice": LatticeDecay()}
    names["dilation"] = DilationDecay()
    for name, schedule in names.items():
        assert find_schedule("schedule", name) == schedule

    class Own(Schedule):
        pass

    own = Own()
    assert find_schedule("schedule", own) is own


def test_configuration_files_and_pickles_find_them_by_their_old_name():
    assert importlib.import_module("lightning_acu.callbacks.schedules") is callbacks.schedules
    assert all(getattr(callbacks.schedules, name) is getattr(schedules, name) for name in schedules.__all__)
    assert set(callbacks.schedules.__all__) == set(schedules.__all__)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: find_schedule("schedule", "cos"),
            ValueError,
            r"`schedule` \(='cos'\) must be a Schedule or one of 'constant'",
        ),
        (lambda: find_schedule("finetune_schedule", 3), TypeError, r"`finetune_schedule` \(=3\) must be a Schedule or"),
        (lambda: Cosine(floor=1.5), ValueError, r"`floor` \(=1.5\) must be between 0 and 1"),
        (lambda: Linear(floor=-0.1), ValueError, r"`floor` \(=-0.1\) must be between 0 and 1"),
        (lambda: Step(milestones=(0.5, 2.0)), ValueError, r"`milestones` \(=2.0\) must be between 0 and 1"),
        (lambda: Step(factor=-1), ValueError, r"`factor` \(=-1\) must not be negative"),
        (lambda: LatticeDecay(start=1), ValueError, r"`start` \(=1\) must be at least 0 and below 1"),
        (lambda: LatticeDecay(power=0), ValueError, r"`power` \(=0\) must be positive"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
