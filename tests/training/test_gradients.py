"""Unit gradients, and taps kept near or drawn to whole pixels: against the formulas, tap by tap."""

import pytest
import torch

from lightning_acu.training import unit_vectors


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [
        ((3.0, 4.0), (0.6, 0.8)),
        ((-2.0, 0.0), (-1.0, 0.0)),
        ((0.0, 0.0), (0.0, 0.0)),
        ((3e-30, 4e-30), (0.6, 0.8)),  # squares of these underflow in float32
        ((3e30, -4e30), (0.6, -0.8)),  # and of these overflow
    ],
)
def test_unit_vectors(gradient, expected):
    full = torch.ones(9, 2)
    full[3] = torch.tensor(gradient)
    result = unit_vectors(full)
    torch.testing.assert_close(result[3], torch.tensor(expected))
    torch.testing.assert_close(result[0], torch.full((2,), 0.5**0.5))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_does_not_become_a_direction(value):
    """GradScaler must see it and skip the step; without a scaler it shows, as in the weights."""
    result = unit_vectors(torch.tensor([[value, 1.0], [3.0, 4.0]]))
    assert not result[0].isfinite().all()
    torch.testing.assert_close(result[1], torch.tensor([0.6, 0.8]))
