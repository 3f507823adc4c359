"""Trainings in processes of their own: several at once (DDP, FSDP2), and killed and resumed ones."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("training_run.py")

#: All see the same images in each step: two processes with 2, or 2 x 1, are one with 4.
RUNS = {
    "one": {"strategy": "one", "batch_size": 4, "double": True},
    "ddp": {"strategy": "ddp", "batch_size": 2, "double": True},
    "fsdp2": {"strategy": "fsdp2", "batch_size": 2, "double": True},
    "ddp_accumulating": {"strategy": "ddp_find_unused", "batch_size": 1, "accumulate": 2, "double": True},
    "one_clipped": {"strategy": "one", "batch_size": 4, "clip": 0.05, "double": True},
    "ddp_clipped": {"strategy": "ddp", "batch_size": 2, "clip": 0.05, "double": True},
    "fsdp2_clipped": {"strategy": "fsdp2", "batch_size": 2, "clip": 0.05, "double": True},
    "one_bf16": {"strategy": "one", "batch_size": 4, "precision": "bf16-mixed"},
    "ddp_bf16": {"strategy": "ddp", "batch_size": 2, "precision": "bf16-mixed"},
    "fsdp2_bf16": {"strategy": "fsdp2", "batch_size": 2, "precision": "bf16-mixed"},
}
WARMUP, ROUNDING, END = 3, 14, 20  # steps, as in the script


def train(directory, **configs):
    """Runs the script: a training of each name, one after the other; their exit statuses.

    Where one of a name is meant to be killed and resumed, the name ends in "_killed" the first time.
    """
    paths = []
    for name, config in configs.items():
        paths.append(directory / f"{name}.json")
        paths[-1].write_text(json.dumps(config | {"out": str(directory / f"{name.removesuffix('_killed')}.pt")}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MASTER_", "LOCAL_"))}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, paths)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        env=environment | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    return dict(zip(configs, map(int, run.stdout.split()), strict=True))


def load(directory, names):
    return {name: torch.load(directory / f"{name}.pt", weights_only=True) for name in names}


@pytest.fixture(scope="module")
def results(shared_folder):
    def run_all(directory):
        assert set(train(directory, **RUNS).values()) == {0}

    return load(shared_folder("trainings", run_all), RUNS)


def difference(one, other):
    """The largest distance of any offset at any step, in pixels."""
    assert list(one["seen"]) == list(other["seen"]) == list(range(END))
    return max((one["seen"][step] - other["seen"][step]).abs().max().item() for step in one["seen"])


def test_the_run_that_others_are_compared_with_does_what_it_should(results):
    seen = results["one"]["seen"]
    for step in range(WARMUP + 1):
        assert not seen[step].any()
    learned, rounded = seen[ROUNDING - 1], results["one"]["offsets"]
    assert learned.abs().max() > 0.5
    assert not torch.equal(learned, learned.round())
    assert torch.equal(rounded, rounded.round())
    assert rounded.any()
    assert all(torch.equal(seen[step], rounded) for step in range(ROUNDING, END))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "ddp_accumulating"])
def test_two_processes_learn_the_positions_of_one(results, name):
    """In float64 and without batch norm. FSDP2 cuts 18 numbers into 9 and 9: between the two of a tap."""
    assert difference(results["one"], results[name]) < 1e-12
    torch.testing.assert_close(results[name]["weights"], results["one"]["weights"], rtol=0, atol=1e-12)
    assert results[name]["rates"] == results["one"]["rates"]


@pytest.mark.parametrize("name", ["ddp_clipped", "fsdp2_clipped"])
def test_two_processes_learn_the_positions_of_one_under_clipping(results, name):
    # Torch 2.9 clips sharded float64 gradients by a norm in float32.
    assert difference(results["one_clipped"], results[name]) < 1e-6
    torch.testing.assert_close(results[name]["weights"], results["one_clipped"]["weights"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["ddp_bf16", "fsdp2_bf16"])
def test_bf16_mixed_keeps_positions_in_float32_and_processes_together(results, name):
    one, two = results["one_bf16"], results[name]
    assert one["offsets"].dtype == two["offsets"].dtype == torch.float32
    # Each process rounds its gradients to 8 bits: directions differ by some hundredths, of steps that add up to:
    way = sum(rates[1] for step, rates in one["rates"].items() if step < ROUNDING)
    learned = [run["seen"][ROUNDING - 1] for run in (one, two)]
    assert (learned[0] - learned[1]).norm() / learned[0].norm() < 0.1
    assert way > 0.5
    assert torch.equal(one["offsets"], one["offsets"].round())


#: Before the warm-up ends, while positions learn, when they are rounded, and after it: (first step, last step).
PHASES = [(1, WARMUP), (WARMUP + 1, ROUNDING - 1), (ROUNDING, ROUNDING), (ROUNDING + 1, END - 1)]


@pytest.fixture(scope="module")
def interrupted(shared_folder):
    """A training that nothing interrupts, and for each phase one that is killed at a random step and resumed."""
    config = {"strategy": "one", "batch_size": 4, "optimizer": "adamw"}

    def run_all(directory):
        configs = {"whole": config | {"checkpoints": str(directory / "whole")}}
        steps = [random.SystemRandom().randint(*phase) for phase in PHASES]
        for number, step in enumerate(steps):
            saving = config | {"checkpoints": str(directory / str(number))}
            configs[f"{number}_killed"] = saving | {"kill_at": step}
            configs[str(number)] = saving | {"ckpt_path": str(directory / str(number) / "last.ckpt")}
        statuses = train(directory, **configs)
        (directory / "steps.json").write_text(json.dumps({"steps": steps, "statuses": statuses}))

    directory = shared_folder("interrupted_trainings", run_all)
    return json.loads((directory / "steps.json").read_text()) | {"directory": directory}


@pytest.mark.parametrize("number", range(4), ids=[str(phase) for phase in PHASES])
def test_killed_at_a_random_step_and_resumed_is_as_if_never_killed(interrupted, number):
    """With a loader that keeps its place."""
    step, statuses = interrupted["steps"][number], interrupted["statuses"]
    assert (statuses["whole"], statuses[f"{number}_killed"], statuses[str(number)]) == (0, -signal.SIGKILL, 0)
    whole, resumed = load(interrupted["directory"], ["whole", str(number)]).values()
    assert min(resumed["seen"]) == step
    for at, offsets in resumed["seen"].items():
        assert torch.equal(offsets, whole["seen"][at]), f"killed at {step}: positions differ at {at}"
        assert resumed["rates"][at] == whole["rates"][at]
    assert torch.equal(resumed["weights"], whole["weights"])
    assert_same_state(resumed["optimizer"], whole["optimizer"])


def assert_same_state(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, values in one["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][key][name])), (key, name)
