"""Which plain convolutions a set of positions becomes: the plan behind the dense backend and the fold."""

import pytest
import torch

from lightning_acu.expansion import Window, expand_kernel, plan_windows, split_offsets
from lightning_acu.geometry import ConvGeometry

THREE = ConvGeometry((3, 3), padding=(1, 1, 1, 1))


def offsets_of(target, geometry):
    """Offsets (1, K, 2) that bring the taps of ``geometry`` to the rows and columns in ``target``."""
    return (torch.tensor(target) - torch.tensor(geometry.grid())).double()[None]


def square(step):
    return [(i * step, j * step) for i in (-1, 0, 1) for j in (-1, 0, 1)]


@pytest.mark.parametrize("dilation", [1, 2, 5, 36])
def test_zero_offsets_keep_the_kernel_its_padding_and_its_dilation(dilation):
    geometry = ConvGeometry((3, 3), padding=(dilation,) * 4, dilation=(dilation, dilation))
    plan = plan_windows(torch.zeros(1, 9, 2), geometry)
    assert plan.windows == (Window(-dilation, -dilation, 3, 3, (dilation, dilation)),)
    assert plan.windows[0].padding(geometry) == (dilation,) * 4


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_taps_on_a_dilated_grid_become_that_dilated_kernel(step):
    plan = plan_windows(offsets_of(square(step), THREE), THREE)
    assert plan.windows == (Window(-step, -step, 3, 3, (step, step)),)


def test_fractional_taps_become_a_larger_kernel():
    plan = plan_windows(torch.full((1, 9, 2), 0.5), THREE)
    assert plan.windows == (Window(-2, -2, 5, 5),)  # rows -1..2, made even on both sides


def test_taps_drawn_to_the_centre_become_a_smaller_kernel():
    plan = plan_windows(offsets_of([(0, 0)] * 9, THREE), THREE)
    assert plan.windows == (Window(0, 0, 1, 1),)


def test_scattered_taps_become_one_small_kernel_each():
    far = [(0, 0), (40, 3), (-30, -7)] * 3
    windows = plan_windows(offsets_of(far, THREE), THREE).windows
    assert sorted((w.top, w.left, w.height, w.width) for w in windows) == [(-30, -7, 1, 1), (0, 0, 1, 1), (40, 3, 1, 1)]
    windows = plan_windows(offsets_of(far, THREE) + 0.5, THREE).windows
    assert {(w.height, w.width) for w in windows} == {(2, 2)}


def test_the_gradient_needs_the_neighbours_that_the_value_does_not():
    value = plan_windows(torch.zeros(1, 9, 2), THREE)
    gradient = plan_windows(torch.zeros(1, 9, 2), THREE, gradient=True)
    assert value.cells == 9
    assert (value.index == 9).sum() == 27  # 3 of 4 neighbours have no weight
    assert (gradient.index < gradient.cells).all()


def test_cells_that_never_meet_the_image_are_dropped():
    offsets = torch.zeros(1, 9, 2)
    offsets[0, 0] = 1e5
    assert plan_windows(offsets, THREE, (6, 7)).windows == (Window(-1, -1, 3, 3),)
    assert plan_windows(offsets + 1e5, THREE, (6, 7)).windows == ()


def test_a_window_keeps_the_output_size_for_every_stride():
    geometry = ConvGeometry((3, 2), (2, 3), (1, 0, 2, 1), (2, 1))
    for window in plan_windows(torch.randn(1, 6, 2) * 30, geometry).windows:
        top, left, bottom, right = window.padding(geometry)
        for height in range(5, 12):
            padded = (height + top + bottom, height + left + right)
            small = ConvGeometry((window.height, window.width), geometry.stride, dilation=window.dilation)
            assert small.output_size(padded) == geometry.output_size((height, height))


def test_expanded_kernel_keeps_the_sum_of_the_weights():
    weight, offsets = torch.randn(6, 2, 3, 3).double(), torch.randn(3, 9, 2).double() * 2
    expanded = expand_kernel(weight, offsets, plan_windows(offsets, THREE))
    torch.testing.assert_close(expanded.sum(-1), weight.sum((-1, -2)), rtol=0, atol=1e-12)


def test_split_offsets_by_floor():
    whole, fraction = split_offsets(torch.tensor([-1.25, -1.0, 0.0, 0.75, 2.0]))
    assert whole.tolist() == [-2, -1, 0, 0, 2]
    assert fraction.tolist() == [0.75, 0.0, 0.0, 0.75, 0.0]
