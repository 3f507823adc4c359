"""Rounding many layers at once: the report, collisions, and that an error changes nothing."""

import pytest
import torch

from lightning_acu import ACUConv2d
from lightning_acu.training import LayerRounding, RoundingReport, check_collision, round_layers


def layer(*offsets, taps=3):
    """A 1 x ``taps`` layer whose centre is fixed; ``offsets`` are (dy, dx) of each tap."""
    conv = ACUConv2d(1, 1, (1, taps))
    with torch.no_grad():
        conv.offsets.copy_(torch.tensor(offsets).flatten())
    return conv


def test_the_report_counts_taps_that_can_move_and_how_far_rounding_moved_them():
    one = layer((0.0, 0.25), (0.0, 0.0), (3.0, 4.3))  # by 0.25 and 0.3; one of them ends away from its start
    two = layer((0.0, -1.4), (0.0, 0.0), (0.6, 0.3))  # by 0.4 and 0.5; both end away
    report = round_layers([("one", one), ("two", two)])
    assert (report.taps, report.away, report.collisions, report.separated) == (4, 3, {}, False)
    assert report.mean_distance == pytest.approx((0.25 + 0.3 + 0.4 + 0.5) / 4, rel=1e-5)
    assert report.max_distance == pytest.approx(0.5, rel=1e-5)
    assert str(report) == (
        "4 taps were moved by 0.36 pixels on average, by at most 0.50; 3 of them are not where they started; "
        "no two taps share a pixel"
    )
    assert torch.equal(one.offsets, torch.tensor([0.0, 0.0, 0.0, 0.0, 3.0, 4.0]))
    assert torch.equal(two.offsets, torch.tensor([0.0, -1.0, 0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize(("offset", "nothing"), [(0.4, True), (0.6, False)])
def test_nothing_learned(offset, nothing):
    assert round_layers([("one", layer((offset, 0.0), (0.0, 0.0), (0.0, 0.1)))]).nothing_learned is nothing


def test_layers_whose_taps_cannot_move():
    report = round_layers([("point", ACUConv2d(3, 3, 1))])
    assert report == RoundingReport(0, 0.0, 0.0, 0, {}, False, {"point": LayerRounding(0.0, 0.0)})
    assert not report.nothing_learned
    assert str(report).startswith("no tap can move; ")


def colliding():
    """The first tap falls on the fixed centre, by 0.8 to the right of its place at the left."""
    return layer((0.0, 0.8), (0.0, 0.0), (0.0, 0.2)), layer((0.0, 0.2), (0.0, 0.0), (0.0, 0.0))


def test_collisions_are_reported():
    one, two = colliding()
    report = round_layers([("one", one), ("two", two)], "report")
    assert report.collisions == {"one": 1}
    assert str(report).endswith("; taps rounded to the pixel of another: 1 in one")
    assert torch.equal(one.offsets, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]))


def test_a_collision_as_an_error_leaves_all_layers():
    layers = colliding()
    before = [conv.offsets.detach().clone() for conv in layers]
    with pytest.raises(RuntimeError, match=r"1 in one \(`collision`='error'\).* Choose 'separate', or 'report'"):
        round_layers(list(zip(("one", "two"), layers, strict=True)), "error")
    assert all(torch.equal(conv.offsets, offsets) for conv, offsets in zip(layers, before, strict=True))


def test_taps_are_put_apart_from_where_they_were_not_from_where_they_fell():
    one, two = colliding()
    report = round_layers([("one", one), ("two", two)], "separate")
    assert str(report).endswith("1 in one, then separated")
    for conv in (one, two):
        assert torch.equal(conv.offsets, conv.offsets.round())
        assert len(conv.positions[0].unique(dim=0)) == 3
    # (0, 0) costs 0.64 and any pixel beside the centre's 1.04: the nearest free one is its own place
    assert torch.equal(one.offsets, torch.zeros(6))
    assert report.max_distance == pytest.approx(0.8, rel=1e-5)


def test_another_choice():
    with pytest.raises(ValueError, match=r"`collision` \(='merge'\) must be 'report', 'error' or 'separate'"):
        check_collision("merge")
    with pytest.raises(ValueError, match=r"`collision` \(='merge'\)"):
        round_layers([], "merge")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("collision", ["report", "error", "separate"])
def test_positions_that_are_not_finite_are_refused_and_nothing_is_changed(value, collision):
    one, two = layer((0.0, 0.25), (0.0, 0.0), (3.0, 4.3)), layer((0.0, -1.4), (0.0, 0.0), (value, 0.3))
    groups = ACUConv2d(1, 2, 3, position_groups=2)
    with torch.no_grad():
        groups.offsets[18] = value
    before = [conv.offsets.detach().clone() for conv in (one, two, groups)]
    with pytest.raises(ValueError, match="not finite: tap 2 of two, tap 0 of position group 1 of three; the trainin"):
        round_layers([("one", one), ("two", two), ("three", groups)], collision)
    for conv, offsets in zip((one, two, groups), before, strict=True):
        assert torch.equal(conv.offsets.nan_to_num(9.0), offsets.nan_to_num(9.0))


def test_a_fixed_tap_has_no_position_that_could_be_wrong():
    round_layers([("one", layer((0.0, 0.25), (torch.nan, 0.0), (3.0, 4.3)))])
