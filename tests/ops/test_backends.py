"""How a backend is chosen: by the answers of its own module, and with a word where a faster one cannot run."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from lightning_acu import acu_conv2d
from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import available_backends, backends, dense
from lightning_acu.ops.cpu import backend as cpu_backend

CASE = torch.randn(1, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.rand(9, 2)


@pytest.fixture
def newcomer(monkeypatch):
    """A backend that was only named in the registry, before the others; ``ran`` counts its calls."""

    def forward(*arguments):
        module.ran += 1
        return dense.forward(*arguments)

    module = SimpleNamespace(
        ran=0, why_not=lambda input: None, prefers=lambda *args: True, forward=forward, backward=dense.backward
    )
    monkeypatch.setattr(backends, "BACKENDS", {"new": module, **backends.BACKENDS})
    backends._warn_once.cache_clear()
    return module


def test_a_backend_is_added_by_naming_it(newcomer):
    assert "new" in available_backends()
    for backend in ("auto", "new"):
        acu_conv2d(*CASE, backend=backend)
    assert newcomer.ran == 2
    newcomer.prefers = lambda *args: False
    acu_conv2d(*CASE)
    assert newcomer.ran == 2


def test_a_named_backend_that_cannot_run_says_why(newcomer):
    newcomer.why_not = lambda input: "its device is busy"
    with pytest.raises(RuntimeError, match=r"`backend` \(='new'\) cannot run here: its device is busy"):
        acu_conv2d(*CASE, backend="new")


def test_auto_says_once_what_it_would_have_preferred(newcomer):
    newcomer.why_not = lambda input: "its device is busy"
    with pytest.warns(UserWarning, match="uses 'cython', about twice as slow as 'new' would be: its device is busy"):
        acu_conv2d(*CASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acu_conv2d(*CASE)
        newcomer.why_not, newcomer.prefers = lambda input: "another reason", lambda *args: False
        acu_conv2d(*CASE)  # nothing is lost, so nothing is said


def test_auto_says_that_the_compiled_kernels_are_missing_on_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(cpu_backend, "MISSING", "the compiled extension is missing")
    backends._warn_once.cache_clear()
    expected = acu_conv2d(*CASE, backend="dense")
    with pytest.warns(UserWarning, match="uses 'dense', about twice as slow as 'cython' would be: the compiled"):
        torch.testing.assert_close(acu_conv2d(*CASE), expected)
    assert not cpu_backend.prefers(*(tensor.to("meta") for tensor in CASE), geometry=None)


@pytest.mark.parametrize(
    ("weight", "kernel", "groups", "positions", "forward", "backward"),
    [
        ((64, 64), 3, 1, 1, True, True),
        ((64, 16), 3, 4, 1, True, True),
        ((128, 4), 3, 32, 1, True, True),  # narrow groups share nothing with each other, and need not
        ((64, 64), 3, 1, 8, False, False),  # runs of 8 outputs
        ((64, 64), 3, 1, 4, True, True),
        ((64, 1), 3, 64, 64, True, True),
        ((16, 16), 5, 1, 1, True, False),
        ((8, 8), 7, 1, 1, True, False),
        ((8, 8), 11, 1, 1, False, False),
        ((64, 64), 11, 1, 1, True, True),
        ((8, 1), 11, 8, 1, True, True),
    ],
)
def test_the_rule_on_a_cpu(weight, kernel, groups, positions, forward, backward):
    geometry = ConvGeometry((kernel, kernel), groups=groups)
    found = [
        cpu_backend.is_faster_by_rule((*weight, kernel, kernel), geometry, positions, backward=direction)
        for direction in (False, True)
    ]
    assert found == [forward, backward]
