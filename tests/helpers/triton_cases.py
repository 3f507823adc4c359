"""What the tests of the Triton backend share: where they run, and how exactly."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = DEVICE == "cpu"  # a program takes milliseconds in the interpreter; on a GPU, each case is compiled


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 products without TF32, and memory that nobody wrote full of NaN."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    for owner, name, function in (
        (torch, "empty", empty), (torch, "empty_like", empty_like), (torch.Tensor, "new_empty", new_empty)
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, lambda *args, function=function, **kw: _poison(function(*args, **kw)))


def _poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(2**24)
