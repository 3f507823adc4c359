"""docs/deployment.md: its code runs, and its table of ONNX operators is what each form is exported to."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_acu import convert_to_acu, round_acu
from lightning_acu.export import export_model
from lightning_acu.forms import FORMS

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()


def operators():
    """{(form, whether taps are whole): operators} as the docs list them."""
    rows = re.findall(r"^\| `(\w+)` \| (whole|between) pixels \| (.*) \|$", TEXT, re.MULTILINE)
    return {(form, where == "whole"): set(re.findall(r"`(\w+)`", names)) for form, where, names in rows}


def test_every_form_is_listed():
    assert {form for form, _ in operators()} == set(FORMS) - {"auto"}
    assert len(operators()) == 2 * (len(FORMS) - 1)


@pytest.mark.parametrize(("form", "whole"), operators())
def test_a_form_is_exported_to_the_operators_that_the_docs_list(tmp_path, form, whole):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = convert_to_acu(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)))
    nn.init.uniform_(model[0].offsets, -1.2, 1.2)
    if whole:
        round_acu(model)
    export_model(model, tmp_path / "net.onnx", input_size=(4, 12, 14), form=form)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert {node.op_type for node in graph.node} == operators()[form, whole]


def test_the_code_of_the_docs_runs(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "deployment.md", "exec"), namespace)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "any_size.onnx"}
