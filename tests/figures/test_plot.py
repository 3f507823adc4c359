"""The figure of learned shapes, read back from what it draws."""
# ruff: noqa: RUF001 - × is meant

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

import lightning_acu
from lightning_acu import ACUConv2d, convert_to_acu
from lightning_acu.figures import plot_shapes, shapes_of


def collection(axes, label):
    [found] = [collection for collection in axes.collections if collection.get_label() == label]
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 10, 53])
def test_one_panel_for_each_layer_and_a_file(stack, count, tmp_path):
    figure = plot_shapes(stack(count), title="iteration 7")
    assert [axes.get_title() for axes in figure.axes] == [str(index) for index in range(count)]
    assert figure.get_suptitle() == "iteration 7"
    assert plt.get_fignums() == []  # nothing for pyplot to keep
    figure.savefig(tmp_path / "shapes.png", dpi=30)
    assert (tmp_path / "shapes.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4, 10, 53, 100])
def test_panels_fit_a_page_and_nothing_overlaps(stack, count):
    figure = plot_shapes(stack(count), "a title that is too long for a figure of one layer " * (count < 3))
    width, height = figure.get_size_inches()
    assert min(width, height) >= 2
    assert max(width, height) <= 30
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    parts = [text for axes in figure.axes for text in (axes.title, *axes.texts) if text.get_text()]
    boxes += [text.get_window_extent(renderer) for text in parts if "×" not in text.get_text()]
    boxes += [row.get_window_extent(renderer) for row in figure.legends]
    if figure.get_suptitle():
        boxes.append(figure.suptitle(figure.get_suptitle()).get_window_extent(renderer))
    corners = np.array([box.extents for box in boxes])
    assert corners[:, :2].min() >= 0
    assert (corners[:, 2:].max(0) <= figure.bbox.max).all()
    # Two boxes overlap where they do in both directions; a pixel's touch is none.
    low, high = corners[:, None, :2] + 1, corners[None, :, 2:] - 1
    overlap = ((low < high) & (low < high).swapaxes(0, 1)).all(-1)
    assert not (overlap & ~np.eye(len(boxes), dtype=bool)).any()


def test_taps_are_drawn_where_they_are_with_rows_downwards(drawn):
    layer = ACUConv2d(1, 1, 3)
    layer.offsets.data.copy_(torch.arange(18.0) / 32)
    figure = plot_shapes(layer)
    [axes] = figure.axes
    moved = layer.positions[0][layer.movable].double()
    torch.testing.assert_close(drawn(axes, "learned"), moved)
    assert drawn(axes, "fixed").tolist() == [[0, 0]]
    assert drawn(axes, "start").tolist() == [[row, column] for row in (-1, 0, 1) for column in (-1, 0, 1)]
    spokes = np.array(collection(axes, "spokes").get_segments())
    assert (spokes[:, 0] == 0).all()
    np.testing.assert_array_equal(spokes[:, 1], moved[:, [1, 0]])
    bottom, top = axes.get_ylim()
    assert bottom > layer.positions[..., 0].max() > 0 > top
    assert legend(figure) == ["started here", "learned", "fixed centre", "grid: 1 px of the layer's input"]


def test_dilated_layers_are_drawn_in_units_of_their_dilation(drawn):
    layer = ACUConv2d(1, 1, 3, dilation=24)
    nn.init.constant_(layer.offsets, 12.0)
    [axes] = plot_shapes(layer).axes
    assert drawn(axes, "learned").tolist()[0] == [-0.5, -0.5]
    assert texts(axes) == ["mean move 16.97 px", "grid is 24 px"]


def test_any_shape_is_drawn_from_where_it_started(drawn):
    layer = ACUConv2d.from_positions(1, 2, [(0.0, 1.5), (-2.0, 0.0), (0.5, 0.5)])
    with torch.no_grad():
        layer.offsets += 0.25
    [axes] = plot_shapes(layer).axes
    assert drawn(axes, "start").tolist() == [[0.0, 1.5], [-2.0, 0.0], [0.5, 0.5]]
    assert drawn(axes, "learned").tolist() == [[0.25, 1.75], [-1.75, 0.25], [0.75, 0.75]]


@pytest.mark.parametrize(("kernel", "lines"), [(3, {-1, 0, 1}), (2, {-1.5, -0.5, 0.5, 1.5})])
def test_the_grid_goes_through_the_pixels(kernel, lines):
    [axes] = plot_shapes(ACUConv2d(1, 1, kernel)).axes
    segments = collection(axes, "grid").get_segments()
    assert {start[0] for start, end in segments if start[0] == end[0]} == lines
    assert {start[1] for start, end in segments if start[1] == end[1]} == lines


def test_one_scale_for_all_panels_and_after_rounding():
    model = nn.Sequential(ACUConv2d(1, 1, 3), ACUConv2d(1, 1, 5), ACUConv2d(1, 1, 2))
    for layer in model:
        nn.init.normal_(layer.offsets, 0, 0.4)
    before = {axes.get_xlim() for axes in plot_shapes(model).axes}
    lightning_acu.round_acu(model)
    assert {axes.get_xlim() for axes in plot_shapes(model).axes} == before
    assert len(before) == 1
    assert {axes.get_xlim() for axes in plot_shapes(shapes_of(model), reach=6.5).axes} == {(-6.5, 6.5)}


def test_taps_on_one_place_have_a_ring_and_their_number(drawn):
    layer = ACUConv2d(2, 2, 3, position_groups=2)
    offsets = layer.offsets.data.view(2, 9, 2)
    offsets[0, 0] = torch.tensor((1.0, 1.0))  # on the fixed centre
    offsets[0, 2] = offsets[0, 8] = torch.tensor((0.0, -1.0))  # each on its neighbour
    offsets[1, 8] = torch.tensor((-2.0, 0.0))  # on tap 2 of its group, where tap 1 of the other is not
    offsets[1, 5] = torch.tensor((-1.0, 0.0))
    offsets[:, 3] = torch.tensor((0.1, 0.0))  # at one place in two groups: no collision
    figure = plot_shapes(layer)
    [axes] = figure.axes
    counts = {tuple(text.xy[::-1]): text.get_text() for text in axes.texts if text.get_text().startswith("×")}
    assert counts == {(0, 0): "×2", (-1, 0): "×2", (1, 0): "×2", (-1, 1): "×3"}
    assert {tuple(place) for place in drawn(axes, "shared").tolist()} == set(counts)
    assert "×2: taps on one place" in legend(figure)
    assert "×2: taps on one place" not in legend(plot_shapes(ACUConv2d(1, 1, 3)))


def test_a_few_position_groups_have_a_colour_each(drawn):
    layer = ACUConv2d(3, 3, 3, position_groups=3)
    nn.init.normal_(layer.offsets, 0, 0.2)
    figure = plot_shapes(layer)
    [axes] = figure.axes
    torch.testing.assert_close(drawn(axes, "learned"), layer.positions[:, layer.movable].flatten(0, 1).double())
    colours = [to_hex(colour) for colour in collection(axes, "learned").get_facecolor()]
    assert [len(set(colours[start : start + 8])) for start in (0, 8, 16)] == [1, 1, 1]
    assert len(set(colours)) == 3
    assert legend(figure)[1:4] == ["learned, group 1", "group 2", "group 3"]


def test_many_position_groups_are_a_cloud_and_their_mean(drawn):
    layer = ACUConv2d(64, 64, 3, groups=64, position_groups=64)
    nn.init.uniform_(layer.offsets, -0.4, 0.4)
    [axes] = plot_shapes(layer).axes
    moving = layer.positions[:, layer.movable].double()
    assert {tuple(place) for place in drawn(axes, "cloud").tolist()} == {
        tuple(place) for place in moving.flatten(0, 1).tolist()
    }
    torch.testing.assert_close(drawn(axes, "learned"), moving.mean(0))
    assert len(collection(axes, "spokes").get_segments()) == 8
    assert "64 groups" in texts(axes)

    layer.offsets.data[:4] = torch.tensor((0.0, 0.0, 0.0, -1.0))  # one group's tap 1 on its tap 0
    figure = plot_shapes(layer.round_())
    [axes] = figure.axes
    places, sizes = drawn(axes, "cloud").tolist(), collection(axes, "cloud").get_sizes()
    assert len(places) == 8
    assert sizes[places.index([-1, 0])] < sizes[places.index([1, 1])]  # 63 taps, and 64
    assert "64 groups, ×2 in 1" in texts(axes)
    assert "×2: taps on one place" not in legend(figure)  # no rings in a cloud


def test_long_names_keep_their_end():
    model = nn.ModuleDict({"a_rather_long_name_of_a_stage" * 3: nn.ModuleDict({"conv_dw": nn.Conv2d(2, 2, 3)})})
    title = plot_shapes(convert_to_acu(model)).axes[0].get_title()
    assert title.startswith("…")
    assert title.endswith("stage.conv_dw")
    assert plot_shapes(ACUConv2d(1, 1, 3)).axes[0].get_title() == "ACUConv2d"


@pytest.mark.parametrize("value", [1e4, torch.inf, -torch.inf])
def test_taps_that_ran_away_are_arrows_at_the_border(drawn, value, tmp_path):
    layer = ACUConv2d(1, 1, 3)
    layer.offsets.data[2 * 5 + 1] = value  # a tap beside the centre, along the row
    figure = plot_shapes(layer)
    [axes] = figure.axes
    assert axes.get_xlim() == (-1.75, 1.75)  # the others are as large as ever
    [arrow] = collection(axes, "outside").get_paths()
    tip = arrow.vertices[np.abs(arrow.vertices[:, 0]).argmax()]
    assert tip[1] == 0
    assert 1.5 < tip[0] * np.sign(value) <= 1.75
    assert len(drawn(axes, "learned")) == 7
    assert "1 outside" in texts(axes)
    assert "further out" in legend(figure)
    figure.savefig(tmp_path / "shapes.png", dpi=30)


def test_taps_that_are_lost_are_counted(drawn, tmp_path):
    layer = ACUConv2d(1, 1, 3)
    layer.offsets.data[0] = torch.nan
    figure = plot_shapes(layer)
    [axes] = figure.axes
    assert len(drawn(axes, "learned")) == 7
    assert "1 not a number" in texts(axes)
    figure.savefig(tmp_path / "shapes.png", dpi=30)
    many = ACUConv2d(8, 8, 3, position_groups=8)
    for value in (torch.nan, torch.inf):
        many.offsets.data[:3] = value
        plot_shapes(many).savefig(tmp_path / "shapes.png", dpi=30)


def test_a_panel_has_no_line_for_each_of_20_000_pixels():
    layer = ACUConv2d(1, 1, 3)
    nn.init.constant_(layer.offsets, 1e4)
    figure = plot_shapes(layer)
    assert len(collection(figure.axes[0], "grid").get_segments()) <= 110
    assert "grid: 500 px of the layer's input" in legend(figure)


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"`model` \(=Sequential\) has no active convolution; call convert_to_acu"):
        plot_shapes(nn.Sequential(nn.Conv2d(1, 1, 3)))
    with pytest.raises(ValueError, match=r"`model_or_shapes` \(=\[\]\) has no layer to draw"):
        plot_shapes([])
    for reach in (0, -1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=rf"`reach` \(={reach}\) must"):
            plot_shapes(ACUConv2d(1, 1, 3), reach=reach)


def test_the_names_are_where_they_were():
    assert lightning_acu.plot_shapes is plot_shapes
