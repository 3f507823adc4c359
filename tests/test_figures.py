"""The figure of learned shapes."""

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn

from lightning_acu import ACUConv2d, convert_to_acu
from lightning_acu.figures import plot_shapes


def stack(count):
    """A model with ``count`` active convolutions of many kinds, moved."""
    kinds = [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "dilation": (2, 1), "position_groups": 2},
        {"kernel_size": 5, "groups": 4, "position_groups": 4, "fixed_centre": False},
        {"kernel_size": 1},
    ]
    model = nn.Sequential(*(ACUConv2d(4, 4, **kinds[index % 4]) for index in range(count)))
    for layer in model:
        nn.init.uniform_(layer.offsets, -1, 1)
    return model


@pytest.mark.parametrize("count", [1, 10, 53])
def test_one_panel_for_each_layer_and_a_file(count, tmp_path):
    figure = plot_shapes(stack(count), title="iteration 7")
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == [str(index) for index in range(count)]
    assert figure.get_suptitle() == "iteration 7"
    assert plt.get_fignums() == []  # nothing for pyplot to keep
    figure.savefig(tmp_path / "shapes.png", dpi=30)
    assert (tmp_path / "shapes.png").stat().st_size > 1000


def test_panels_fit_a_page():
    for count in (1, 10, 53):
        width, height = plot_shapes(stack(count)).get_size_inches()
        assert min(width, height) >= 2
        assert max(width, height) <= 30


def drawn(axes, colour):
    """The points of the scatters of that colour, as (row, column)."""
    found = []
    for scatter in axes.collections:
        colours = scatter.get_facecolor() if len(scatter.get_facecolor()) else scatter.get_edgecolor()
        if to_hex(colours[0]) == colour:
            found.append(torch.as_tensor(scatter.get_offsets().data)[:, [1, 0]])
    return torch.cat(found)


def test_taps_are_drawn_where_they_are_with_rows_downwards():
    layer = ACUConv2d(1, 1, 3)
    layer.offsets.data.copy_(torch.arange(18.0) / 32)
    [axes] = plot_shapes(layer).axes
    moved = layer.positions[0][layer.movable].double()
    torch.testing.assert_close(drawn(axes, "#c8102e"), moved)
    assert drawn(axes, "#000000").tolist() == [[0, 0]]
    assert drawn(axes, "#9aa0a6").tolist() == [[row, column] for row in (-1, 0, 1) for column in (-1, 0, 1)]
    bottom, top = axes.get_ylim()
    assert bottom > layer.positions[..., 0].max() > 0 > top


def test_dilated_layers_are_drawn_in_units_of_their_dilation():
    layer = ACUConv2d(1, 1, 3, dilation=24)
    nn.init.constant_(layer.offsets, 12.0)
    [axes] = plot_shapes(layer).axes
    assert drawn(axes, "#c8102e").tolist()[0] == [-0.5, -0.5]
    assert "grid 24 px" in axes.get_title()
    assert "moved 16.97 px" in axes.get_title()


def test_any_shape_is_drawn_from_where_it_started():
    layer = ACUConv2d.from_positions(1, 2, [(0.0, 1.5), (-2.0, 0.0), (0.5, 0.5)])
    with torch.no_grad():
        layer.offsets += 0.25
    [axes] = plot_shapes(layer).axes
    assert drawn(axes, "#9aa0a6").tolist() == [[0.0, 1.5], [-2.0, 0.0], [0.5, 0.5]]
    assert drawn(axes, "#c8102e").tolist() == [[0.25, 1.75], [-1.75, 0.25], [0.75, 0.75]]


def test_long_names_keep_their_end():
    model = nn.ModuleDict({"a_rather_long_name_of_a_stage": nn.ModuleDict({"conv_dw": nn.Conv2d(2, 2, 3)})})
    title = plot_shapes(convert_to_acu(model)).axes[0].get_title()
    assert title.startswith("…")
    assert "stage.conv_dw\n" in title
    assert plot_shapes(ACUConv2d(1, 1, 3)).axes[0].get_title().startswith("ACUConv2d")


@pytest.mark.parametrize("value", [1e4, torch.nan, torch.inf])
def test_taps_that_ran_away_are_still_drawn(value, tmp_path):
    layer = ACUConv2d(1, 1, 3)
    layer.offsets.data[0] = value
    figure = plot_shapes(layer)
    assert len(figure.axes[0].lines) < 500  # not a line for each of 20,000 pixels
    figure.savefig(tmp_path / "shapes.png")


def test_a_model_without_active_convolutions_is_refused():
    with pytest.raises(ValueError, match=r"`model` \(=Sequential\) has no active convolution; call convert_to_acu"):
        plot_shapes(nn.Sequential(nn.Conv2d(1, 1, 3)))
