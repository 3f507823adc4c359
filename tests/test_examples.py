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


@pytest.fixture
def deblurring(monkeypatch):
    """The folder of the example is imported from; its modules are forgotten afterwards."""
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(EXAMPLES / "deblurring"))
    yield
    for name in ("module", "photos", "train"):
        sys.modules.pop(name, None)


def test_deblurring(deblurring, tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLES / "deblurring" / "train.py"))["main"]
    rows = ["plain", "active"]
    results = main(["--steps", "60", "--rows", *rows, "--out", str(tmp_path), "--csv", str(tmp_path / "runs.csv")])
    assert [result["row"] for result in results] == rows
    assert all(result["psnr"] > 24 for result in results)  # an image is better than none; the input has 25 dB
    assert results[1]["parameters"] == results[0]["parameters"] + 4 * 18
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 3
    assert (tmp_path / "restored.png").stat().st_size > 10_000
    assert "| active |" in capsys.readouterr().out


def test_deblurring_photos(deblurring):
    import photos
    from scipy.signal import convolve2d

    image = torch.rand(1, 40, 31, generator=torch.Generator().manual_seed(0))
    kernel = photos.disc()[0, 0].double()
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert 3.5 < (kernel > 0).sum(0).max() / 2 <= photos.RADIUS + 1
    degraded, sharp = photos.blurred(image)
    expected = torch.from_numpy(convolve2d(image[0].double(), kernel, mode="valid"))
    assert torch.allclose(degraded[0].double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(sharp[0, 0, :5], image[0, 5, 5:10])
    one, again, other = (photos.Patches([image], 0.5, 9, seed, size=12) for seed in (3, 3, 4))
    assert all(torch.equal(first, second) for first, second in zip(one[7], again[7], strict=True))
    assert not torch.equal(one[7][1], other[7][1])
    assert {patch.shape for pair in (one[index] for index in range(9)) for patch in pair} == {(1, 12, 12)}
