"""Rows of results as text, and what went wrong; needs only Python.

    python benchmarks/tables.py FOLDER     # a short summary of all CSV files there

Rows are those that ``bench_acu_conv2d.py`` and ``train_step.py`` write.
"""

import csv
import math
import statistics
import sys
import traceback
from pathlib import Path

FORWARD, BOTH = PASSES = "forward", "forward+backward"
PEERS = ["dcls", "dcls-autocast", "deform", "deform-autocast"]
METHODS = ["plain", "ours", "dense", *PEERS]
ARMS = ["plain", "ours", "dense"]  # of a training step


def brief(error):
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


class Problems:
    """What each method could not do; the same thing on several layers is one sentence."""

    def __init__(self):
        self._layers = {}

    def add(self, method, what, layer):
        """Note it; where it is an exception that we should look into, print all of it, once."""
        if method not in PEERS and (method, what) not in self._layers and sys.exc_info()[0] is not None:
            traceback.print_exc()
        self._layers.setdefault((method, what), {})[layer] = None

    def sentences(self):
        for (method, what), layers in self._layers.items():
            first, *others = layers
            more = f" and {len(others)} more layers" if len(others) > 1 else " and one more layer" if others else ""
            yield f"{method} {what} ({first}{more})"

    def serious(self):
        """Whether there are any of our own, or of the plain convolution: what peers cannot do is theirs."""
        return any(method not in PEERS for method, _ in self._layers)


def aligned(header, lines):
    """Columns of text: the first one to the left, the others to the right."""
    rows = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True))


def ratios(rows, **wanted):
    """Of the rows with these values; without plain there is none."""
    found = [float(row["ratio"]) for row in rows if all(row[key] == value for key, value in wanted.items())]
    return [ratio for ratio in found if not math.isnan(ratio)]


def median_ratio(rows, **wanted):
    """As text; empty where there is no row."""
    found = ratios(rows, **wanted)
    return f"{statistics.median(found):.2f}" if found else ""


def layer_tables(rows, value):
    """For each launch and pass, a line for each layer, threads and batch: plain's ``value``, and ratios to it."""
    names = [name for name in METHODS if any(row["method"] == name for row in rows)]
    for launch in dict.fromkeys(row["launch"] for row in rows):
        for what in dict.fromkeys(row["pass"] for row in rows):
            lines = {}
            for row in rows:
                if (row["launch"], row["pass"]) == (launch, what):
                    key = row["layer"], str(row["threads"]), str(row["batch"])
                    number = row[value] if row["method"] == "plain" else row["ratio"]
                    lines.setdefault(key, {})[row["method"]] = f"{number:.3g}"
            header = [f"{what}, {launch}", "threads", "batch", *names]
            yield aligned(header, [[*key, *(cells.get(name, "") for name in names)] for key, cells in lines.items()])
    yield f"plain: {value}; others: ratio to plain"


def summary(rows):
    """A line for each precision, launch and kind of layer: median ratios to plain of each method, for each pass."""
    names = [name for name in METHODS[1:] if ratios(rows, method=name)]
    passes = [what for what in PASSES if any(row["pass"] == what for row in rows)]
    lines = []
    for dtype, launch, kind in dict.fromkeys((row["dtype"], row["launch"], row["kind"]) for row in rows):
        some = [row for row in rows if (row["dtype"], row["launch"], row["kind"]) == (dtype, launch, kind)]
        medians = [[median_ratio(some, method=name, **{"pass": what}) or "-" for what in passes] for name in names]
        lines.append([f"{dtype} {kind}, {launch}", *(" / ".join(pair) for pair in medians)])
    what = "peak memory" if "megabytes" in rows[0] else "time"
    return aligned([f"{what}, {' / '.join(passes)}: median ratio to plain", *names], lines)


def slower_than_dense(rows):
    """Sentences that count the layers, medians over threads and batches."""
    for launch in dict.fromkeys(row["launch"] for row in rows):
        for what in PASSES:
            some = [row for row in rows if (row["launch"], row["pass"]) == (launch, what)]
            layers = dict.fromkeys(row["layer"] for row in some)
            pairs = [[ratios(some, layer=layer, method=name) for name in ("ours", "dense")] for layer in layers]
            speeds = [statistics.median(ours) / statistics.median(dense) for ours, dense in pairs if ours and dense]
            if speeds:
                slower, clearly = (sum(speed > limit for speed in speeds) for limit in (1, 1.05))
                counts = f"{slower} of {len(speeds)} layers, on {clearly} by over 5 %"
                yield f"{what}, {launch}: ours is slower than dense on {counts}"


def train_table(rows):
    """A line for each network, precision, mode and number of threads."""
    lines = {}
    for row in rows:
        key = f"{row['model']}, {row['precision']}, batch {row['batch']}, {row['mode']}", str(row["threads"])
        ratio = "" if row["arm"] == "plain" else f" ({float(row['ratio']):.2f})"
        lines.setdefault(key, {})[row["arm"]] = f"{float(row['milliseconds']):.1f} ms{ratio}"
    header = ["training step, and its ratio to plain", "threads", *ARMS]
    return aligned(header, [[*key, *(cells.get(arm, "") for arm in ARMS)] for key, cells in lines.items()])


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python benchmarks/tables.py FOLDER")
    rows = []
    for path in sorted(Path(sys.argv[1]).glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    training = [row for row in rows if "arm" in row]
    for value in ("milliseconds", "megabytes"):
        found = [row for row in rows if value in row and "method" in row]
        if found:
            print(summary(found))
    if training:
        print(train_table(training))


if __name__ == "__main__":
    main()
