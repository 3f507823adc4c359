"""What the networks of finished runs cost where they are used: milliseconds an image in ONNX Runtime.

    python -m paper.study.latency --folder paper/results/study/width0.25_steps3000

Each row's network of the first seed, with the positions that it learned, is folded and exported by ``export_model``;
one image, one thread, medians of calls in turns. Weights do not matter for the time and are new ones. Writes
FOLDER/latency.csv, which the report takes up.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

from lightning_acu import acu_layers
from lightning_acu.export import export_model
from lightning_acu.surgery.fold_times import in_turns

from .networks import network
from .report import finished_runs
from .rows import ROWS


def session_of(row, folder, temporary):
    """A function that runs the exported network of ``row`` on one image."""
    run = finished_runs(folder, row)[0]
    model = network(row, run["seed"], folder, run["width"]).eval()
    positions = torch.load(folder / row.name / f"seed{run['seed']}" / "positions.pt", weights_only=True)
    with torch.no_grad():
        for name, layer in acu_layers(model):
            layer.offsets.copy_((positions[name] - layer.positions).flatten())  # they start at zero
    path = Path(temporary, f"{row.name}.onnx")
    export_model(model, path, input_size=(3, 32, 32), dynamic_batch=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": torch.randn(1, 3, 32, 32).numpy()}
    return lambda: session.run(None, feed)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of finished runs of one width and length")
    parser.add_argument("--budget", type=float, default=2, help="seconds for a network")
    options = parser.parse_args(args)
    rows = [row for row in ROWS.values() if finished_runs(options.folder, row)]
    if not rows:
        parser.error(f"--folder {options.folder}: has no finished run (ROW/seedN/result.json)")
    with tempfile.TemporaryDirectory() as temporary:
        calls = {row.name: session_of(row, options.folder, temporary) for row in rows}
        times = in_turns(calls, options.budget, time.process_time)
    with (options.folder / "latency.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("row", "latency_ms"))
        for name, samples in times.items():
            writer.writerow((name, f"{1e3 * statistics.median(samples):.4f}"))
            print(f"{name:14} {1e3 * statistics.median(samples):.3f} ms")


if __name__ == "__main__":
    main()
