"""A report as rich tables."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from .rows import ConvRow, ConvRows

__all__ = ["report_table"]

#: How many names are shown of the layers that were skipped for one reason.
_EXAMPLES = 3


def report_table(report: ConvRows, every: bool) -> Table:
    """See :meth:`ACUReport.table`."""
    count = f"{len(report.converted)} of {len(report.rows)} convolutions active"
    whole = Table.grid()
    # As rows: a title and a caption would be wrapped at the width of the tables.
    whole.add_row(Text(f"{report.model}: {count}, {report.added} parameters added"))
    active = [[row] for row in report.converted]
    if active:
        columns = _COLUMNS | {"added": lambda row: f"+{row.added}", "fold x": _fold_ratio}
        if len(_backends(report)) > 1:  # else the caption says it for all
            columns["backend"] = _backend
        if any(row.form_prices for row in report.converted):
            columns["cheapest fold"] = _cheapest
        whole.add_row(_part(report, "active layer", active, columns))
    skipped: dict[str, list[ConvRow]] = {}
    for row in report.skipped:
        skipped.setdefault(row.name if every else row.reason, []).append(row)
    if skipped:
        columns = _COLUMNS if every else {name: _COLUMNS[name] for name in ("class", "kernel")}
        columns = columns | {"why not": lambda row: row.reason}
        whole.add_row(_part(report, "skipped layer", list(skipped.values()), columns))
    whole.add_row(Text("\n".join(_caption(report))))
    return whole


def _part(
    report: ConvRows, what: str, groups: list[list[ConvRow]], columns: dict[str, Callable[[ConvRow], str]]
) -> Table:
    """A table with one row for each of ``groups``, showing what its layers have in common."""
    factor, unit = _unit(report)
    names = [_names(rows) for rows in groups]
    # Names get the width they need and reasons the rest; only very long names are wrapped.
    longest = max(map(len, [what, *"\n".join(names).splitlines()]))
    table = Table(pad_edge=False)
    table.add_column(what, overflow="fold", width=min(longest, 60) if "why not" in columns else None)
    for name in columns:
        table.add_column(name, no_wrap=name != "why not", overflow="fold")
    if report.input_size is not None:
        table.add_column(f"{unit}MACs", no_wrap=True, justify="right")
    for first, rows in zip(names, groups, strict=True):
        cells = [first, *(_common(rows, text) for text in columns.values())]
        if report.input_size is not None:
            cells.append(f"{sum(row.macs * (row.pixels or 0) for row in rows) / factor:.3f}")
        table.add_row(*map(Text, cells))  # as Text: names and patterns are no markup
    return table


def _unit(report: ConvRows) -> tuple[float, str]:
    return (1e6, "M") if (report.macs or 0) < 1e9 else (1e9, "G")


def _caption(report: ConvRows) -> list[str]:
    lines = [f"{report.added} parameters added"]
    if report.macs is not None and report.input_size is not None:
        factor, unit = _unit(report)
        size = "x".join(map(str, report.input_size))
        text = f"convolutions: {_number(report.macs / factor)} {unit}MACs at {size} before"
        if report.converted:
            for what, macs in (
                ("folded at these positions", report.folded_macs),
                ("with fractional positions", report.fractional_fold_macs),
            ):
                text += f"; {what} "
                text += "impossible: not all positions are finite" if macs is None else _number(macs / factor)
                text += f" ({macs / report.macs:.2f}x)" if macs and report.macs else ""
        lines.append(text)
        if len(_backends(report)) == 1:
            lines.append(f"backend on this machine, for one image: {_backends(report)[0]} in all layers")
    elif report.converted:
        ratios = [row.folded_macs / row.macs for row in report.converted if row.folded_macs is not None]
        if ratios:
            lines.append(f"a fold at these positions costs {_range(ratios)} of a layer's arithmetic (fold x)")
        fractional: dict[str, list[float]] = {}
        for row in report.converted:
            kernel, dilation = _pair(row.kernel_size), _pair(row.dilation)
            kernel += "" if set(row.dilation) <= {0, 1} else f" dilated {dilation}"
            fractional.setdefault(kernel, []).append((row.fractional_fold_macs or 0) / row.macs)
        first, *others = (f"{_range(values)} for {kernel}" for kernel, values in fractional.items())
        lines.append(f"a fold of fractional positions would cost {', '.join([f'{first} layers', *others])}")
    return lines


def _pair(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))


#: The columns that describe a layer, in both tables.
_COLUMNS: dict[str, Callable[[ConvRow], str]] = {
    "class": lambda row: row.kind,
    "kernel": lambda row: _pair(row.kernel_size),
    "stride": lambda row: _pair(row.stride),
    "dilation": lambda row: _pair(row.dilation),
    "groups": lambda row: str(row.groups),
    "channels": lambda row: f"{row.channels[0]} -> {row.channels[1]}",
}


def _common(rows: list[ConvRow], text: Callable[[ConvRow], str]) -> str:
    """The text that all ``rows`` have in common, or nothing."""
    texts = {text(row) for row in rows}
    return texts.pop() if len(texts) == 1 else ""


def _names(rows: list[ConvRow]) -> str:
    """All names of a single layer; the number of several layers and the names of the first ones."""
    if len(rows) == 1:
        return "\n= ".join([rows[0].name or "(the model)", *rows[0].aliases])
    more = ["..."] if len(rows) > _EXAMPLES else []
    return "\n".join([f"{len(rows)} layers:", *(row.name for row in rows[:_EXAMPLES]), *more])


def _fold_ratio(row: ConvRow) -> str:
    return "not finite" if row.folded_macs is None else f"{row.folded_macs / row.macs:.2f}"


def _backends(report: ConvRows) -> list[str]:
    return list(dict.fromkeys(_backend(row) for row in report.converted if row.backends))


def _backend(row: ConvRow) -> str:
    """Of the forward and the backward pass, once if it is the same."""
    return " / ".join(dict.fromkeys(row.backends))


def _cheapest(row: ConvRow) -> str:
    """The form that is expected to take the least time, and how many times the plain convolution's."""
    if not row.form_prices:
        return ""
    form, price = min(row.form_prices.items(), key=lambda item: item[1])
    return f"{form}, {price:.1f}x"


def _number(value: float) -> str:
    """With three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}x", f"{max(ratios):.2f}x"
    return low if low == high else f"{low} to {high}"
