"""The flow of scripts/gpu_check.sh, with stand-ins for what it calls: no GPU is needed for that."""

import csv
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
STEPS = ["tests", "sanitizer", "racecheck", "tiles", "ncu", "bfloat16", "train", "float16", "tf32", "float32", "memory"]
STAND_INS = {
    "python": f"""#!/bin/sh
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
    *is_available*) exit "${{NO_GPU:-0}}" ;;
    *tables.py*) exec {sys.executable} "$@" ;;
    *"${{FAILS:-none of them}}"*) printf 'a first line\\nthe reason\\n\\n'; exit 3 ;;
esac
echo all is well
""",
    "timeout": """#!/bin/sh
while :; do case "$1" in --*) shift ;; *) break ;; esac; done
printf '%s\\n' "$*" >>"$LIMITS"
case "$*" in *"${SLOW:-none of them}"*) exit 124 ;; esac
shift
exec "$@"
""",
    "compute-sanitizer": '#!/bin/sh\nshift 4\nexec "$@"\n',
    "ncu": '#!/bin/sh\nwhile [ "$1" != python ]; do shift; done\nexec "$@"\n',
}


@pytest.fixture
def check(tmp_path):
    """A function that runs the script: (its exit status, {step: its row}, the run, the folder of its output)."""
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    out = tmp_path / "out"

    def run(*part, **settings):
        paths = {name: str(tmp_path / name.lower()) for name in ("CALLS", "LIMITS")}
        path = f"{tmp_path / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
        environment = {"PATH": path, "PYTHON": "python", "HOME": str(tmp_path), **paths, **settings}
        done = subprocess.run([str(SCRIPT), str(out), *part], capture_output=True, text=True, env=environment)
        rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()[0] in [*STEPS, "warm-ups"]}
        return done, rows, out

    return run


def test_all_steps_run_and_fit_into_nine_minutes(check, tmp_path):
    done, rows, out = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows) == ["tests", "warm-ups", *STEPS[1:]]
    assert all(re.search(r"^\S+ +ok +\d+ s  all is well$", rows[step]) for step in STEPS)
    assert "9 of 9" in rows["warm-ups"]
    assert all((out / f"{step}.log").read_text().endswith("all is well\n") for step in STEPS)
    assert done.stdout.endswith((out / "table.txt").read_text())
    alone = re.findall(r"^(\d+) (?!.*--samples 1 )", (tmp_path / "limits").read_text(), re.MULTILINE)  # no warm-up
    assert len(alone) == len(STEPS)
    assert sum(map(int, alone)) <= 9 * 60


@pytest.mark.parametrize(("part", "steps"), [("1", STEPS[:5]), ("2", STEPS[5:])])
def test_a_part_has_its_own_steps_and_fits_into_four_minutes(check, tmp_path, part, steps):
    done, rows, _ = check(part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(rows) - {"warm-ups"} == set(steps)
    alone = re.findall(r"^(\d+) (?!.*--samples 1 )", (tmp_path / "limits").read_text(), re.MULTILINE)
    assert max(map(int, alone)) <= 240  # each ends 240 seconds after the start at the latest


def test_another_part_is_refused(check):
    done, _, _ = check("3")
    assert done.returncode == 2
    assert "the part is 1 or 2, not 3" in done.stderr


def test_a_step_that_fails_is_reported_and_the_rest_runs(check):
    done, rows, out = check(FAILS="--dtype float16")
    assert done.returncode == 1
    assert re.search(r"FAILED \(3\) +\d+ s  the reason$", rows["float16"])
    assert all(" ok " in rows[step] for step in STEPS if step != "float16")
    assert "8 of 9" in rows["warm-ups"]
    assert (out / "float16.log").read_text().startswith("a first line")


def test_a_step_that_takes_too_long_is_reported(check):
    done, rows, _ = check(SLOW="acu tune")
    assert done.returncode == 1
    assert "OUT OF TIME" in rows["tiles"]
    assert " ok " in rows["float16"]


def test_once_the_time_is_gone_steps_are_skipped_with_a_row(check, tmp_path):
    done, rows, _ = check(DEADLINE="0")
    assert done.returncode == 1
    assert all("SKIPPED" in rows[step] for step in STEPS)
    assert not (tmp_path / "limits").exists()


def test_without_a_gpu_it_says_so(check, tmp_path):
    done, rows, _ = check(NO_GPU="1")
    assert done.returncode == 2
    assert "torch finds no GPU here" in done.stderr
    assert not rows
    assert not (tmp_path / "limits").exists()


@pytest.mark.parametrize(("tool", "steps"), [("compute-sanitizer", ["sanitizer", "racecheck"]), ("ncu", ["ncu"])])
def test_without_a_tool_its_steps_alone_are_missing(check, tmp_path, tool, steps):
    (tmp_path / "bin" / tool).unlink()
    done, rows, _ = check()
    assert done.returncode == 0
    assert all(("skipped" in rows[step]) == (step in steps) for step in STEPS)


def test_the_table_with_all_results_has_at_most_forty_lines(check, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    methods = ["plain", "ours", "dense", "dcls", "dcls-autocast", "deform", "deform-autocast"]
    for dtype, kinds, launches in [
        ("bfloat16", ["dense3x3", "depthwise", "dense5x5"], ["graph", "eager"]),
        *((dtype, ["dense3x3", "depthwise"], ["graph"]) for dtype in ("float16", "tf32", "float32")),
    ]:
        rows = [
            {"dtype": dtype, "kind": kind, "launch": launch, "pass": what, "method": method}
            | {"milliseconds": 2.5, "ratio": 1.25}
            for kind, launch, what, method in itertools.product(
                kinds, launches, ["forward", "forward+backward"], methods
            )
        ]
        _write(out / f"acu_conv2d_{dtype}.csv", rows)
    memory = [
        {"dtype": "bfloat16", "kind": kind, "launch": "eager", "pass": "forward+backward", "method": method}
        | {"megabytes": 3.5, "ratio": 1.75}
        for kind, method in itertools.product(["dense3x3", "depthwise"], methods)
    ]
    _write(out / "acu_conv2d_memory.csv", memory)
    _write(
        out / "train_step.csv",
        [
            {"model": model, "precision": "autocast bfloat16", "mode": mode, "threads": 16, "batch": 128, "arm": arm}
            | {"milliseconds": 40.0, "ratio": 1.5}
            for model, mode, arm in itertools.product("abc", ["eager", "compiled"], ["plain", "ours", "dense"])
        ],
    )
    _, _, out = check()
    table = (out / "table.txt").read_text()
    assert len(table.splitlines()) <= 40
    assert table.count("1.25 / 1.25") == (6 + 6) * (len(methods) - 1)
    assert table.count(" 1.75") == 2 * (len(methods) - 1)
    assert table.count("40.0 ms (1.50)") == 12


def _write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
