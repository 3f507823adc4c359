"""The numbers that describe positions, on positions made by hand."""

import math

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, convert_to_acu
from lightning_acu.metrics import LayerStatistics, layer_statistics, model_statistics


def placed(offsets, *arguments, **keywords):
    """A layer with (P, K, 2) of these offsets."""
    layer = ACUConv2d(1, 2, *arguments, **keywords)
    layer.offsets.data.copy_(torch.tensor(offsets).flatten())
    return layer


def test_a_fresh_layer_has_not_moved():
    assert layer_statistics(ACUConv2d(4, 4, 3, dilation=(1, 2))) == LayerStatistics(
        0.0, 0.0, pytest.approx(math.sqrt(1 + 4)), 0.0, 0
    )


def test_distances_are_over_the_taps_that_can_move():
    # 1x3, so two taps move: by 5 pixels (to column 3 of row 4 below its place), and by 0.5.
    layer = placed([[[4.0, -3.0], [9.0, 9.0], [0.0, 0.5]]], (1, 3), dilation=2)
    statistics = layer_statistics(layer)
    assert statistics.mean_displacement == pytest.approx((5 + 0.5) / 2)
    assert statistics.max_displacement == 5
    assert statistics.receptive_radius == pytest.approx(math.hypot(4, -2 - 3))
    assert statistics.off_lattice == 0.5
    assert statistics.collisions == 0


def test_without_a_fixed_centre_all_taps_count():
    layer = placed([[[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]], (1, 3), fixed_centre=False)
    assert layer_statistics(layer) == LayerStatistics(1.0, 3.0, 3.0, 0.0, 0)


@pytest.mark.parametrize(
    ("offsets", "collisions"),
    [
        ([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], 0),
        ([[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]], 1),  # onto the fixed tap
        ([[[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]]], 2),  # all on one place
        ([[[0.25, 2.5], [0.0, 0.0], [0.25, 0.5]]], 1),  # between pixels
        ([[[0.0, 2.0], [0.0, 0.0], [0.0, 0.01]]], 0),  # nearly
        ([[[0.0, 2.0], [0.0, 0.0], [-0.0, 0.0]]], 1),  # minus zero is zero
        ([[[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 7.0], [0.0, -2.0]]], 2),  # one in each group
        ([[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]], 0),  # across groups: none
    ],
)
def test_collisions_are_counted_within_each_position_group(offsets, collisions):
    layer = placed(offsets, (1, 3), position_groups=len(offsets))
    assert layer_statistics(layer).collisions == collisions


def test_displacement_of_any_shape_counts_from_where_it_started():
    layer = ACUConv2d.from_positions(1, 1, [(0.0, 0.0), (1.5, 2.0), (-1.0, 0.0)])
    assert layer_statistics(layer) == LayerStatistics(0.0, 0.0, 2.5, 0.5, 0)
    with torch.no_grad():
        layer.offsets += 1
    assert layer_statistics(layer).mean_displacement == pytest.approx(math.sqrt(2))
    assert layer_statistics(layer).receptive_radius == pytest.approx(math.hypot(2.5, 3))


def test_a_layer_that_cannot_move_has_zeros():
    assert layer_statistics(ACUConv2d(3, 3, 1)) == LayerStatistics(0.0, 0.0, 0.0, 0.0, 0)


def test_a_model_has_one_entry_for_each_active_layer():
    conv = nn.Conv2d(4, 4, 3)
    model = convert_to_acu(nn.ModuleDict({"a": conv, "b": nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.Conv2d(4, 4, 5))}))
    model["b"][2].offsets.data.fill_(1.0)
    statistics = model_statistics(model)
    assert list(statistics) == ["a", "b.2"]
    assert statistics["b.2"].max_displacement == pytest.approx(math.sqrt(2))
    assert statistics["b.2"] == layer_statistics(model["b"][2])
    assert model_statistics(nn.Linear(1, 1)) == {}


def test_statistics_carry_no_gradient():
    layer = placed([[[0.5, 0.0], [0.0, 0.0], [0.0, 1.0]]], (1, 3))
    assert all(isinstance(value, float | int) for value in vars(layer_statistics(layer)).values())
    assert layer.offsets.grad is None
