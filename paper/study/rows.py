"""The rows of the study: which network, what is learned, and where a row branches off from another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["ROWS", "Row", "find_rows"]

_SIX = [f"conv{stage}.{layer}.conv" for stage in (1, 2, 3) for layer in (1, 2)]

#: What happens to a network where its row branches off.
Change = Literal["keep", "pixels", "dilation", "grid"]


@dataclass(frozen=True)
class Row:
    """One way to train the network.

    Args:
        name: as on the command line.
        what: in words.
        groups: position groups of the active convolutions; 0: plain ones.
        walk: positions take steps of the same length in random directions.
        dilations: of plain convolutions, by name.
        found_by: the row whose dilations, of the same seed, are used.
        kernel_size3: of the two convolutions of conv3.
        wider: factor of all widths.
        longer: factor of the number of steps.
        source: the row that this one branches off from.
        at: at which fraction of the steps it does.
        change: what is done to positions there; they do not learn from then on.
    """

    name: str
    what: str
    groups: int = 0
    walk: bool = False
    dilations: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    found_by: str | None = None
    kernel_size3: int = 3
    wider: float = 1.0
    longer: float = 1.0
    source: str | None = None
    at: float = 0.0
    change: Change | None = None

    @property
    def needs(self) -> list[str]:
        """Rows of the same seed that must be trained before."""
        return [name for name in (self.source, self.found_by) if name]


def _branch(at: float, change: Change, what: str) -> Row:
    name = {"keep": "frozen", "pixels": "pixels", "dilation": "dilations", "grid": "back"}[change]
    return Row(f"{name}-{at * 100:.0f}", what, groups=1, source="active", at=at, change=change)


_ALL = [
    Row("plain", "3x3 convolutions"),
    Row("active", "positions learn from 10 % of the steps to the end", groups=1),
    _branch(0.4, "dilation", "active until 40 %, then on plain dilated grids"),
    _branch(0.4, "pixels", "active until 40 %, then on whole pixels"),
    _branch(0.4, "keep", "active until 40 %, then positions stay"),
    Row("d2", "dilation 2 in conv3/x", dilations=dict.fromkeys(_SIX[4:], (2, 2))),
    Row("d2-all", "dilation 2 in all six", dilations=dict.fromkeys(_SIX, (2, 2))),
    Row("found", "the dilations of dilations-40, from scratch", found_by="dilations-40"),
    Row("late", "plain until 40 %, then those dilations", found_by="dilations-40", source="plain", at=0.4),
    _branch(0.4, "grid", "active until 40 %, then plain again"),
    Row("walk", "positions walk in random directions", groups=1, walk=True),
    _branch(0.7, "dilation", "active until 70 %, then on plain dilated grids"),
    _branch(0.7, "pixels", "active until 70 %, then on whole pixels"),
    Row("plain-longer", "plain with half as many steps again", longer=1.5),
    Row("active-g2", "active with 2 position groups", groups=2),
    Row("active-g4", "active with 4 position groups", groups=4),
    Row("wider", "plain with a twelfth more channels, so more parameters than active", wider=13 / 12),
    Row("d2-3", "dilations 2 and 3 in conv3/x", dilations={_SIX[4]: (2, 2), _SIX[5]: (3, 3)}),
    Row("f5", "5x5 in conv3/x", kernel_size3=5),
    Row("plain-twice", "plain with twice as many steps", longer=2.0),
]

#: By name, in the order in which they are trained.
ROWS: dict[str, Row] = {row.name: row for row in _ALL}


def find_rows(names: list[str] | None = None) -> list[Row]:
    """The rows called ``names`` and those that they need, in the order of ``ROWS``; None: all.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    wanted = set(ROWS if names is None else names)
    if unknown := sorted(wanted - ROWS.keys()):
        raise ValueError(f"--rows {' '.join(unknown)}: unknown row; there are {', '.join(ROWS)}")
    for row in reversed(ROWS.values()):  # a row comes after those that it needs
        if row.name in wanted:
            wanted.update(row.needs)
    return [row for row in ROWS.values() if row.name in wanted]
