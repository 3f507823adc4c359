"""The Python in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.filterwarnings("ignore:`isinstance")
def test_training_md(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(), re.DOTALL)
    assert len(blocks) == 8
    namespace = {}
    for block in blocks:
        exec(compile(block, "training.md", "exec"), namespace)
    assert {"shapes.png", "shapes.gif", "rounded.ckpt"} <= {path.name for path in tmp_path.iterdir()}
    assert list(namespace["rounding"].results) == ["before_rounding", "after_rounding", "final"]
