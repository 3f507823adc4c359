"""Whole pixels near real-valued taps, against a search through all ways to give taps different pixels."""

import time

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, convert_to_acu, round_acu
from lightning_acu.rounding import round_offsets


def grid_of(kernel, dilation):
    return torch.tensor([(i * dilation[0], j * dilation[1]) for i in range(kernel[0]) for j in range(kernel[1])])


def least_cost(taps, fixed):
    """Smallest sum of squared distances to different pixels, by trying all; (K, 2) float64."""
    reach = range(-2, 3)  # of 4 taps at most, enough to find a free pixel
    places = []
    for index, tap in enumerate(taps):
        near = [(round(tap[0].item()) + y, round(tap[1].item()) + x) for y in reach for x in reach]
        places.append([tuple(round(v) for v in tap.tolist())] if index == fixed else near)
    best = float("inf")

    def search(index, used, cost):
        nonlocal best
        if cost >= best:
            return
        if index == len(taps):
            best = cost
            return
        for pixel in places[index]:
            if pixel not in used:
                way = sum((p - t) ** 2 for p, t in zip(pixel, taps[index].tolist(), strict=True))
                search(index + 1, used | {pixel}, cost + way)

    search(0, frozenset(), 0.0)
    return best


@pytest.mark.parametrize(
    ("kernel", "dilation", "fixed"),
    [
        ((1, 3), (1, 1), None),
        ((1, 3), (1, 2), 1),
        ((3, 1), (2, 1), 1),
        ((2, 2), (1, 3), None),
        ((2, 2), (1, 1), None),
        ((1, 4), (1, 1), 0),
    ],
)
@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_separated_taps_have_the_least_sum_of_squared_distances(kernel, dilation, fixed, spread):
    grid = grid_of(kernel, dilation).double()
    collapsed = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randn(2, 1, 2, generator=generator, dtype=torch.float64)  # each group gathers somewhere
        offsets = target - grid + spread * torch.randn(2, len(grid), 2, generator=generator, dtype=torch.float64)
        if seed % 2 and fixed is not None:  # around the tap that stays
            offsets += grid[fixed] - target
        result = round_offsets(offsets, grid, fixed, separate=True)
        assert torch.equal(result, result.round())
        movable = torch.ones_like(grid)
        if fixed is not None:
            movable[fixed] = 0
        for before, after in zip(offsets * movable + grid, result * movable + grid, strict=True):
            assert len(after.unique(dim=0)) == len(grid)
            if fixed is not None:
                assert torch.equal(after[fixed], grid[fixed])
            collapsed += len(before.round().unique(dim=0)) < len(grid)
            cost = (after - before).square().sum().item()
            assert cost == pytest.approx(least_cost(before, fixed), abs=1e-9)
    assert collapsed >= 3


def test_groups_without_collisions_are_plainly_rounded():
    grid = grid_of((1, 3), (1, 1)).float()
    apart = torch.tensor([[0.4, -1.4], [9.3, 9.9], [0.5, 1.5]])
    together = torch.tensor([[0.0, 1.2], [0.0, 0.0], [0.0, 0.0]])
    result = round_offsets(torch.stack([apart, together]), grid, 1, separate=True)
    assert torch.equal(result[0], apart.round())
    assert not torch.equal(result[1], together.round())
    plain = round_offsets(torch.stack([apart, together]), grid, 1)
    assert torch.equal(plain, torch.stack([apart, together]).round())


def test_a_tap_gives_way_to_the_fixed_one_whatever_the_stored_offset_of_that_is():
    grid = grid_of((1, 3), (1, 1)).float()
    for stored in (0.0, -1.0, 1.0, 7.3):
        offsets = torch.tensor([[[0.2, 0.9], [stored, stored], [0.0, 0.0]]])
        result = round_offsets(offsets, grid, 1, separate=True)
        assert torch.equal(result[0, 0] + grid[0], torch.tensor([1.0, 1.0]))  # (0.2, 0.9): its second choice
        assert torch.equal(result[0, 2], torch.zeros(2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_positions_that_are_not_finite_are_an_error_when_separating(value):
    offsets = torch.tensor([[[0.0, 0.0], [value, 0.0]]])
    with pytest.raises(ValueError, match="positions are not finite: tap 1;"):
        round_offsets(offsets, grid_of((1, 2), (1, 1)).float(), separate=True)


@pytest.mark.parametrize("side", [5, 7])
def test_many_taps_in_one_place_are_separated_at_once(side):
    grid = grid_of((side, side), (1, 1)).float()
    offsets = (torch.tensor([3.3, -2.6]) - grid + 0.01 * torch.randn(len(grid), 2)).expand(2, -1, -1)
    start = time.perf_counter()
    result = round_offsets(offsets, grid, len(grid) // 2, separate=True)
    assert time.perf_counter() - start < 2
    for group in result:
        assert len((group + grid).unique(dim=0)) == len(grid)
        # A disc, as nothing is nearer (the fixed tap aside).
        assert (group + grid - torch.tensor([3.3, -2.6])).norm(dim=-1).sort().values[-2] < (
            side**2 / torch.pi
        ) ** 0.5 + 1


def test_the_dtype_and_the_argument_stay():
    for dtype in (torch.float32, torch.float64):
        offsets = torch.tensor([[[0.0, 0.6], [0.0, -0.4]]], dtype=dtype, requires_grad=True)
        result = round_offsets(offsets, grid_of((1, 2), (1, 1)).to(dtype), separate=True)
        assert result.dtype == dtype
        assert not result.requires_grad
        assert offsets[0, 0, 1].item() == pytest.approx(0.6)
        assert sorted((result[0] + torch.tensor([[0, 0], [0, 1]])).tolist()) == [[0, 0], [0, 1]]


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (2, 3), (4, 1)])
def test_a_layer_separates_its_taps_in_place(kernel):
    layer = ACUConv2d(2, 4, kernel, dilation=(1, 2), position_groups=2)
    with torch.no_grad():
        layer.offsets.copy_(-layer._grid(layer.offsets).flatten().repeat(2) + 0.1 * torch.randn(layer.offsets.shape))
    identity = layer.offsets
    assert layer.round_(separate=True) is layer
    assert layer.offsets is identity
    assert torch.equal(layer.offsets, layer.offsets.round())
    for group in layer.positions:
        assert len(group.unique(dim=0)) == len(group)
    if layer.fixed_tap is not None:
        assert not layer.displacement[:, layer.fixed_tap].any()


def test_a_layer_of_any_shape_separates_taps_that_start_together():
    layer = ACUConv2d.from_positions(1, 1, [(0.0, 0.0), (0.2, 0.1), (-0.1, 0.4), (0.0, 0.0)])
    layer.round_(separate=True)
    assert torch.equal(layer.positions[0, 0], torch.zeros(2))  # fixed
    assert len(layer.positions[0].unique(dim=0)) == 4
    assert torch.equal(layer.positions[0, 2], torch.tensor([0.0, 1.0]))
    assert torch.equal(layer.positions[0, 1], torch.tensor([1.0, 0.0]))


def test_plain_rounding_is_to_even_and_keeps_collisions():
    layer = ACUConv2d(1, 1, (1, 3))
    with torch.no_grad():
        layer.offsets.copy_(torch.tensor([0.5, 1.5, 0.0, 0.0, -0.5, -0.51]))
    layer.round_()
    assert layer.offsets.tolist() == [0, 2, 0, 0, 0, -1]
    assert torch.equal(layer.positions[0, 1], layer.positions[0, 2])


def test_a_whole_model_can_be_separated():
    model = convert_to_acu(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 5)))
    with torch.no_grad():
        for layer in model:
            layer.offsets.copy_(-layer._grid(layer.offsets).flatten() + 0.2 * torch.randn(layer.offsets.shape))
    round_acu(model, separate=True)
    for layer in model:
        assert torch.equal(layer.offsets, layer.offsets.round())
        assert len(layer.positions[0].unique(dim=0)) == layer.geometry.taps


def test_separating_what_is_separate_changes_nothing():
    grid = grid_of((2, 3), (1, 1)).float()
    offsets = 0.6 * torch.randn(3, 6, 2)
    once = round_offsets(offsets, grid, 1, separate=True)
    once[:, 1] = 0
    assert torch.equal(round_offsets(once, grid, 1, separate=True), once)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", [{}, {"separate": True}, {"to": "dilation"}], ids=str)
def test_a_layer_refuses_to_round_positions_that_are_not_finite(value, how):
    layer = ACUConv2d(2, 4, 3, position_groups=2)
    with torch.no_grad():
        layer.offsets.fill_(0.3)
        layer.offsets[8:10] = value  # of the fixed tap, which counts for nothing
    layer.round_(**how)
    with torch.no_grad():
        layer.offsets.fill_(0.3)
        layer.offsets[20] = value
    before = layer.offsets.clone()
    with pytest.raises(
        ValueError, match="positions are not finite: tap 1 of position group 1; the training has diverged"
    ):
        layer.round_(**how)
    assert torch.equal(layer.offsets.nan_to_num(9.0), before.nan_to_num(9.0))


def test_positions_on_the_meta_device_are_rounded_without_values():
    layer = ACUConv2d(2, 4, 3, device="meta")
    assert layer.round_().offsets.is_meta
    with pytest.raises(ValueError, match="on the meta device, without values to separate"):
        layer.round_(separate=True)
