"""scripts/kill_trials.py: a training that is killed while it ends, and what the script sees of damage."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import kill_trials

SCRIPT = Path(kill_trials.__file__)


@pytest.mark.slow
def test_killed_after_the_last_step_and_resumed_is_as_if_never_killed():
    """While pictures, the final model or its evaluation are written; through the command line."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--trials", "1", "--seed", "7"],
        capture_output=True, text=True, check=False, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "trial 7: as if never killed (at shapes.png" in run.stdout


def runs(tmp_path, *names):
    """Finished runs with equal files, without pictures that can be looked at."""
    for name in names:
        folder = tmp_path / name / "run" / "version_0"
        folder.mkdir(parents=True)
        for file in (*kill_trials.KEPT, *kill_trials.RESULTS):
            if file.endswith(".ckpt"):
                torch.save({"state_dict": {"offsets": torch.arange(4.0)}}, folder / file)
            elif file == "summary.json":
                # How long a training took is its own in each run.
                (folder / file).write_text(json.dumps({"price": {"fit_seconds": len(name)}}))
            else:
                (folder / file).write_text(file)
        (folder / "metrics.csv").write_text("step,acu/x,test/loss\n2,0.5,\n4,0.7,\n4,,1\n4,,2\n")
    return [tmp_path / name for name in names]


def test_equal_runs_pass_also_with_less_recorded_before_the_kill(tmp_path):
    whole, resumed = runs(tmp_path, "whole", "resumed")
    kill_trials.compare(resumed, whole)
    (resumed / "run" / "version_0").rename(resumed / "run" / "version_1")
    before = resumed / "run" / "version_0"
    before.mkdir()
    (before / "metrics.csv").write_text("step,acu/x,test/loss\n2,0.5,\n4,0.7,\n4,,1\n4,")
    kill_trials.compare(resumed, whole)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("shapes.gif", "another", "shapes.gif differs"),
        ("shapes.html", "another", "shapes.html differs"),
        ("summary.json", '{"price": {"fit_seconds": 1, "steps": 2}}', "summary.json differs"),
        ("summary.json", None, "summary.json was not written"),
        ("metrics.csv", "step,acu/x,test/loss\n2,0.6,\n4,0.7,\n4,,1\n4,,2\n", r"acu/x.* is \['0.6'\] .*\['0.5'\]"),
        ("metrics.csv", "step,acu/x,test/loss\n2,0.5,\n4,0.7,\n4,,1\n", r"test/loss.* is \['1'\] .*\['1', '2'\]"),
        ("metrics.csv", "step,acu/x,test/loss\n3,0.5,\n4,0.7,\n4,,1\n4,,2\n", r"'3', 'acu/x'.* instead of \[\]"),
    ],
)
def test_other_files_and_numbers_are_seen(tmp_path, file, content, message):
    whole, resumed = runs(tmp_path, "whole", "resumed")
    path = resumed / "run" / "version_0" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(AssertionError, match=message):
        kill_trials.compare(resumed, whole)


@pytest.mark.parametrize("file", ["final.ckpt", "shapes.png", "shapes.gif", "summary.json", "left.over"])
def test_damage_is_seen_but_not_in_hidden_files(tmp_path, file):
    folder = tmp_path / "run" / "version_0" / ".hidden"
    folder.mkdir(parents=True)
    (folder / file).write_bytes(b"ha")
    kill_trials.check_whole(tmp_path)
    (folder.parent / file).write_bytes(b"ha")
    with pytest.raises(AssertionError, match=f"{file} is damaged"):
        kill_trials.check_whole(tmp_path)
