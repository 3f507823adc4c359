"""The picture of a model's learned shapes, in the manner of the paper's figure 5."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import nn

from ..checks import at_least
from .panel import FIXED, GRID, INK, LEARNED, MOST_SETS, SETS, SHARED, START, TIMES, Panel, note
from .shapes import LayerShape, common_reach, groups_that_share, shapes_of
from .text import fitting_size, text_width

__all__ = ["Page", "plot_shapes"]

_MARGIN = 0.12  # inches
_LEGEND_ROW = 0.22


def plot_shapes(
    model_or_shapes: nn.Module | Sequence[LayerShape], title: str | None = None, *, reach: float | None = None
) -> Figure:
    """Draw where the taps of every active convolution sit: one panel a layer, taps joined to the centre.

    Grey circles are where the taps started, the grid behind is the pixels of the layer's input (one line a pixel, or
    one for each ``dilation`` pixels where that is larger). Taps of one position group at the same place have a
    ring and their number. All panels share one scale, in units of that grid, which is the same after rounding; taps
    that ran far away are arrows at the border. Up to four position groups have a colour each; more are a cloud of dots,
    larger where they coincide, around the mean of each tap.

    Args:
        model_or_shapes: any module with active convolutions, or the result of :func:`shapes_of`.
        title: printed above, for example the iteration.
        reach: half the side of a panel in grid lines, for example to compare figures; None: chosen from the taps.

    Returns:
        A matplotlib Figure of its own (no pyplot state); ``figure.savefig("shapes.png")`` writes it.

    Raises:
        TypeError: ``model_or_shapes`` is neither, or ``reach`` is not a number.
        ValueError: the model has no active convolution, there are no shapes, or ``reach`` is not positive.
    """
    if not isinstance(model_or_shapes, nn.Module | Sequence):
        raise TypeError(f"`model_or_shapes` (={model_or_shapes!r}) must be a module, or what shapes_of(module) returns")
    shapes = shapes_of(model_or_shapes) if isinstance(model_or_shapes, nn.Module) else list(model_or_shapes)
    if not shapes:
        raise ValueError("`model_or_shapes` (=[]) has no layer to draw; make it with shapes_of(model)")
    if reach is not None and not at_least("reach", reach) > 0:
        raise ValueError(f"`reach` (={reach}) must be a positive number of grid lines")
    return Page([shapes], title, common_reach(shapes) if reach is None else reach).figure


class Page:
    """A figure with a panel for each layer, and room and a legend for everything that any of its frames shows.

    Args:
        frames: the shapes of the same layers at one or more moments; the first is drawn.
        title: printed above.
        reach: half the side of a panel, in grid lines.
        dpi: resolution.
    """

    def __init__(
        self, frames: Sequence[Sequence[LayerShape]], title: str | None, reach: float, dpi: float = 120
    ) -> None:
        shapes = frames[0]
        columns, rows = _columns_and_rows(len(shapes))
        side, size = _panel_size(len(shapes))
        step = _grid_step(reach)
        notes = any(note(shape, reach, step) for frame in frames for shape in frame)
        above = (4 + 2.8 * size) / 72  # the name and how far its taps moved
        below = 0.05 + (1.4 * size / 72 if notes else 0.0)
        gap = 0.14

        width = max(columns * (side + gap) - gap + 2 * _MARGIN, 4.2 if len(shapes) < 3 else 0)
        legend = _rows_that_fit(_legend(frames, reach, step), width)
        head, foot = (0.42 if title is not None else 0.1), _LEGEND_ROW * len(legend) + 0.12
        height = head + rows * (above + side + below) + foot
        self.figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

        left = (width - columns * (side + gap) + gap) / 2
        self.panels = []
        for index, shape in enumerate(shapes):
            row, column = divmod(index, columns)
            x, y = left + column * (side + gap), height - head - (row + 1) * (above + side) - row * below
            axes = self.figure.add_axes((x / width, y / height, side / width, side / height))
            self.panels.append(Panel(axes, shape, reach, step, size))
        for index, entries in enumerate(legend):
            y = (foot - 0.06 - (index + 0.5) * _LEGEND_ROW) / height
            self.figure.legend(
                handles=entries, loc="center", bbox_to_anchor=(0.5, y), ncols=len(entries), frameon=False,
                fontsize=_LEGEND_SIZE, labelcolor=INK, borderpad=0, borderaxespad=0, handletextpad=0.5,
                handlelength=1.2, columnspacing=_LEGEND_SPACE,
            )  # fmt: skip
        self._title = None
        if title is not None:
            self._title = self.figure.suptitle(title, y=1 - 0.23 / height, va="center", color=INK)
            self._title.set_parse_math(False)
            self._fit_title()

    def show(self, shapes: Sequence[LayerShape], title: str) -> None:
        """Move the taps to those of ``shapes``, under another title."""
        for panel, shape in zip(self.panels, shapes, strict=True):
            panel.show(shape)
        if self._title is not None:
            self._title.set_text(title)
            self._fit_title()

    @property
    def moving(self) -> list[Artist]:
        """What :meth:`show` changes, from the bottom up."""
        title: list[Artist] = [] if self._title is None else [self._title]
        return [artist for panel in self.panels for artist in panel.moving] + title

    def _fit_title(self) -> None:
        assert self._title is not None
        points = (self.figure.get_figwidth() - 2 * _MARGIN) * 72
        self._title.set_fontsize(fitting_size(self._title.get_text(), 12, points))


def _columns_and_rows(count: int) -> tuple[int, int]:
    """Few empty places, and about as wide as a screen."""
    if count <= 4:
        return count, 1

    def cost(columns: int) -> float:
        rows = math.ceil(count / columns)
        return (columns * rows - count) / count + abs(math.log(columns / rows / 1.5))

    columns = min(range(1, count + 1), key=cost)
    return columns, math.ceil(count / columns)


def _panel_size(count: int) -> tuple[float, float]:
    """Inches a side, and the points of its text."""
    for most, side, size in ((1, 3.4, 9.0), (4, 2.4, 8.5), (9, 2.1, 8.0), (20, 1.75, 7.5), (80, 1.45, 7.0)):
        if count <= most:
            return side, size
    return 1.2, 6.5


def _grid_step(reach: float) -> int:
    """1, 2, 5, 10, ...: every how many lines to draw, so that a panel has 50 at most."""
    return next(
        step for power in range(400) for step in (10**power, 2 * 10**power, 5 * 10**power) if reach <= 25 * step
    )


_LEGEND_SIZE, _LEGEND_SPACE = 8.0, 2.0


def _legend(frames: Sequence[Sequence[LayerShape]], reach: float, step: int) -> list[Line2D]:
    """An entry for each thing that is drawn in any frame."""
    shapes = frames[0]
    # Those drawn tap by tap; of a cloud only the notes tell.
    single = [shape for frame in frames for shape in frame if len(shape.positions) <= MOST_SETS]
    sets = max((len(shape.positions) for shape in single), default=0)

    def dot(label: str, color: str, size: float = 5, fill: bool = True) -> Line2D:
        return Line2D([], [], linestyle="", marker="o", color=color, ms=size, mfc=None if fill else "none", label=label)

    entries = [dot("started here", START, 6, fill=False)]
    if sets:
        entries.append(dot("learned" if sets == 1 else "learned, group 1", LEARNED))
    entries += [dot(f"group {index + 1}", SETS[index]) for index in range(1, sets)]
    if any(len(shape.positions) > MOST_SETS for shape in shapes):
        entries += [dot("learned, all groups", LEARNED, 3), dot("their mean", INK)]
    if any(not shape.movable.all() for shape in shapes):
        entries.append(dot("fixed centre", FIXED))
    if any(groups_that_share(shape) for shape in single):
        entries.append(dot(f"{TIMES}2: taps on one place", SHARED, 8, fill=False))
    if any("outside" in note(shape, reach, step) for shape in single):
        entries.append(Line2D([], [], linestyle="", marker=">", color=LEARNED, ms=5, label="further out"))
    grid = f"grid: {step} px of the layer's input" + (" or as noted" if any(s.unit > 1 for s in shapes) else "")
    return [*entries, Line2D([], [], color=GRID, linewidth=2, label=grid)]


def _rows_that_fit(entries: list[Line2D], width: float) -> list[list[Line2D]]:
    """The legend's entries in rows of ``width`` inches at most."""
    rows: list[list[Line2D]] = [[]]
    left = points = (width - 2 * _MARGIN) * 72
    for entry in entries:
        wide = text_width(str(entry.get_label()), _LEGEND_SIZE) + (1.2 + 0.5 + _LEGEND_SPACE) * _LEGEND_SIZE
        if wide > left and rows[-1]:
            rows.append([])
            left = points
        rows[-1].append(entry)
        left -= wide
    return rows
