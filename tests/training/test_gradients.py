"""Unit gradients, and taps kept near or drawn to whole pixels: against the formulas, tap by tap."""

import math

import pytest
import torch

from lightning_acu import ACUConv2d
from lightning_acu.training import (
    NonFiniteGuard,
    apply_to_pairs_,
    confine_positions_,
    normalize_gradients_,
    unit_vectors,
)


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


def layers():
    """A 3x3 layer, and a 1x4 one of two position groups; taps anywhere within two pixels."""
    torch.manual_seed(3)
    result = [ACUConv2d(2, 2, 3), ACUConv2d(2, 4, (1, 4), position_groups=2)]
    for layer in result:
        with torch.no_grad():
            layer.offsets.uniform_(-2, 2)
    return result


def test_gradients_of_many_layers_are_normalised_tap_by_tap_and_missing_ones_left_out():
    one, two = layers()
    still = ACUConv2d(2, 2, 3)
    for layer in (one, two):
        layer.offsets.grad = torch.randn_like(layer.offsets)
    before = [layer.offsets.grad.clone() for layer in (one, two)]
    kept = one.offsets.grad
    normalize_gradients_([one, still, two])
    assert one.offsets.grad is kept
    assert still.offsets.grad is None
    for layer, gradient in zip((one, two), before, strict=True):
        pairs = zip(gradient.view(-1, 2).tolist(), layer.offsets.grad.view(-1, 2).tolist(), strict=True)
        for (y, x), unit in pairs:
            length = math.hypot(y, x)
            assert unit == pytest.approx((y / length, x / length), rel=1e-5)


@pytest.mark.parametrize("limit", [None, 0.75])
@pytest.mark.parametrize("pull", [0.0, 0.25, 1.0])
def test_taps_go_back_to_the_limit_and_then_a_share_of_the_way_to_the_nearest_pixel(limit, pull):
    mine = layers()
    before = [layer.offsets.detach().clone().double() for layer in mine]
    confine_positions_(mine, pull, limit)
    for layer, offsets in zip(mine, before, strict=True):
        start = layer.starting_offsets().double().view(-1, 2)
        for (y, x), (start_y, start_x), after in zip(
            offsets.view(-1, 2).tolist(), start.tolist(), layer.offsets.view(-1, 2).tolist(), strict=True
        ):
            length = math.hypot(y - start_y, x - start_x)
            if limit is not None and length > limit:
                y, x = start_y + (y - start_y) * limit / length, start_x + (x - start_x) * limit / length
            expected = (y + (round(y) - y) * pull, x + (round(x) - x) * pull)
            assert after == pytest.approx(expected, abs=1e-6)


def test_several_kinds_of_tensors_at_once():
    """Of two precisions; each with its own share of the further argument."""
    tensors = [torch.arange(4.0), torch.arange(6.0, dtype=torch.float64), torch.arange(2.0)]
    factors = [torch.full_like(tensor, factor) for tensor, factor in zip(tensors, (2, 3, 4), strict=True)]
    expected = [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    apply_to_pairs_(tensors, torch.mul, factors)
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_guard_leaves_taps_alone_whose_gradient_is_not_finite(optimizer):
    """The other taps go exactly where they go without it."""
    results = []
    for poison in (None, torch.nan):
        convs, guard = layers(), NonFiniteGuard()
        offsets = [conv.offsets for conv in convs]
        steps = optimizer(offsets, lr=0.1, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
        torch.manual_seed(4)
        for step in range(3):
            for parameter in offsets:
                parameter.grad = torch.randn_like(parameter)
            if step == 1 and poison is not None:
                offsets[0].grad[7] = poison
                before = offsets[0].detach().clone()
            guard.before_step(convs)
            steps.step()
            guard.after_step()
            if step == 1 and poison is not None:
                assert torch.equal(offsets[0][6:8], before[6:8])
                assert not torch.equal(offsets[0][:6], before[:6])
        results.append([parameter.detach().clone() for parameter in offsets])
        assert guard.count == (0 if poison is None else 1)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0][:6], results[1][0][:6])
    assert torch.equal(results[0][0][8:], results[1][0][8:])
    assert results[1][0].isfinite().all()


def test_the_guard_counts_no_step_that_was_skipped():
    convs, guard = layers(), NonFiniteGuard()
    for skipped, count in ((torch.ones(()), 0), (torch.zeros(()), 1), (None, 2)):
        convs[0].offsets.grad = torch.full_like(convs[0].offsets, 1.0)
        convs[0].offsets.grad[0] = torch.inf
        guard.before_step(convs)  # the other layer has no gradient
        guard.after_step(skipped)
        assert guard.count == count
