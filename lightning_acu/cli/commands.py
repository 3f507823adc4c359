"""The list of commands: what ``lightning-acu --help`` says about each, and the module that runs it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "TRAINING", "module_of", "run_command"]

#: The commands of LightningCLI, which runs them: ``training.py``.
TRAINING = ("fit", "validate", "test", "predict")

#: One line for each command, and an example. A command NAME is the function ``run(words)`` in ``NAME.py`` (_ for -).
#: The first of the words is its name.
COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("train a model", "fit --config quickstart.yaml"),
    "validate": ("evaluate on the validation images", "validate --ckpt_path runs/mine/version_0/final.ckpt"),
    "test": ("evaluate on the test images", "test --ckpt_path runs/mine/version_0/final.ckpt"),
    "predict": ("classify images, write predictions.csv", "predict --ckpt final.ckpt photos/"),
    "configs": ("list the configurations that come with the package, or copy one", "configs quickstart"),
    "report": ("what a conversion makes active, and its arithmetic", "report --model resnet50 --kernel_sizes 3"),
    "view": ("write a page of the learned shapes, to open in a browser", "view runs/mine/version_0"),
    "compare": ("put finished runs beside one another", "compare runs/quickstart_baseline runs/quickstart"),
    "convert": ("write a converted model to a file", "convert --model resnet50 --pretrained --out net.safetensors"),
    "export": ("fold a trained model, write it for other runtimes", "export --ckpt final.ckpt --to onnx"),
    "tune": ("measure which backend is fastest here", "tune --model resnet50 --input_size 3 224 224"),
    "import-caffe": ("read the paper's released network", "import-caffe plain_iter_64000.caffemodel"),
    "completion": ("print a script that completes options in your shell", "completion bash"),
}


def module_of(command: str) -> Any:
    """The module that runs it; not for those of LightningCLI, but for the own part of predict."""
    return import_module(f".{command.replace('-', '_')}", __package__)


def run_command(words: list[str]) -> None:
    """Run the command ``words[0]`` with the arguments after it."""
    name = "training" if words[0] in TRAINING and words[0] != "predict" else words[0]
    module_of(name).run(words)
