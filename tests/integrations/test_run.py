"""The command line that runs a script with its models converted and their positions trained."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from lightning_acu import convert_to_acu
from lightning_acu.integrations.run import main

SCRIPT = """
import sys
import timm
import beside
if "--fail" in sys.argv:
    sys.exit("failed")
assert __name__ == "__main__"
print(sys.argv)
if "--model" in sys.argv:
    timm.create_model("test_resnet")
sys.exit(0)
"""
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def script(tmp_path):
    (tmp_path / "beside.py").touch()
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def test_what_stands_after_the_script_belongs_to_it(script, capsys):
    argv, path = list(sys.argv), list(sys.path)
    arguments = ["--model", "x", "--config", "theirs.yaml", "--positions.warmup_steps", "no"]
    main(["--positions.warmup_steps", "3", script, *arguments])
    output = capsys.readouterr()
    assert output.out.splitlines() == [str([script, *arguments])]
    assert "no optimizer held weights of a converted model" in output.err
    assert (sys.argv, sys.path) == (argv, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--positions.warmup_step", "3"], "unrecognized arguments|Unrecognized|does not accept|not recognized"),
        (["--positions.warmup_steps", "many"], "warmup_steps"),
        (["--convert.kernel_size", "3"], "kernel_size"),
        (["--warmup_steps", "3"], "warmup_steps"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_a_wrong_option_is_an_error_before_the_script_runs(script, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*options, script, "--model"])
    output = capsys.readouterr()
    assert re.search(message, output.err)
    assert not output.out


def test_a_script_that_does_not_exist_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["nowhere.py"])
    assert "`nowhere.py` does not exist or is not a file" in capsys.readouterr().err


def test_a_script_that_makes_no_model_is_an_error(script):
    with pytest.raises(RuntimeError, match="the script ended and no model has been converted"):
        main([script])


def test_the_exit_status_of_the_script_is_kept(script, capsys):
    with pytest.raises(SystemExit, match="failed"):
        main([script, "--model", "--fail"])
    assert "lightning_acu" not in capsys.readouterr().err


def test_options_in_a_file(script, tmp_path, capsys):
    (tmp_path / "acu.yaml").write_text("convert:\n  exclude_modules: [conv1.0]\npositions:\n  round_at: 5\n")
    main(["--config", str(tmp_path / "acu.yaml"), script, "--model"])
    assert "made a ResNet: 9 of 15 2-D convolutions are active" in capsys.readouterr().err


def run_example(*arguments):
    options = ["--positions.multiplier", "20", "--positions.warmup_steps", "8", "--positions.round_at", "24"]
    main([*options, str(EXAMPLES / "plain_script.py"), *map(str, arguments)])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "model"), [("timm", "test_resnet"), ("torchvision", "shufflenet_v2_x0_5")])
def test_a_script_is_trained_and_resumed_exactly(library, model, tmp_path, capsys):
    arguments = ["--library", library, "--model", model]
    run_example(*arguments, "--output", tmp_path / "whole")
    output = capsys.readouterr()
    assert "they are on whole pixels" in output.err
    states = [torch.load(tmp_path / f"whole/epoch-{epoch}.pt", weights_only=True) for epoch in range(4)]
    positions = [{k: v for k, v in state["state_dict"].items() if k.endswith("offsets")} for state in states]
    still, moved, rounded, end = positions
    assert not any(value.any() for value in still.values())
    assert all(value.any() for value in moved.values())
    assert all(torch.equal(value, value.round()) for value in rounded.values())
    assert same(rounded, end)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output.out)]
    assert losses[-1] < losses[0]

    run_example(*arguments, "--output", tmp_path / "resumed", "--resume", tmp_path / "whole/epoch-1.pt")
    resumed = torch.load(tmp_path / "resumed/epoch-3.pt", weights_only=True)
    for key in ("state_dict", "average"):
        assert same(resumed[key], states[3][key])


@pytest.mark.slow
def test_a_checkpoint_is_evaluated_by_another_process(tmp_path):
    saved = convert_to_acu(timm.create_model("test_resnet", num_classes=10))
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "saved.pt")
    script = [EXAMPLES / "plain_script.py", "--evaluate", tmp_path / "saved.pt"]
    command = [sys.executable, "-m", "lightning_acu.integrations.run", *map(str, script)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "no positions were trained" in done.stderr
