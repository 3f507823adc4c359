"""What several test files share."""

import os
import shutil

import pytest
import torch
from filelock import FileLock

# Triton's kernels run in its interpreter where there is no GPU. Read when they are defined, so it is set for all tests.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Triton 3.9 warns where it is unset; this is what it then takes.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# LightningCLI 2.6 calls what jsonargparse 4.49 deprecates; as errors, these would end up in its own error messages.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What the user's cache says of backends and tiles must not change what is tested, nor tests the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_ACU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A function (name, make) that gives a folder, which ``make(folder)`` fills once for all processes of the session.

    A module's fixture is made in each process of pytest-xdist that runs one of its tests: what is expensive goes here.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all processes

    def get(name, make):
        folder, made = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # half of one that failed
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get
