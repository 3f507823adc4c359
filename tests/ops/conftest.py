"""One case whose sizes all differ: swapped axes, groups or position groups cannot hide in it."""

import pytest
import torch


@pytest.fixture
def case():
    """input, weight, offsets, bias: kernel (3, 2), input (5, 4), 2 groups, 3 position groups; off the lattice."""
    double = {"dtype": torch.float64, "requires_grad": True}
    return (
        torch.randn(2, 4, 5, 4, **double),
        torch.randn(6, 2, 3, 2, **double),
        _off_lattice(3, 6, 2).requires_grad_(),
        torch.randn(6, **double),
    )


def _off_lattice(*shape):
    """Offsets in (-2, 2), at least 0.1 away from whole numbers."""
    whole = torch.randint(-2, 2, shape).double()
    return whole + 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)
