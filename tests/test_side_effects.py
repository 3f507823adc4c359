"""The package changes no setting of the process that imports it."""

import subprocess
import sys

import pytest

IMPORTED_AND_USED = """
import logging, os, pkgutil, sys, warnings
from importlib import import_module
from importlib.util import find_spec

# What these change when they are imported is theirs.
for name in (
    "lightning.pytorch.cli", "lightning.pytorch.loggers", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "numpy", "rich.console", "safetensors.torch", "scipy.optimize", "sklearn.datasets", "timm", "torch.export",
    "torchmetrics", "torchvision", "triton", "mlxtend.data",
):
    try:
        import_module(name)
    except ImportError:  # optional
        pass
import matplotlib, numpy, torch


def settings():
    return {
        "warning filters": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "matrix products": torch.get_float32_matmul_precision(),
        "cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "matplotlib": {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams},
        "pyplot": "matplotlib.pyplot" in sys.modules,
        "path": list(sys.path),
        "logging": (logging.root.level, list(logging.root.handlers)),
    }


def check(what):
    changed = [name for name, value in settings().items() if value != before[name]]
    assert not changed, f"{what} changed {changed}"


before = settings()
random = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
import lightning_acu
names = [module.name for module in pkgutil.walk_packages(lightning_acu.__path__, "lightning_acu.")]
if not find_spec("transformers"):
    names.remove("lightning_acu.integrations.huggingface")
for name in names:
    import_module(name)
check("importing")
assert torch.equal(torch.get_rng_state(), random[0])
assert numpy.random.get_state()[1].tolist() == random[1]

from lightning_acu.data import DigitsDataModule
data = DigitsDataModule()
data.setup()
for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
    next(iter(loader))
check("a data module")

from lightning_acu.figures import plot_shapes, shapes_of
model = lightning_acu.convert_to_acu(lightning_acu.create_model("test_resnet"))
plot_shapes(shapes_of(model))
lightning_acu.fold_acu(lightning_acu.round_acu(model))
check("a model")
print(len(names), "modules")
"""


@pytest.mark.slow
def test_nothing_global_changes():
    done = subprocess.run([sys.executable, "-c", IMPORTED_AND_USED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 60
