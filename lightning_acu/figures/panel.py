"""One layer in one panel: what never changes is drawn once, and :meth:`Panel.show` moves the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import CircleCollection, LineCollection, PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from numpy.typing import NDArray

from .shapes import LayerShape, groups_that_share, mean_move
from .text import fitting_size, shortened

__all__ = ["FIXED", "FRAME", "GRID", "INK", "LEARNED", "MOST_SETS", "SETS", "SHARED", "START", "TIMES", "Panel", "note"]

#: Colours. Position groups that are drawn one by one have one each; they also differ for the colour-blind.
LEARNED = "#c8102e"
SETS = (LEARNED, "#0072b2", "#e69f00", "#009e73")
START, FIXED, SHARED = "#9aa0a6", "#000000", "#3b2a8c"
GRID, FRAME, INK = "#e4e7eb", "#c5c9cf", "#30343b"

#: With more position groups, their taps are a cloud of dots, and only the means are joined to the centre.
MOST_SETS = len(SETS)

TIMES = "×"  # noqa: RUF001

_Array = NDArray[np.float64]


class Panel:
    """Draws a layer into ``axes``, in units of its grid, and can draw its later positions without the rest.

    Args:
        axes: empty; the size it has now decides the size of the dots.
        shape: the layer.
        reach: half the side, in grid lines; taps further out become arrows at the border.
        step: grid lines of the unit from one that is drawn to the next.
        size: of the text, in points.
    """

    def __init__(self, axes: Axes, shape: LayerShape, reach: float, step: int, size: float) -> None:
        self._axes, self._reach, self._step, self._size = axes, reach, step, size
        axes.set(xlim=(-reach, reach), ylim=(reach, -reach), xticks=[], yticks=[])  # rows grow downwards
        for spine in axes.spines.values():
            spine.set(color=FRAME, linewidth=0.8)
        self._points = axes.get_window_extent().width * 72 / axes.figure.dpi
        self._dot = float(np.clip(0.2 * self._points / (2 * reach), 2.0, 9.0))  # diameter in points
        self._width = float(np.clip(self._dot / 5, 0.5, 1.4))

        self._draw_grid(shape)
        self._circles(1, edgecolor=START, size=1.25, label="start").set_offsets(_xy(_finite(shape.start, shape.unit)))
        small = max(0.8 * size, fitting_size(shape.name, size, self._points))
        name = shortened(shape.name, small, self._points)
        axes.set_title(name, fontsize=small, color=INK, y=1, pad=4 + 1.3 * size, parse_math=False)
        self._moved = self._caption(1, 3, "bottom")
        self._note = self._caption(0, -3, "top")

        self._spokes = LineCollection([], linewidths=self._width, zorder=2, label="spokes")
        axes.add_collection(self._spokes, autolim=False)
        self._cloud = self._circles(2.5, label="cloud")
        self._taps = self._circles(3, label="learned")
        self._fixed = self._circles(4, facecolor=FIXED, label="fixed")
        self._fixed.set_offsets(_xy(_finite(shape.start[~shape.movable], shape.unit)))
        self._rings = self._circles(5, edgecolor=SHARED, size=1.9, label="shared")
        self._arrows = PolyCollection([], linewidths=0, zorder=6, label="outside")
        axes.add_collection(self._arrows, autolim=False)
        self._counts: list[Text] = []
        self.show(shape)

    @property
    def moving(self) -> list[Artist]:
        """What :meth:`show` changes, and what lies above it, from the bottom up."""
        bottom: list[Artist] = [self._spokes, self._cloud, self._taps, self._fixed, self._rings, self._arrows]
        return [*bottom, *self._counts, self._moved, self._note]

    def show(self, shape: LayerShape) -> None:
        """Draw these positions, of the same layer, in place of the last ones."""
        taps = shape.positions.double().numpy() / shape.unit
        movable = shape.movable.numpy()
        single = len(taps) <= MOST_SETS
        moving = taps[:, movable]
        colours = np.repeat([to_rgba(colour) for colour in SETS[: len(taps)]], moving.shape[1], 0) if single else None
        if single:
            self._show_taps(moving.reshape(-1, 2), np.asarray(colours), 0.7)
        else:
            self._show_cloud(moving)
        self._show_shared(taps if single else taps[:0])
        self._moved.set_text(f"mean move {mean_move(shape):.2f} px")
        text = note(shape, self._reach, self._step)
        self._note.set(text=text, fontsize=fitting_size(text, 0.9 * self._size, self._points))

    def _show_taps(self, taps: _Array, colours: _Array, opacity: float) -> None:
        """Dots joined to the centre; ``taps`` (n, 2) in grid lines, ``colours`` (n, 4)."""
        known = ~np.isnan(taps).any(-1)
        taps, colours = np.nan_to_num(taps[known], posinf=1e30, neginf=-1e30), colours[known]
        extent = np.abs(taps).max(-1, initial=1e-9)
        outside = extent > self._reach
        # The border is where the tip of an arrow is.
        ends = np.where(outside[:, None], taps / extent[:, None] * self._reach * 0.98, taps)
        self._spokes.set_segments(list(np.stack((np.zeros_like(ends), _xy(ends)), 1)))
        self._spokes.set_color(_faded(colours, opacity))
        self._taps.set_offsets(_xy(taps[~outside]))
        self._taps.set_facecolor(colours[~outside])
        self._arrows.set_verts([self._arrow(tip) for tip in _xy(ends[outside])])
        self._arrows.set_facecolor(colours[outside])

    def _arrow(self, tip: _Array) -> _Array:
        along = tip / np.linalg.norm(tip) * self._reach * 0.1
        across = along[::-1] * (0.5, -0.5)
        return np.stack((tip, tip - along + across, tip - along - across))

    def _show_cloud(self, taps: _Array) -> None:
        """Small dots, larger where several taps coincide, and the mean of each tap; ``taps`` (P, K, 2)."""
        inside = np.nan_to_num(np.abs(taps), nan=np.inf).max(-1) <= self._reach
        # One complex number a place, -0 like 0: much faster to count than rows.
        places, counts = np.unique((taps[inside] + 0.0) @ np.array([1j, 1]), return_counts=True)
        self._cloud.set_offsets(np.stack((places.real, places.imag), -1))
        # Their opacities add up to about the same in every panel, however many there are.
        opacity = min(0.5, 2 / len(taps) ** 0.5)
        share = np.minimum(1, (counts - 1) / len(taps))
        small, large = self._area(0.55), self._area(2.2)
        if share.any():
            self._cloud.set_sizes(small + (large - small) * share)
            colours = np.tile(to_rgba(LEARNED), (len(places), 1))
            self._cloud.set_facecolor(_faded(colours, 1 - (1 - opacity) ** counts))
        else:
            self._cloud.set_sizes([small])
            self._cloud.set_facecolor(to_rgba(LEARNED, opacity))
        some = inside.any(0)
        means = np.where(inside[..., None], taps, 0).sum(0)[some] / inside.sum(0)[some, None]
        self._show_taps(means, np.tile(to_rgba(INK), (len(means), 1)), 0.8)

    def _show_shared(self, taps: _Array) -> None:
        """Rings and counts where several taps of one position group are on one place."""
        for text in self._counts:
            text.remove()
        most: dict[tuple[float, float], int] = {}
        for group in taps:
            for place, count in Counter((y, x) for y, x in (group + 0.0).tolist()).items():
                if count > 1 and max(map(abs, place)) <= self._reach:
                    most[place] = max(count, most.get(place, 0))
        self._rings.set_offsets(_xy(np.array(list(most)).reshape(-1, 2)))
        self._counts = [self._count(y, x, count) for (y, x), count in most.items()]

    def _count(self, y: float, x: float, count: int) -> Text:
        right, above = x < self._reach - 0.6, y > 0.6 - self._reach
        gap = 0.8 * self._dot
        size = float(np.clip(0.36 * self._points / (2 * self._reach), 5, self._size))  # leaves room for a neighbour's
        return self._axes.annotate(
            f"{TIMES}{count}", (x, y), (gap if right else -gap, gap if above else -gap), textcoords="offset points",
            ha="left" if right else "right", va="bottom" if above else "top", fontsize=size, weight="bold",
            color=SHARED, zorder=7, path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )  # fmt: skip

    def _draw_grid(self, shape: LayerShape) -> None:
        reach = self._reach
        lines: list[_Array] = []
        for axis in (0, 1):
            # Pixels of even kernels lie half a dilation beside the centre.
            nearest = shape.start[:, axis].abs().min().item() / shape.unit if shape.regular else 0.0
            marks = np.arange(-np.ceil(reach / self._step), np.ceil(reach / self._step) + 1) * self._step + nearest
            for mark in marks[abs(marks) < reach]:
                line = np.array([[-reach, mark], [reach, mark]])
                lines.append(line if axis == 0 else line[:, ::-1])
        grid = LineCollection(lines, colors=GRID, linewidths=0.7, zorder=0, label="grid")
        self._axes.add_collection(grid, autolim=False)

    def _circles(
        self, zorder: float, facecolor: str = "none", edgecolor: str = "none", size: float = 1, label: str = ""
    ) -> CircleCollection:
        """No circles yet, ``size`` dots wide, at offsets in the panel's units."""
        circles = CircleCollection(
            [self._area(size)], offsets=np.zeros((0, 2)), offset_transform=self._axes.transData, facecolors=facecolor,
            edgecolors=edgecolor, linewidths=0 if edgecolor == "none" else self._width, zorder=zorder, label=label,
        )  # fmt: skip
        self._axes.add_collection(circles, autolim=False)
        return circles

    def _area(self, size: float) -> float:
        return np.pi / 4 * (size * self._dot) ** 2

    def _caption(self, edge: int, points: float, va: str) -> Text:
        """A line in the middle, ``points`` above the lower (0) or the upper (1) edge."""
        return self._axes.annotate(
            "", (0.5, edge), (0, points), xycoords="axes fraction", textcoords="offset points", ha="center", va=va,
            fontsize=0.9 * self._size, color="#5f6670", annotation_clip=False,
        )  # fmt: skip


def note(shape: LayerShape, reach: float, step: int = 1) -> str:
    """What is special about a layer, for the line below its panel; often nothing."""
    taps = shape.positions.double() / shape.unit
    lost = int(taps.isnan().any(-1).sum())
    outside = int((taps.abs().amax(-1) > reach).sum())
    parts = [f"grid is {shape.unit * step:g} px"] if shape.unit > 1 else []
    if len(taps) > 1:
        parts.append(f"{len(taps)} groups")
    if len(taps) > MOST_SETS:
        count = groups_that_share(shape)
        parts += [f"{TIMES}2 in {count}"] if count else []
    parts += [f"{outside} outside"] if outside else []
    parts += [f"{lost} not a number"] if lost else []
    return ", ".join(parts)


def _finite(positions: object, unit: float) -> _Array:
    return np.asarray(positions, dtype=np.float64).reshape(-1, 2) / unit


def _xy(rows: _Array) -> _Array:
    """(..., 2) from (row, column) to (x, y)."""
    return rows[..., ::-1]


def _faded(colours: _Array, opacity: float | _Array) -> Any:  # matplotlib's types know no arrays of colours
    faded = colours.copy()
    faded[:, 3] = opacity
    return faded
