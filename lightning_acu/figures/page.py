"""One HTML file, with nothing outside it, that shows the shapes of a model, their film, and tables beside them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .shapes import LayerShape, common_reach, mean_move

__all__ = ["Fields", "Frame", "Note", "TableOf", "shapes_page"]

#: (step, shapes) of one moment.
Frame = tuple[int, Sequence[LayerShape]]

#: Numbers in all frames of a page, which makes it about 2 MB; beyond, every second frame is left out. And position
#: groups of a layer that are drawn, evenly chosen.
_MOST_NUMBERS = 300_000
_MOST_GROUPS = 64

#: Rows and columns of a map at most.
_MOST_PIXELS = 112


@dataclass(frozen=True)
class Note:
    """A heading and a sentence below it."""

    title: str
    text: str


class _Curves(Note):
    """The curves of mean displacement, which the page draws from the frames."""


@dataclass(frozen=True)
class TableOf(Note):
    """A table: the names of the columns, and rows of text."""

    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Fields(Note):
    """Maps beside one another: (caption, (H, W) shares, which are drawn on a logarithmic scale of four decades)."""

    fields: Sequence[tuple[str, Tensor]] = field(default_factory=tuple)


def shapes_page(
    frames: Sequence[Frame], *, title: str, subtitle: str = "", parts: Sequence[Note] = (), refresh: int | None = None
) -> str:
    """The text of an HTML page with the shapes at each of ``frames``, a slider over them, curves, and ``parts``.

    Args:
        frames: (step, shapes) of each moment, of the same layers; at least one. With more than about 300,000 numbers in
            them every second frame is left out until they are fewer, and the page says so.
        title: the heading.
        subtitle: a sentence below it.
        parts: what follows the shapes.
        refresh: seconds after which the page loads itself again; None: never.

    Raises:
        ValueError: there are no frames, or no layers in them.
    """
    if not frames or not frames[-1][1]:
        raise ValueError("there are no frames, or no layers in them")
    shown: list[Frame] = [(step, [_fewer_groups(shape) for shape in shapes]) for step, shapes in frames]
    kept = _thinned(shown)
    reach = max(common_reach(shapes) for _, shapes in kept)
    layers = [
        _layer([shapes[index] for _, shapes in kept], frames[-1][1][index], reach) for index in range(len(kept[-1][1]))
    ]
    notes = [subtitle] if subtitle else []
    if len(kept) < len(frames):
        notes.append(f"{len(kept)} of {len(frames)} moments are shown.")
    data = {
        "title": title,
        "subtitle": " ".join(notes),
        "steps": [step for step, _ in kept],
        "layers": layers,
        "parts": [_part(part) for part in (*_curves(kept), *parts)],
    }
    # "</script>" in a name must not end the script.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _template().replace("/* data */", text)
    page = page.replace("<title>Learned shapes</title>", f"<title>{html.escape(title)}</title>")
    return page.replace(
        "<!-- refresh -->\n", f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh is not None else ""
    )


@cache
def _template() -> str:
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _fewer_groups(shape: LayerShape) -> LayerShape:
    groups = len(shape.positions)
    if groups <= _MOST_GROUPS:
        return shape
    chosen = torch.linspace(0, groups - 1, _MOST_GROUPS, dtype=torch.float32, device="cpu").round().long()
    return replace(shape, positions=shape.positions[chosen])


def _thinned(frames: list[Frame]) -> list[Frame]:
    """Every second frame and the last, until there are few enough numbers; two frames stay."""
    each = sum(shape.positions.numel() for shape in frames[-1][1])
    while len(frames) > 2 and len(frames) * each > _MOST_NUMBERS:
        frames = [*frames[:-1:2], frames[-1]]
    return frames


def _layer(moments: Sequence[LayerShape], whole: LayerShape, reach: float) -> dict[str, Any]:
    shape = moments[-1]
    return {
        "name": shape.name,
        "unit": shape.unit,
        "reach": reach * shape.unit,
        "groups": len(shape.positions),
        "allGroups": len(whole.positions),
        "start": _numbers(shape.start),
        "movable": shape.movable.tolist(),
        "frames": [_numbers(moment.positions.flatten(0, 1)) for moment in moments],
        "moves": [round(mean_move(moment), 3) for moment in moments],
    }


def _numbers(places: Tensor) -> list[list[float] | None]:
    """(y, x) of each place to a thousandth of a pixel; None where it is not finite."""
    finite = places.isfinite().all(-1).tolist()
    rounded = [[round(number, 3) for number in place] for place in places.double().tolist()]
    return [place if ok else None for place, ok in zip(rounded, finite, strict=True)]


def _curves(frames: Sequence[Frame]) -> list[Note]:
    title = "How far taps moved"
    if len(frames) > 1:
        return [_Curves(title, "Mean distance from where they started, in pixels of the layer's input.")]
    return [Note(title, "Only one moment is known. The callback OffsetLogger records the others while training.")]


def _part(part: Note) -> dict[str, Any]:
    kind = "curves" if isinstance(part, _Curves) else "note"
    made: dict[str, Any] = {"title": part.title, "text": part.text, "kind": kind}
    if isinstance(part, TableOf):
        made |= {"kind": "table", "head": list(part.head), "rows": [list(row) for row in part.rows]}
    if isinstance(part, Fields):
        fields = [{"caption": caption, "map": _levels(shares)} for caption, shares in part.fields]
        made |= {"kind": "fields", "fields": fields}
    return made


def _levels(shares: Tensor) -> list[list[int]]:
    """0 to 255 for each pixel, or block of pixels of a large map: four decades below the largest."""
    block = -(-max(shares.shape) // _MOST_PIXELS)
    if block > 1:
        shares = torch.nn.functional.avg_pool2d(shares[None], block, ceil_mode=True, count_include_pad=False)[0]
    decades = torch.log10((shares / shares.max()).clamp(min=1e-4)) / 4
    levels: list[list[int]] = (255 * (1 + decades)).round().int().tolist()
    return levels
