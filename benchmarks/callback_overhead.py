"""What the callbacks add to a training step: a ResNet-18 with active convolutions, callbacks off and on in turns.

    python benchmarks/callback_overhead.py                     # CPU, warm-up (default settings) and learning
    python benchmarks/callback_overhead.py --device cuda --batch-size 64 --image-size 224

Both arms train the same network in the same state; they take turns, so that both see the same machine. Two measures:
the ratio of mean step times (which noise of a percent or so blurs), and the time spent inside the callbacks' own hooks
and the gradient gate (which it does not). Drawing the pictures at the end of a training, and one page of the shapes as
OffsetLogger writes it meanwhile, are timed separately.
"""

import argparse
import csv
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import Profiler
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune
from lightning_acu.figures import shapes_of
from lightning_acu.figures.page import shapes_page

#: Steps of the training that is begun, long enough for default settings.
TRAINING = 64_000
OURS = ("PositionLRSchedule", "RoundThenFinetune", "OffsetLogger")


class Module(pl.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class StepTimes(pl.Callback):
    """Seconds from the start of one batch to the start of the next; ends the training after ``steps``."""

    def __init__(self, steps):
        self.times, self.last, self.steps = [], None, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last = now
        trainer.should_stop = trainer.global_step >= self.steps


class HookTimes(Profiler):
    """Seconds in the hooks of our callbacks and in the gate, between the first and the last batch."""

    def __init__(self):
        super().__init__()
        self.started, self.seconds = {}, defaultdict(float)

    def start(self, action_name):
        self.started[action_name] = time.perf_counter()

    def stop(self, action_name):
        elapsed = time.perf_counter() - self.started.pop(action_name)
        mine = any(name in action_name for name in OURS) or "configure_gradient_clipping" in action_name
        if mine and ("on_train_batch" in action_name or "optimizer" in action_name or "clipping" in action_name):
            self.seconds["steps"] += elapsed
        elif mine and "on_train_end" in action_name:
            self.seconds["end"] += elapsed


def train(arguments, model, callbacks):
    times, profiler = StepTimes(arguments.steps), HookTimes()
    images = torch.randn(arguments.batch_size * 4, 3, arguments.image_size, arguments.image_size)
    labels = torch.randint(0, 1000, (len(images),))
    data = DataLoader(TensorDataset(images, labels), arguments.batch_size)
    with tempfile.TemporaryDirectory() as directory:
        trainer = pl.Trainer(
            accelerator="gpu" if arguments.device == "cuda" else "cpu",
            devices=1,
            max_epochs=-1,
            max_steps=TRAINING,
            logger=CSVLogger(directory),
            callbacks=[*callbacks, times],
            profiler=profiler,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(model), data)
    return times.times[arguments.skip :], profiler.seconds


def measure(arguments, setting, warmup_steps):
    model = timm.create_model("resnet18")
    if arguments.device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    convert_to_acu(model)
    if warmup_steps == 0:  # taps between pixels, as while learning, in both arms
        for _, layer in acu_layers(model):
            torch.nn.init.uniform_(layer.offsets, -0.4, 0.4)
    means, inside, end = {"off": [], "on": []}, [], []
    for _ in range(arguments.rounds):
        for arm in means:
            callbacks = [
                PositionLRSchedule(warmup_steps=warmup_steps),
                RoundThenFinetune(at_step=TRAINING - 1),  # its hooks run at every step; rounding is not one of them
                OffsetLogger(),
            ]
            times, seconds = train(arguments, model, callbacks if arm == "on" else [])
            means[arm].append(statistics.fmean(times))
            if arm == "on":
                inside.append(seconds["steps"] / arguments.steps)
                end.append(seconds["end"])
    off, on = (statistics.median(means[arm]) for arm in ("off", "on"))
    cuda = arguments.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "setting": setting,
        "step_off_ms": round(off * 1e3, 2),
        "step_on_ms": round(on * 1e3, 2),
        "ratio": round(on / off, 4),
        "inside_hooks_ms": round(statistics.median(inside) * 1e3, 3),
        "inside_hooks_share": round(statistics.median(inside) / off, 5),
        "pictures_at_end_s": round(statistics.median(end), 2),
    }


def page_milliseconds(model):
    """Median time to make the page of 64 moments of ``model`` and write it: (ms, MB)."""
    shapes = shapes_of(model)
    frames = [(step, shapes) for step in range(64)]
    times = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "shapes.html")
        for _ in range(7):
            began = time.process_time()
            path.write_text(shapes_page(frames, title="page", refresh=10))
            times.append(time.process_time() - began)
        return 1e3 * statistics.median(times), path.stat().st_size / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=105, help="of each training")
    parser.add_argument("--skip", type=int, default=5, help="first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=5, help="trainings of each arm")
    parser.add_argument("--out", type=Path, default=None, help="append the rows to this CSV file")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "RoundThenFinetune: training ended")
    rows = [
        measure(arguments, "warm-up (default settings)", 10_000),
        measure(arguments, "learning, taps between pixels", 0),
    ]
    for row in rows:
        print(row)
    for name in ("resnet18", "resnet50", "resnet200d"):
        milliseconds, megabytes = page_milliseconds(convert_to_acu(timm.create_model(name)))
        # OffsetLogger waits 100 times as long, and 5 seconds at least.
        share = milliseconds / (1e3 * max(5, milliseconds / 10) + milliseconds)
        print(f"page of {name}: {milliseconds:.0f} ms, {megabytes:.2f} MB; at most {share:.2%} of a training")
    if arguments.out is not None:
        new = not arguments.out.exists()
        with arguments.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
