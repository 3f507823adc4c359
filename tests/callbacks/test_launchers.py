"""Who calls the callbacks, and in which process: spawned processes, and Fabric."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import TinyModule
from lightning.fabric import Fabric

from lightning_acu import convert_to_acu
from lightning_acu.callbacks import ConvertToACU, OffsetLogger, PositionLRSchedule, RoundThenFinetune

pytestmark = pytest.mark.slow

SCRIPT = """
import functools
import json
import sys

sys.path.insert(0, {tests!r})

import lightning.pytorch as pl
import torch
from helpers.tiny import TinyModule, loader

from lightning_acu.callbacks import ConvertToACU, PositionLRSchedule


class Validating(TinyModule):
    def validation_step(self, batch, batch_idx):
        pass


def run(method, strategy, convert, devices=1):
    module = Validating(functools.partial(torch.optim.SGD, lr=0.1), convert=convert)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ConvertToACU(), PositionLRSchedule(1.0, warmup_steps=0)],
    )
    try:
        getattr(trainer, method)(module, loader())
    except Exception as error:
        return str(error)
    return module.offsets.abs().max().item() if convert else "done"


if __name__ == "__main__":
    arguments = [
        ("fit", "ddp_notebook", False), ("fit", "ddp_spawn", False), ("fit", "ddp_notebook", True),
        ("validate", "ddp_notebook", False), ("fit", "ddp_spawn", True, 2),
    ]
    print(json.dumps([run(*each) for each in arguments]))
"""


@pytest.fixture(scope="module")
def results(shared_folder):
    """What trainings in spawned processes came to: an error's message, or how far a tap moved."""

    def run_all(folder):
        (folder / "script.py").write_text(SCRIPT.format(tests=str(Path(__file__).parents[1])))
        command = [sys.executable, str(folder / "script.py")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "results.json").write_text(done.stdout.splitlines()[-1])

    names = ["notebook", "spawn", "converted before", "validated", "two spawned"]
    return dict(zip(names, json.loads((shared_folder("spawned", run_all) / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("strategy", ["notebook", "spawn"])
def test_converting_copies_in_spawned_processes_is_an_error(results, strategy):
    assert "ConvertToACU: this strategy starts processes that convert copies of Validating" in results[strategy]
    assert "call convert_to_acu in its __init__, or use strategy='ddp'" in results[strategy]


@pytest.mark.parametrize("how", ["converted before", "two spawned"])
def test_a_module_that_converted_itself_gets_its_positions_back(results, how):
    assert results[how] > 0.1


def test_copies_that_are_only_validated_may_be_converted(results):
    assert results["validated"] == "done"


CALLBACKS = [ConvertToACU(), PositionLRSchedule(), RoundThenFinetune(at_step=1), OffsetLogger()]


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda callback: type(callback).__name__)
@pytest.mark.parametrize("kind", ["LightningModule", "module", "module without optimizer"])
def test_fabric_is_told_that_it_calls_no_hook_of_ours(callback, kind):
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = TinyModule() if kind == "LightningModule" else convert_to_acu(torch.nn.Conv2d(2, 3, 3))
    optimizers = [] if "without" in kind else [torch.optim.SGD(net.parameters(), lr=0.1)]
    with pytest.raises(TypeError, match=rf"{type(callback).__name__} is a callback of .*\.PositionTrainer"):
        fabric.setup(net, *optimizers)


def test_fabric_is_told_in_the_first_step_where_module_and_optimizer_are_set_up_one_by_one():
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[PositionLRSchedule()])
    net = convert_to_acu(torch.nn.Conv2d(2, 3, 3))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.setup_module(net)
    with pytest.raises(TypeError, match=r"PositionLRSchedule is a callback of .*\.PositionTrainer"):
        optimizer.step()
