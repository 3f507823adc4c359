"""Bars of ratios to plain, a group for each layer."""

import statistics

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tables import PASSES, ratios

COLOURS = {
    "ours": "#0072b2",
    "dense": "#999999",
    "dcls": "#e69f00",
    "dcls-autocast": "#f3cf80",
    "deform": "#cc79a7",
    "deform-autocast": "#e6bcd3",
}


def draw(rows, launch, path):
    """Write a picture of the ``rows`` with that ``launch``: medians over threads and batches."""
    rows = [row for row in rows if row["launch"] == launch]
    passes = [what for what in PASSES if any(row["pass"] == what for row in rows)]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    methods = [name for name in COLOURS if ratios(rows, method=name)]
    figure = Figure(figsize=(max(9, 2.5 + 0.5 * len(layers)), 3.6 * len(passes) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(passes), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / max(len(methods), 1)
    for axis, what in zip(axes, passes, strict=True):
        for place, name in enumerate(methods):
            found = [ratios(rows, layer=layer, method=name, **{"pass": what}) for layer in layers]
            heights = [statistics.median(r) if r else float("nan") for r in found]
            at = [index + (place - (len(methods) - 1) / 2) * width for index in range(len(layers))]
            axis.bar(at, heights, width, color=COLOURS[name], label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(ylabel=f"{what}, x plain (log scale)", xlim=(-0.6, len(layers) - 0.4))
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#dddddd")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=max(len(methods), 1), loc="outside upper center")
    axes[-1].set_xticks(range(len(layers)), layers, rotation=45, ha="right", fontsize=8)
    first, what = rows[0], "peak memory" if "megabytes" in rows[0] else "time"
    axes[0].set_title(
        f"{what} against F.conv2d: {first['device']}, {first['dtype']}, {first['memory_format']}, {launch}"
    )
    figure.savefig(path, dpi=120)
