"""The scripts in examples/ run, learn, and resume exactly; those of libraries that are not installed are skipped."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_acu import acu_layers

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def example(monkeypatch, capsys):
    """A function (name) that gives the example's ``main``."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def check(model, text):
    losses = [float(loss) for loss in re.findall(r"loss'?:? '?([\d.]+)", text)]
    assert losses[-1] < 0.5 * losses[0]
    offsets = [layer.offsets.detach() for _, layer in acu_layers(model)]
    assert all(torch.equal(value, value.round()) for value in offsets)
    assert max(value.abs().max() for value in offsets) >= 1


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "package", "stop"),
    [("pytorch_loop", "torch", "2"), ("accelerate_loop", "accelerate", "1"), ("fabric_loop", "lightning", "1")],
)
def test_loop(example, capsys, tmp_path, name, package, stop):
    pytest.importorskip(package)
    main = example(name)
    whole = main([])
    check(whole, capsys.readouterr().out)
    main(["--checkpoint", str(tmp_path / "last"), "--stop-after", stop])
    assert equal(main(["--checkpoint", str(tmp_path / "last")]), whole)


def test_ignite_loop(example, capsys, tmp_path):
    pytest.importorskip("ignite")
    main = example("ignite_loop")
    whole = main([])
    check(whole, capsys.readouterr().out)
    main(["--folder", str(tmp_path), "--stop-after", "2"])
    (file,) = tmp_path.glob("*_48.pt")  # steps of ignite: batches
    assert equal(main(["--resume", str(file)]), whole)


def test_huggingface_trainer(example, capsys, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    main = example("huggingface_trainer")
    whole = main(["--output", str(tmp_path / "whole")]).model
    check(whole, capsys.readouterr().out)
    checkpoint = tmp_path / "whole/checkpoint-24"
    assert equal(main(["--output", str(tmp_path / "resumed"), "--resume", str(checkpoint)]).model, whole)


def test_every_example_has_a_page_and_is_run():
    """plain_script.py by tests/integrations/test_run.py, gpu_report.py on GPUs by whoever has one."""
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    pages = "".join(path.read_text() for path in (EXAMPLES.parent / "docs").glob("**/*.md"))
    assert names == {
        "pytorch_loop", "plain_script", "huggingface_trainer", "accelerate_loop", "fabric_loop", "ignite_loop",
        "several_machines", "gpu_report",
    }  # fmt: skip
    assert all(f"examples/{name}.py" in pages for name in names)


def test_several_machines():
    """As docs/several-machines.md starts it: two processes by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(EXAMPLES / "several_machines.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes; positions the same in all: True; rounded: True" in done.stdout
    assert int(re.search(r"furthest tap: (\d+)", done.stdout)[1]) >= 1
