"""The picture of a model's learned shapes, in the manner of the paper's figure 5."""

from __future__ import annotations

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from .conv import ACUConv2d, acu_layers

__all__ = ["plot_shapes"]

_LEARNED, _START = "#c8102e", "#9aa0a6"


def plot_shapes(model: nn.Module, title: str | None = None) -> Figure:
    """Draw where the taps of every active convolution sit: one panel a layer, taps joined to the centre.

    Grey circles are where the taps started, the grid behind is the pixels of the layer's input (one line a pixel, or
    one for each ``dilation`` pixels where that is larger). All panels share one scale in units of that grid. Layers
    with several position groups show all sets, faintly, over each other.

    Args:
        model: any module with active convolutions.
        title: printed above, for example the iteration.

    Returns:
        A matplotlib Figure of its own (no pyplot state); ``figure.savefig("shapes.png")`` writes it.

    Raises:
        ValueError: ``model`` has no active convolution.
    """
    layers = list(acu_layers(model))
    if not layers:
        raise ValueError(f"`model` (={type(model).__name__}) has no active convolution; call convert_to_acu first")
    columns = min(len(layers), max(4, math.ceil(math.sqrt(len(layers) * 1.6))))
    rows = math.ceil(len(layers) / columns)
    side = 1.9 if columns > 6 else 2.3  # inches a panel
    figure = Figure(figsize=(columns * side, rows * (side + 0.35) + 0.5), dpi=120, layout="constrained")
    reach = max(_reach(layer) for _, layer in layers)
    for index, (name, layer) in enumerate(layers):
        _draw(figure.add_subplot(rows, columns, index + 1), name or type(model).__name__, layer, reach)
    if title is not None:
        figure.suptitle(title, fontsize=12)
    return figure


def _unit(layer: ACUConv2d) -> float:
    """Pixels between two grid lines: dilated layers would not fit beside others otherwise."""
    return float(max(1, *layer.dilation))


def _reach(layer: ACUConv2d) -> float:
    positions = layer.positions.nan_to_num(0, 0, 0).abs().max().item()
    return max(1.5, positions / _unit(layer) + 0.4)


def _draw(axes: Axes, name: str, layer: ACUConv2d, reach: float) -> None:
    unit = _unit(layer)
    learned = layer.positions.cpu() / unit
    start = learned[0] - layer.displacement.cpu()[0] / unit
    fixed = (~layer.movable).cpu()

    limit = math.ceil(reach)
    for line in range(-limit, limit + 1, 1 + limit // 50):  # no more lines than a panel can show
        axes.axhline(line, color="#e4e7eb", linewidth=0.7, zorder=0)
        axes.axvline(line, color="#e4e7eb", linewidth=0.7, zorder=0)
    axes.scatter(start[:, 1], start[:, 0], s=26, facecolors="none", edgecolors=_START, linewidths=0.9, zorder=1)
    alpha = max(0.04, 1 / len(learned))
    for taps in learned:
        for y, x in taps.tolist():
            axes.plot([0, x], [0, y], color=_LEARNED, linewidth=0.9, alpha=alpha * 0.75, zorder=2)
        moving = taps[~fixed]
        axes.scatter(moving[:, 1], moving[:, 0], s=20, color=_LEARNED, alpha=alpha, zorder=3, linewidths=0)
    if fixed.any():
        centre = learned[0][fixed]
        axes.scatter(centre[:, 1], centre[:, 0], s=20, color="black", zorder=4, linewidths=0)

    axes.set_xlim(-reach, reach)
    axes.set_ylim(reach, -reach)  # rows grow downwards, as in the image
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#c5c9cf")
    short = name if len(name) <= 24 else "…" + name[-23:]
    mean = layer.displacement.norm(dim=-1)[:, layer.movable].mean().nan_to_num()
    grid = f", grid {unit:g} px" if unit > 1 else ""
    axes.set_title(f"{short}\nmoved {mean:.2f} px{grid}", fontsize=7.5, color="#30343b")
