"""A film of taps on their way: an animated GIF, of which only what moves is drawn for each frame."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image

from ..files import write_whole
from .panel import FIXED, FRAME, GRID, INK, LEARNED, MOST_SETS, SETS, SHARED, START
from .plot import Page
from .shapes import LayerShape, common_reach

__all__ = ["animate_shapes", "palette"]

_HOLD = 1.5  # seconds that the last frame stays
_SHORTEST = 0.02  # seconds a frame: browsers play shorter ones slowly


def animate_shapes(
    frames: Sequence[tuple[int, Sequence[LayerShape]]],
    path: str | os.PathLike[str],
    *,
    seconds: float = 6.0,
    dpi: int = 80,
) -> Path:
    """Write an animated GIF of the figure of :func:`plot_shapes`, "iteration N" for each frame. It repeats forever.

    All frames share one scale. Where two frames are equal to the pixel, the viewer sees one of them for longer.

    Args:
        frames: (iteration, shapes) of each moment, always of the same layers. A shape's later frames are
            ``dataclasses.replace(shape, positions=...)``: what else differs is not drawn again.
        path: where to write; ends in ".gif".
        seconds: how long all frames but the last take together, at 0.02 s a frame or more. The last one then stays
            for 1.5 s.
        dpi: pixels an inch: a panel is 1.2 to 3.4 inches wide, the more layers the smaller.

    Returns:
        ``path``.

    Raises:
        ValueError: there are no frames or no layers in them, the layers differ between frames, or another argument is
            out of range.
        OSError: the file cannot be written; no part of it is left.
    """
    path = Path(path)
    _check(frames, path, seconds, dpi)
    reach = max(common_reach(shapes) for _, shapes in frames)
    page = Page([shapes for _, shapes in frames], f"iteration {frames[0][0]:,}", reach, dpi)
    canvas = page.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    for artist in page.moving:
        artist.set_animated(True)  # left out of what is drawn once
    canvas.draw()
    background = canvas.copy_from_bbox(page.figure.bbox)

    colours = palette(max(len(shape.positions) for shape in frames[0][1]))
    size = canvas.get_width_height()
    images = []
    for iteration, shapes in frames:
        canvas.restore_region(background)
        page.show(shapes, f"iteration {iteration:,}")
        for artist in page.moving:
            artist.draw(canvas.get_renderer())
        image = Image.frombuffer("RGBA", size, canvas.buffer_rgba(), "raw", "RGBA", 0, 1).convert("RGB")
        images.append(image.quantize(palette=colours, dither=Image.Dither.NONE))

    pause = max(_SHORTEST, round(seconds / max(1, len(images) - 1), 2))  # GIF counts hundredths
    durations = [round(1000 * pause)] * (len(images) - 1) + [round(1000 * _HOLD)]
    first, *rest = images

    def save(temporary: Path) -> None:
        # Optimized: what did not change since the last frame is stored as transparent, in a third of the bytes.
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=True)

    write_whole(path, save)
    return path


def _check(frames: Sequence[tuple[int, Sequence[LayerShape]]], path: Path, seconds: float, dpi: int) -> None:
    if not frames:
        raise ValueError("`frames` (=[]) must hold at least one (iteration, shapes)")
    if not 0 < seconds < math.inf:
        raise ValueError(f"`seconds` (={seconds}) must be positive")
    if dpi < 1:
        raise ValueError(f"`dpi` (={dpi}) must be at least 1")
    if path.suffix.lower() != ".gif":
        raise ValueError(f"`path` (={str(path)!r}) must end in .gif")
    first = [(shape.name, tuple(shape.positions.shape)) for shape in frames[0][1]]
    if not first:
        raise ValueError(f"`frames` has no layers at iteration {frames[0][0]}; make them with shapes_of(model)")
    for iteration, shapes in frames[1:]:
        here = [(shape.name, tuple(shape.positions.shape)) for shape in shapes]
        if here != first:
            odd = sorted({name for name, _ in set(here) ^ set(first)}) or "the order of the layers"
            raise ValueError(
                f"`frames` must show the same layers: iteration {iteration} differs from iteration {frames[0][0]} "
                f"in {odd}"
            )


def palette(groups: int = MOST_SETS) -> Image.Image:
    """The colours of a figure with that many position groups, and their fading into white."""
    # By hand: chosen from the pixels, rare colours would be lost, and with them what tells position groups apart.
    fades = [(LEARNED, 6), (INK, 6), (START, 3), (SHARED, 4), (FRAME, 2), (GRID, 1)]
    fades += [(colour, 6) for colour in SETS[1 : min(groups, MOST_SETS)]]
    colours = [(1.0, 1.0, 1.0), to_rgb(FIXED)]
    for colour, levels in fades:
        colours += [_mixed(colour, "white", level / levels) for level in range(1, levels + 1)]
    colours += [_mixed(LEARNED, FIXED, level / 4) for level in (1, 2, 3)]
    image = Image.new("P", (1, 1))
    image.putpalette([round(255 * value) for colour in colours for value in colour])
    return image


def _mixed(colour: str, other: str, share: float) -> tuple[float, float, float]:
    red, green, blue = (share * a + (1 - share) * b for a, b in zip(to_rgb(colour), to_rgb(other), strict=True))
    return red, green, blue
