"""What a picture needs, apart from the model."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d
from lightning_acu.figures import LayerShape, shapes_of
from lightning_acu.figures.shapes import common_reach, groups_that_share, mean_move


def moved(layer, *offsets):
    """The shape of ``layer`` with these first numbers as offsets, and of the same layer rounded."""
    layer.offsets.data[: len(offsets)] = torch.tensor(offsets)
    [before] = shapes_of(layer)
    [after] = shapes_of(layer.round_())
    return before, after


def test_shapes_are_those_of_the_layers():
    model = nn.ModuleDict(
        {
            "a": ACUConv2d(2, 4, (3, 2), dilation=(2, 1), position_groups=2),
            "b": ACUConv2d.from_positions(2, 2, [(0.0, 0.0), (0.1, -3.0)]),
        }
    )
    nn.init.normal_(model["a"].offsets)
    first, second = shapes_of(model)
    assert (first.name, first.unit, first.regular) == ("a", 2.0, True)
    assert (second.name, second.unit, second.regular) == ("b", 1.0, False)
    for shape, layer in ((first, model["a"]), (second, model["b"])):
        assert torch.equal(shape.positions, layer.positions)
        assert torch.equal(shape.movable, layer.movable)
    assert first.start.tolist() == [[y, x] for y in (-2, 0, 2) for x in (-0.5, 0.5)]
    assert torch.equal(second.start, torch.tensor([(0.0, 0.0), (0.1, -3.0)]))
    assert second.movable.tolist() == [False, True]


def test_shapes_are_copies_and_know_their_start_when_taps_are_lost():
    layer = ACUConv2d(1, 1, 3)
    [shape] = shapes_of(layer)
    layer.offsets.data.fill_(torch.nan)
    assert shape.positions.isfinite().all()
    assert not shape.positions.requires_grad
    [lost] = shapes_of(layer)
    assert torch.equal(lost.start, shape.start)
    assert shape.name == "ACUConv2d"


def test_a_model_without_active_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"`model` \(=Sequential\) has no active convolution; call convert_to_acu"):
        shapes_of(nn.Sequential(nn.Conv2d(1, 1, 3)))


def test_mean_move_is_of_the_taps_that_move_and_are_known():
    shape, _ = moved(ACUConv2d(1, 1, 3), 3.0, 4.0)
    assert mean_move(shape) == pytest.approx(5 / 8)
    positions = shape.positions.clone()
    positions[0, 1] = torch.nan
    assert mean_move(replace(shape, positions=positions)) == pytest.approx(5 / 7)
    assert mean_move(shapes_of(ACUConv2d(1, 1, 1))[0]) == 0


def test_groups_that_share():
    positions = torch.tensor([[[0, 1.0], [-0.0, 1]], [[0, 1], [1, 0]], [[torch.nan, 1], [torch.nan, 1]]])
    shape = LayerShape("a", positions, torch.zeros(2, 2), torch.ones(2, dtype=torch.bool), 1.0)
    assert groups_that_share(shape) == 1


@pytest.mark.parametrize(
    ("kernel", "dilation", "offset", "reach"),
    [
        (3, 1, 0.49, 1.75),
        (3, 1, -0.51, 2.75),  # the top left tap, upwards
        (3, 1, 0.5, 1.75),  # ties go to the even
        (3, 1, 1.5, 1.75),
        (3, 1, -1.5, 3.75),
        (3, 1, -1.49, 2.75),
        (2, 1, -0.6, 2.75),
        (2, 1, -0.4, 1.75),
        (3, 12, -5.6, 2.75),  # 17.6 px: nearer to 18, which is half-way to the second line
        (3, 12, -5.4, 1.75),
        (5, 1, 0.2, 2.75),
    ],
)
def test_reach_is_the_same_before_and_after_rounding(kernel, dilation, offset, reach):
    before, after = moved(ACUConv2d(1, 1, kernel, dilation=dilation), offset)
    assert common_reach([before]) == common_reach([after]) == reach
    assert before.positions.abs().max() / before.unit < reach


def test_reach_is_the_same_for_any_positions(stack):
    for seed in range(20):
        torch.manual_seed(seed)
        for layer in stack(4):
            nn.init.normal_(layer.offsets, 0, 1.5)
            before, after = moved(layer)
            assert common_reach([before]) == common_reach([after])
    layer = ACUConv2d.from_positions(1, 1, [(1.5, 0.0), (0.0, 2.4)])
    before, after = moved(layer)
    assert common_reach([before]) == common_reach([after]) == 2.75


def test_reach_forgets_the_few_that_ran_away_but_not_the_many():
    layer = ACUConv2d(1, 1, 3)
    for value in (1e4, torch.inf, torch.nan):
        layer.offsets.data[:2] = value
        assert common_reach(shapes_of(layer)) == 1.75
    nn.init.constant_(layer.offsets, 20.0)
    assert common_reach(shapes_of(layer)) == 21.75
    nn.init.constant_(layer.offsets, torch.nan)
    assert common_reach(shapes_of(layer)) == 1.75
