"""The Python in the documentation runs as it stands."""

import json
import re
from pathlib import Path

import pytest

from lightning_acu.surgery import rules

DOCS = Path(__file__).parents[1] / "docs"


def run(name, count):
    """Every block of a file in order, in the current directory; what it leaves behind."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)
    assert len(blocks) == count
    namespace = {}
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance")
def test_surgery_md(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))  # it registers one
    monkeypatch.chdir(tmp_path)
    namespace = run("surgery.md", 14)
    assert {"model.safetensors", "squeezenet.pt", "squeezenet", "model.pt2"} == {
        path.name for path in tmp_path.iterdir()
    }
    assert type(namespace["again"]) is type(namespace["model"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance")
@pytest.mark.filterwarnings("ignore:RoundThenFinetune. after rounding all taps are where they started")
def test_training_md(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run("training.md", 13)
    assert {"shapes.png", "shapes.gif", "rounded.ckpt"} <= {path.name for path in tmp_path.iterdir()}
    assert list(namespace["stages"]) == ["before rounding", "after rounding", "after fine-tuning"]
    assert all((offsets == offsets.round()).all() for offsets in namespace["offsets"])


@pytest.mark.slow
def test_layers_md():
    namespace = run("layers.md", 3)
    assert namespace["report"].folded_macs == namespace["report"].macs


def test_recipes_pytorch_md():
    assert run("recipes/pytorch.md", 1)["positions"].step == 4


def test_recipes_deblurring_md():
    assert len(run("recipes/deblurring.md", 1)["callbacks"]) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance")
def test_tutorial_md(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = run("tutorial.md", 7)
    stages = namespace["stages"]
    assert stages["after rounding"]["accuracy"] > stages["before rounding"]["accuracy"] - 0.01  # rounding costs nothing
    assert stages["after fine-tuning"]["accuracy"] > 0.85
    assert {"shapes.png", "shapes.gif", "learned.png", "digits.pt2"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_faq_md():
    run("faq.md", 6)


def test_install_md(capsys):
    run("install.md", 1)
    assert "dense runs on the CPU" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance")
@pytest.mark.parametrize("name", ["convert_and_train", "deploy"])
def test_a_notebook_runs_and_is_stored_without_outputs(name):
    cells = json.loads((DOCS.parent / f"examples/notebooks/{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    namespace = {}
    for cell in code:
        exec(compile("".join(cell["source"]), name, "exec"), namespace)
    assert {"convert_and_train": "positions", "deploy": "program"}[name] in namespace


ROOMS = ("surgery", "callbacks", "training", "saving", "integrations", "data")


@pytest.mark.parametrize("folder", ["paper", "benchmarks", *(f"lightning_acu/{room}" for room in ROOMS)])
def test_a_readme_names_every_file_and_no_other(folder):
    folder = DOCS.parent / folder
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"`(\w+\.py)`", (folder / "README.md").read_text()))
    assert named == files
