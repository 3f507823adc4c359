"""paper/reproduce.py: which runs it makes, how it goes on after a kill, and what it reports."""

import argparse
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_acu.cli import main as lightning_acu_main

ROOT = Path(__file__).parents[2]


def options(**given):
    names = ("steps", "batch_size", "lr", "multiplier", "data", "preprocessing", "compile_mode", "device")
    return argparse.Namespace(**dict.fromkeys(names) | given)


def row(name, table="cifar10-ablation"):
    from paper.tables import TABLES

    return next(row for row in TABLES[table] if row.name == name)


def config_of(name, table="cifar10-ablation", **given):
    from paper.settings import effective_config

    config = effective_config(row(name, table), 3, options(**given))
    callbacks = {c["class_path"].rpartition(".")[2]: c["init_args"] for c in config["trainer"]["callbacks"]}
    return config, callbacks


def test_every_row_names_a_config_and_a_row_above_it():
    from paper.settings import effective_config
    from paper.tables import TABLES

    for rows in TABLES.values():
        names = [row.name for row in rows]
        for number, each in enumerate(rows):
            assert effective_config(each, 0, options())["trainer"]["max_steps"] >= 64_000
            assert {each.base, each.continues} <= {None, *names[:number]}


def test_the_posters_improvements():
    from paper.report import compare
    from paper.tables import TABLES

    run = {"seed": 0, "value": 1.0, "parameters": 1, "steps": 1, "seconds": 60}
    found = {}
    for rows in TABLES.values():
        runs = {row.name: [run] for row in rows}
        found |= {each.name: compare(each, runs)["poster_improvement"] for each in rows if each.base}
    expected = {
        "base-d2": -0.02, "acu-round": 0.32, "acu-c23": 0.58, "acu-all": 0.68, "base-f5": 0.72, "acu-f5": 1.12,
        "cifar10-plain-acu": 0.68, "cifar10-residual-acu": 0.52, "cifar100-plain-acu": 0.74,
        "cifar100-residual-acu": 0.46, "alexnet-acu": 0.79, "resnet26-acu": 0.49,
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_as_published():
    config, callbacks = config_of("acu-round")
    assert config["seed_everything"] == 3
    assert config["trainer"]["max_steps"] == 84_000
    assert callbacks["PositionLRSchedule"] == {"multiplier": 0.01, "warmup_steps": 10_000, "normalize": True}
    assert callbacks["RoundThenFinetune"]["at_step"] == 64_000
    assert callbacks["ModelCheckpoint"]["every_n_train_steps"] == 2_000
    assert config["data"]["init_args"]["root"] == str(Path("data").resolve())


def test_a_shortened_training_keeps_the_proportions():
    config, callbacks = config_of("acu-round", steps=1280, batch_size=32)
    assert config["trainer"]["max_steps"] == 1680
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["milestones"] == [640, 960]
    assert callbacks["RoundThenFinetune"]["at_step"] == 1280
    assert callbacks["OffsetLogger"]["every_n_steps"] == 10
    assert callbacks["ModelCheckpoint"]["every_n_train_steps"] == 40
    # 50 times fewer steps: taps wander as far with sqrt(50) times the rate.
    assert callbacks["PositionLRSchedule"] == {"multiplier": 0.0707, "warmup_steps": 200, "normalize": True}
    assert config["data"]["init_args"]["batch_size"] == 32


def test_another_learning_rate_is_none_of_the_positions():
    config, callbacks = config_of("acu-round", lr=0.02)
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.02
    assert callbacks["PositionLRSchedule"]["multiplier"] * 0.02 == pytest.approx(0.001)
    assert callbacks["RoundThenFinetune"]["finetune_lr"] == pytest.approx(0.002)
    assert config_of("acu-all", lr=0.02, multiplier=0.3)[1]["PositionLRSchedule"]["multiplier"] == 0.3


def test_ones_own_images_and_preprocessing():
    config, _ = config_of("acu-all", data=Path("images.npz"), preprocessing="normalize")
    assert config["data"] == {
        "class_path": "lightning_acu.data.ArrayDataModule",
        "init_args": {
            "path": str(Path("images.npz").resolve()), "val_size": 0, "crop_padding": 4, "flip": True,
            "preprocessing": "normalize", "on_device": True, "batch_size": 64,
        },
    }  # fmt: skip


@pytest.mark.parametrize("steps", [1, 19, 20, 23, 1279, 1280, 2018, 64_000, 450_000])
@pytest.mark.parametrize(("name", "table"), [("acu-round", "cifar10-ablation"), ("alexnet", "places365")])
def test_checkpoints_are_at_most_a_twentieth_apart_and_the_last_is_the_trained_network(steps, name, table):
    config, _ = config_of(name, table, steps=steps)
    saving = [c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"].endswith(".ModelCheckpoint")]
    intervals = [arguments["every_n_train_steps"] for arguments in saving]
    assert intervals[0] <= max(1, steps / 20)
    assert any(steps % interval == 0 for interval in intervals)
    assert all(arguments["dirpath"] == "checkpoints" for arguments in saving)
    assert len({arguments["filename"] for arguments in saving}) == 1


def test_a_row_brings_the_one_it_continues():
    from paper.tables import find_rows

    assert [row.name for row in find_rows("cifar10-ablation", ["acu-round", "base"])] == [
        "base",
        "acu-all",
        "acu-round",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--table", "cifar1000"],
            "--table cifar1000: unknown table; choose one of cifar10-ablation, cifar, places365",
        ),
        (["--table", "cifar", "--rows", "acu"], "--rows acu: unknown row; those of cifar are cifar10-plain,"),
        (["--table", "cifar", "--data", "no/where"], "--data no/where: does not exist"),
        (["--table", "cifar", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--table", "cifar", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--table", "cifar", "--lr", "-1"], "--lr -1.0: must be positive"),
        (["--table", "places365", "--preprocessing", "whiten"], "is for CIFAR's small images"),
        (["--table", "places365", "--data", "{npz}"], "Places365 needs a folder of images"),
        (
            ["--table", "cifar", "--data", "{npz}"],
            "it has 10 classes, but cifar100-plain is for 100; choose other --rows",
        ),
        (["--table", "cifar10-ablation", "--data", "{empty}"], "is not an .npz archive"),
    ],
)
def test_bad_arguments(arguments, message, images, tmp_path, capsys):
    from paper.reproduce import main

    empty = tmp_path / "empty.npz"
    empty.touch()
    with pytest.raises(SystemExit):
        main([argument.format(npz=images, empty=empty) for argument in arguments])
    assert message in capsys.readouterr().err


def test_a_report_of_nothing_says_so(tmp_path):
    from paper.reproduce import main

    with pytest.raises(SystemExit, match="has no finished run"):
        main(["--table", "cifar10-ablation", "--report", "--out", str(tmp_path)])


def finished(folder, name, seed, table="cifar10-ablation", **settings):
    """A result as run_row writes it, as far as the report reads it before it draws."""
    config, _ = config_of(name, table, **settings)
    path = folder / table / name / f"seed{seed}" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"row": name, "seed": seed, "config": config}))


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (("base", "base"), ({"steps": 1280}, {}), "base/seed0 and base/seed1 cannot .* --steps was 1280 .* and 64000"),
        (("base", "acu-all"), ({}, {"lr": 0.02}), "base/seed0 and acu-all/seed1 cannot .* --lr was 0.1 there and 0.02"),
        (("base", "acu-round"), ({}, {"batch_size": 8}), "--batch-size was 64 there and 8 here"),
        (("acu-all", "acu-c23"), ({}, {"multiplier": 0.5}), "--multiplier was 0.01 there and 0.5 here"),
        (("base", "acu-f5"), ({}, {"preprocessing": "normalize"}), "--preprocessing was whiten"),
        (("base-d2", "base-f5"), ({}, {"data": Path("a.npz")}), "--data was "),
    ],
)
def test_runs_of_other_settings_are_not_compared(names, settings, message, tmp_path):
    from paper.reproduce import main

    for seed, (name, given) in enumerate(zip(names, settings, strict=True)):
        finished(tmp_path, name, seed, **given)
    with pytest.raises(SystemExit, match=message):
        main(["--table", "cifar10-ablation", "--report", "--out", str(tmp_path)])


def test_what_rows_have_of_their_own_is_compared():
    from paper.report import check_settings
    from paper.tables import TABLES

    for table, rows in TABLES.items():
        runs = {row.name: [{"seed": 0, "config": config_of(row.name, table)[0]}] for row in rows}
        check_settings(rows, runs)


def test_a_report_of_some_seeds(tmp_path, monkeypatch):
    from paper import report as paper_report

    for seed in range(3):
        finished(tmp_path, "base", seed, steps=1280 if seed < 2 else 640)
    seen = []

    def compare(row, runs):
        seen.extend(run["seed"] for run in runs["base"])
        raise StopIteration

    monkeypatch.setattr(paper_report, "compare", compare)
    with pytest.raises(StopIteration):
        paper_report.report("cifar10-ablation", [row("base")], tmp_path / "cifar10-ablation", 2)
    assert seen == [0, 1]


def test_mean_and_spread_are_those_of_the_seeds():
    from paper.report import compare

    def runs(*values):
        return [
            {"seed": seed, "value": value, "parameters": 5, "steps": 9, "seconds": 30 * (seed + 1)}
            for seed, value in enumerate(values)
        ]

    both = {"base": runs(8.0, 9.0, 10.0), "acu-all": runs(7.5, 8.0, 10.0)}
    base, acu = (compare(row(name), both) for name in ("base", "acu-all"))
    assert (base["mean"], base["std"], base["improvement"]) == (9.0, 1.0, None)
    assert acu["mean"] == pytest.approx(8.5)
    assert acu["std"] == pytest.approx(np.std([7.5, 8.0, 10.0], ddof=1))
    assert acu["improvement"] == pytest.approx(0.5)  # by seed 0.5, 1 and 0
    assert acu["improvement_std"] == pytest.approx(0.5)
    assert acu["minutes"] == 1.0
    assert compare(row("base"), {"base": runs(8.0)})["std"] is None
    accuracy = {"alexnet": runs(81.0), "alexnet-acu": runs(82.5)}
    assert compare(row("alexnet-acu", "places365"), accuracy)["improvement"] == pytest.approx(1.5)


@pytest.fixture(scope="module")
def images(shared_folder):
    def save(folder):
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (60, 3, 12, 8), dtype=np.uint8), np.arange(60) % 10
        np.savez(folder / "images.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])

    return shared_folder("images_to_reproduce", save) / "images.npz"


def arguments(images, out, *rows):
    settings = ["--seeds", "1", "--steps", "41", "--batch-size", "4", "--preprocessing", "normalize"]
    files = ["--device", "cpu", "--data", str(images), "--out", str(out)]
    return ["--table", "cifar10-ablation", "--rows", *rows, *settings, *files]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def results(out):
    folder = out / "cifar10-ablation"
    return {path.parts[-3]: json.loads(path.read_text()) for path in folder.glob("*/seed0/result.json")}


def records(out, name):
    with (out / "cifar10-ablation" / name / "seed0" / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


class TrainingHere:
    """In place of the process that a training is: importing torch and Lightning takes longer than these do."""

    def __init__(self, command, cwd, stdout, **_):
        assert command[:3] == [sys.executable, "-m", "paper.train"]
        with (
            pytest.MonkeyPatch.context() as monkeypatch,
            contextlib.redirect_stdout(stdout),
            warnings.catch_warnings(action="ignore"),  # not errors, as in a process of its own
        ):
            monkeypatch.chdir(cwd)
            monkeypatch.setattr(sys, "argv", ["lightning-acu", *command[3:]])
            lightning_acu_main()
        self.returncode = 0

    def poll(self):
        return self.returncode

    def communicate(self):
        pass


@pytest.fixture(scope="module")
def whole(images, shared_folder):
    """A table of three rows, made without interruption; the folder and what was printed."""

    def reproduce(out):
        from paper import reproduce, runs

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as monkeypatch, (out / "printed").open("w") as printed:
            here = SimpleNamespace(Popen=TrainingHere, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
            monkeypatch.setattr(runs, "subprocess", here)
            with contextlib.redirect_stdout(printed):
                reproduce.main(arguments(images, out, "base", "acu-round"))
        torch.set_num_threads(threads)

    out = shared_folder("reproduced", reproduce)
    return out, (out / "printed").read_text()


@pytest.mark.slow
def test_rows_beside_each_other(whole):
    out, printed = whole
    found = results(out)
    assert set(found) == {"base", "acu-all", "acu-round"}
    assert found["acu-all"]["steps"] == found["base"]["steps"] == 41
    assert found["acu-round"]["steps"] == 54
    assert found["base"]["parameters"] == 855_162
    # Rounding starts from the trained network: nothing was trained twice.
    assert found["acu-round"]["test"]["before rounding"] == found["acu-all"]["test"]["final"]
    assert found["acu-round"]["learned"] == found["acu-all"]["final"]
    assert found["acu-round"]["value"] == 100 * found["acu-round"]["test"]["after fine-tuning"]["test/error"]
    assert {"torch", "timm", "lightning", "lightning_acu", "numpy", "python"} == set(found["base"]["versions"])
    assert found["base"]["seconds"] > 0
    for text in ("base, seed 0: done", "acu-round", "8.01", "+0.68", "+0.32"):
        assert text in printed
    names = {path.name for path in (out / "cifar10-ablation").iterdir() if path.is_file()}
    tables = {"runs.csv", "table.csv", "displacement.csv", "layers.csv", "tables.md"}
    assert names == tables | {"table.png", "displacement.png", "shapes.png"}


def test_how_far_each_layer_moved():
    from paper.layers import layers_learned

    def record(seed, step, mean, furthest, speed):
        return {
            "row": "acu-all", "seed": seed, "step": step, "layer": "conv1/1", "mean_displacement": mean,
            "max_displacement": furthest, "receptive_radius": 1.4 + furthest, "step_speed": speed,
        }  # fmt: skip

    moved = [record(0, 10, 0.0, 0.0, 0.0), record(0, 50, 0.4, 0.6, 0.02), record(0, 90, 0.5, 0.7, 0.005)]
    moved += [record(1, 10, 0.0, 0.1, 0.0), record(1, 90, 0.9, 1.5, 0.01)]
    config, _ = config_of("acu-all", steps=90)
    assert config["trainer"]["callbacks"][1]["init_args"]["warmup_steps"] == 14
    runs = [{"row": "acu-all", "seed": seed, "steps": 90, "config": config} for seed in (0, 1)]
    (line,) = layers_learned(moved, runs)
    assert (line["row"], line["layer"], line["in_warm_up"]) == ("acu-all", "conv1/1", 0.1)
    assert line["mean"] == pytest.approx(0.7)
    assert line["std"] == pytest.approx(np.std([0.5, 0.9], ddof=1))
    assert line["furthest"] == pytest.approx(1.1)
    assert line["radius_before"] == pytest.approx(1.4 + 0.05)
    assert line["radius"] == pytest.approx(1.4 + 1.1)
    # Seed 0: 40 steps at 0.02 and 40 at 0.005, of which 30 are in the last third; seed 1: 80 at 0.01.
    assert line["walked"] == pytest.approx((40 * 0.02 + 40 * 0.005 + 80 * 0.01) / 2)
    assert line["walked_last_third"] == pytest.approx((30 * 0.005 + 30 * 0.01) / 2)


def test_fewer_records_of_the_same_way():
    from paper.layers import thinned

    rng = np.random.default_rng(0)
    moved = [
        {"row": "acu", "seed": seed, "layer": layer, "step": step, "mean_displacement": step / 7, "step_speed": speed}
        for layer, seed, count in (("conv1/1", 0, 64), ("conv1/1", 1, 65), ("conv1/2", 1, 300))
        for step, speed in zip(range(10, 10 * count + 1, 10), rng.random(count), strict=True)
    ]
    kept = thinned(moved)
    for (layer, seed), steps in {
        ("conv1/1", 0): list(range(10, 641, 10)),  # few enough
        ("conv1/1", 1): list(range(10, 651, 20)),
        ("conv1/2", 1): list(range(50, 3001, 50)),
    }.items():
        before, after = ([r for r in rs if (r["layer"], r["seed"]) == (layer, seed)] for rs in (moved, kept))
        assert [record["step"] for record in after] == steps
        assert all(record["mean_displacement"] == record["step"] / 7 for record in after)
        lengths = np.diff([0, *steps])
        walked = np.cumsum([10 * record["step_speed"] for record in before])[np.array(steps) // 10 - 1]
        assert np.cumsum(lengths * [record["step_speed"] for record in after]) == pytest.approx(walked)


@pytest.mark.slow
def test_displacement_is_recorded_from_the_grid_on(whole):
    found = [record for record in records(whole[0], "acu-all") if "acu/mean_displacement" in record]
    warm, later = (
        [float(r["acu/mean_displacement"]) for r in found if (int(r["step"]) <= 6) == early] for early in (1, 0)
    )
    assert set(warm) == {0.0}
    assert later[-1] > 0.01
    assert int(found[-1]["step"]) == 41


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(whole, images, tmp_path, monkeypatch, capsys):
    from paper.reproduce import main

    command = [sys.executable, "-m", "paper.reproduce", *arguments(images, tmp_path, "acu-all")]
    process = subprocess.Popen(command, start_new_session=True, env=environment(), stdout=subprocess.DEVNULL)
    run = tmp_path / "cifar10-ablation" / "acu-all" / "seed0"
    _wait_for(run / "checkpoints" / "last.ckpt", process)
    # The loss of a step is recorded after its checkpoint.
    _wait_for(run / "attempt_0" / "metrics.csv", process, "train/loss")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "result.json").exists()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(command[3:])
    assert "acu-all, seed 0: done" in capsys.readouterr().out
    main(command[3:])
    assert "acu-all, seed 0: was done before" in capsys.readouterr().out
    attempts = json.loads((run / "attempts.json").read_text())
    assert len(attempts) == 2
    assert 0 < attempts[1]["from_step"] < 41
    ours, expected = results(tmp_path)["acu-all"], results(whole[0])["acu-all"]
    assert ours["attempts"] == 2
    assert ours["test"] == expected["test"]
    assert ours["final"] == expected["final"]
    found, wanted = (_at_steps(records(folder, "acu-all"), attempts[1]["from_step"]) for folder in (tmp_path, whole[0]))
    assert found == wanted


def _at_steps(found, start):
    """What is recorded at steps; metrics of an epoch know of the batches since the last start only.

    Without the loss of the step before ``start``: Lightning records it after the checkpoint, a kill may lose it.
    """
    return [
        record
        for record in found
        if "acu/mean_displacement" in record or ("train/loss" in record and start - int(record["step"]) not in (0, 1))
    ]


def test_a_folder_is_trained_in_by_one_process(tmp_path, monkeypatch):
    from paper import runs as paper_runs

    def meanwhile(*given):
        with pytest.raises(RuntimeError, match=r"another process is training in .*base/seed3:"):
            paper_runs.run_row(row("base"), 3, tmp_path, options(), print)

    monkeypatch.setattr(paper_runs, "_run", meanwhile)
    for _ in range(2):  # free again
        assert paper_runs.run_row(row("base"), 3, tmp_path, options(), print)


def test_a_damaged_checkpoint_is_named(tmp_path):
    from paper import runs as paper_runs

    checkpoint = tmp_path / "base" / "seed3" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"PK")
    with pytest.raises(RuntimeError, match=r"(?s)last\.ckpt is damaged .*: delete .*seed3 to start over"):
        paper_runs.run_row(row("base"), 3, tmp_path, options(), print)


@pytest.mark.parametrize("last", ["", "0", "0,19", "0,19,", "0,19,1e-", "0,1-,2", "0,,1.5"])
def test_progress_while_a_line_is_being_written(tmp_path, last):
    from paper.runs import _progress

    path = tmp_path / "metrics.csv"
    path.write_text(f"epoch,step,train/loss\n0,9,1.5\n{last}")
    assert _progress(path, (0, 20), 60.0) == "step 10 of 20, loss 1.500, 1 min left"


@pytest.mark.slow
def test_a_training_ends_with_the_process_that_began_it():
    code = (
        "import threading, time, paper.train\n"
        "threading.Thread(target=paper.train.end_with_parent, daemon=True).start()\n"
        "time.sleep(120)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, env=environment())
    assert process.stdin is not None
    process.stdin.close()  # as when the parent is killed
    assert process.wait(timeout=60) == 1


def _wait_for(path, process, text=""):
    """Until the file is there, and has the text in it."""
    until = time.monotonic() + 120
    while not path.exists() or (text and text not in path.read_text()):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until, f"there is no {path}"
        time.sleep(0.005)


@pytest.mark.slow
def test_other_settings_do_not_mix_with_what_is_there(whole, images):
    from paper.reproduce import main

    with pytest.raises(
        SystemExit, match=r"holds a run with other settings \(model\.init_args\.optimizer\.init_args\.lr\)"
    ):
        main([*arguments(images, whole[0], "base"), "--lr", "0.05"])


@pytest.mark.slow
def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    from paper.reproduce import main

    path = tmp_path / "images.npz"
    x, y = np.zeros((20, 3, 8, 8), dtype=np.uint8), np.arange(20) % 10  # nothing to normalise by
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as failed:
        main(arguments(path, tmp_path, "base"))
    assert "base, seed 0: the training in" in str(failed.value)
    assert "`std` (=[0.0, 0.0, 0.0]), computed from `x_train`" in str(failed.value)
