"""Uses an installed lightning_acu as a stranger would, outside any checkout; `scripts/check_wheel.sh` calls it, and CI.

    python scripts/check_wheel.py          the operator on its compiled kernels, a conversion, a fold, the command line
    python scripts/check_wheel.py --train  and a short training from a configuration, and an export: a minute

Works in a temporary folder. Needs what the wheel depends on; the export also needs the extra "onnx".
"""

import argparse
import os
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import timm
import torch

import lightning_acu
from lightning_acu import acu_conv2d, acu_layers, convert_to_acu, fold_acu
from lightning_acu.ops.cpu import backend as cpu_backend

QUICK = ["--trainer.max_epochs", "4", "--trainer.limit_train_batches", "30", "--trainer.enable_progress_bar", "false"]


def check_place() -> str:
    """The package is the installed one."""
    site = Path(sysconfig.get_path("platlib"))
    place = Path(lightning_acu.__file__).resolve()
    assert place.is_relative_to(site.resolve()), f"imported from {place}, not from {site}"
    return f"{lightning_acu.__version__} in {site}"


def check_kernels() -> str:
    """The compiled kernels are there and equal the formula, forward and backward."""
    assert cpu_backend.MISSING is None, cpu_backend.MISSING
    torch.manual_seed(0)
    for groups in (1, 6):
        results = {}
        case = torch.randn(2, 6, 9, 7), torch.randn(12, 6 // groups, 3, 3), torch.randn(9, 2)
        for backend in ("cython", "reference"):
            inputs = [tensor.clone().requires_grad_() for tensor in case]
            output = acu_conv2d(*inputs, padding=1, groups=groups, backend=backend)
            results[backend] = [output, *torch.autograd.grad(output.square().sum(), inputs)]
        torch.testing.assert_close(results["cython"], results["reference"], rtol=1e-4, atol=1e-4)
    kernels = cpu_backend._vectors
    return f"{kernels.current()}, {'OpenMP' if kernels.OPENMP else 'one thread'}, {Path(kernels.__file__).name}"


def check_models() -> str:
    """A conversion keeps the outputs, and a fold of moved taps does too."""
    model = timm.create_model("resnet18", num_classes=10).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(image)
        convert_to_acu(model, kernel_sizes=[3])
        torch.testing.assert_close(model(image), plain)
        layers = [layer for _, layer in acu_layers(model)]
        for layer in layers:
            layer.offsets.uniform_(-1, 1)
        moved = model(image)
        fold_acu(model)
        torch.testing.assert_close(model(image), moved, rtol=1e-4, atol=1e-4)
    return f"{len(layers)} layers converted and folded"


def command(*arguments: str) -> str:
    """What the installed `lightning-acu` prints."""
    program = Path(sysconfig.get_path("scripts"), "lightning-acu")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"lightning-acu {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
    return done.stdout


def check_command_line() -> str:
    """The configurations are listed and copied, and a model is reported."""
    assert "quickstart.yaml" in command("configs")
    command("configs", "quickstart")
    assert Path("quickstart.yaml").is_file()
    assert "layer4" in command("report", "--model", "resnet18")
    return "configs, report"


def check_training() -> str:
    """The copied configuration trains, and the result is exported."""
    command("fit", "--config", "quickstart.yaml", *QUICK)
    command("export", "--ckpt", "runs/quickstart/version_0/final.ckpt", "--to", "onnx")
    (exported,) = Path().rglob("*.onnx")
    return f"fit, {exported}"


def main() -> None:
    """Run the checks, one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train and export as well")
    options = parser.parse_args()
    checks = [check_place, check_kernels, check_models, check_command_line] + [check_training] * options.train
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        for check in checks:
            start = time.perf_counter()
            print(f"{check.__name__}: {check()} ({time.perf_counter() - start:.0f} s)", flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main()
