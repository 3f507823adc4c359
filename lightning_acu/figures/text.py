"""How wide a text is, and how much of it fits."""

from __future__ import annotations

from functools import lru_cache

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

__all__ = ["fitting_size", "shortened", "text_width"]


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Width in points of one line at a font size of ``size`` points, with some room to spare."""
    width, _, _ = TextToPath().get_text_width_height_descent(text, FontProperties(size=size), ismath=False)
    return 1.06 * float(width)  # hinting widens letters where pixels are large


def fitting_size(text: str, size: float, width: float) -> float:
    """``size``, or the smaller one at which ``text`` is ``width`` points wide."""
    return size * min(1.0, width / max(text_width(text, size), 1e-9))


def shortened(text: str, size: float, width: float) -> str:
    """``text``, or as much of its end as fits into ``width`` points, after an ellipsis."""
    if text_width(text, size) <= width:
        return text
    for start in range(1, len(text)):
        if text_width(short := "…" + text[start:], size) <= width:
            return short
    return "…"
