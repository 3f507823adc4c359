"""``backend="auto"`` that measures itself: which backend takes a call (README.md)."""

from .calls import Call
from .selector import Selector, choose, note, planning, recording, selector_of, uses_dense_only
from .verdicts import Verdict

__all__ = [
    "Call",
    "Selector",
    "Verdict",
    "choose",
    "note",
    "planning",
    "recording",
    "selector_of",
    "uses_dense_only",
]
