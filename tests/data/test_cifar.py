import hashlib
import io
import pickle
import tarfile
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_acu.data import CIFARDataModule

PER_FILE = 20


def write(source, folder, classes):
    """Small files in the official layout: rows of 1024 red, 1024 green and 1024 blue pixels."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    for name, _ in source.train_list + source.test_list:
        count = PER_FILE * (5 if classes == 100 else 1)
        labels = [i % classes for i in range(count)]
        data = rng.integers(0, 256, (count, 3, 1024), dtype=np.uint8)
        # Red tells the class, blue the row.
        data[:, 0] = np.array(labels, np.uint8)[:, None]
        data[:, 2] = np.repeat(np.arange(32, dtype=np.uint8), 32)
        (folder / name).write_bytes(pickle.dumps({"data": data.reshape(count, 3072), key: labels}))
    meta = {source.meta["key"]: [str(i) for i in range(classes)]}
    (folder / source.meta["filename"]).write_bytes(pickle.dumps(meta))


@pytest.fixture(params=[10, 100])
def classes(request):
    return request.param


@pytest.fixture
def root(tmp_path, monkeypatch, classes):
    """A folder with a small CIFAR, whose checksums torchvision is made to leave out."""
    source = {10: CIFAR10, 100: CIFAR100}[classes]
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(source, name, [[file, None] for file, _ in getattr(source, name)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": None})
    write(source, tmp_path / source.base_folder, classes)
    return tmp_path


def ready(root, classes=10, stage=None, **arguments):
    data = CIFARDataModule(root, classes, **arguments)
    data.prepare_data()
    data.setup(stage)
    return data


def test_batches(root, classes, no_network):
    data = ready(root, classes, val_size=20, batch_size=16, num_workers=0)
    assert (data.num_classes, data.in_chans, data.image_size) == (classes, 3, (32, 32))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (16, 3, 32, 32)
        assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (16,))


def test_images_are_normalised_and_keep_their_labels(root, classes):
    mean, std = {10: (0.4914, 0.2470), 100: (0.5071, 0.2673)}[classes]
    data = ready(root, classes, val_size=20, augment=False)
    for dataset in (data.train_set, data.val_set, data.test_set):
        for image, label in dataset:
            torch.testing.assert_close(image[0], torch.full((32, 32), (label / 255 - mean) / std))
            assert (image[2].diff(dim=0) > 0).all()
            assert (image[2].diff(dim=1) == 0).all()


def test_split(root, classes):
    data = ready(root, classes, val_size=0.5, download=False)
    train, val = data.train_set, data.val_set
    assert sorted([*train.indices, *val.indices]) == list(range(100))
    if classes == 10:
        assert val.dataset.labels[val.indices].bincount().tolist() == [5] * 10
    assert ready(root, classes, val_size=50).val_set.indices == val.indices
    assert ready(root, classes, val_size=50, seed=1).val_set.indices != val.indices
    assert len(ready(root, classes, val_size=0).train_set) == 100


def test_augmentation_is_for_training_only(root, classes):
    data, plain = ready(root, classes, val_size=20), ready(root, classes, val_size=20, augment=False)
    assert not torch.equal(data.train_set[0][0], data.train_set[0][0])
    for dataset in (data.val_set, data.test_set, plain.train_set):
        assert torch.equal(dataset[0][0], dataset[0][0])
    # Where the centre of a view is found in the original (green is noise), and in its mirror image: shifts of up to 4.
    original = plain.train_set[0][0][1]
    torch.manual_seed(0)
    views = [data.train_set[0][0][1, 12:20, 12:20] for _ in range(100)]
    for candidate in (original, original.flip(1)):
        windows = candidate.unfold(0, 8, 1).unfold(1, 8, 1)
        found = torch.cat([(windows == view).all(2).all(2).nonzero() for view in views])
        assert 30 < len(found) < 70
        assert {row for row, _ in found.tolist()} == {column for _, column in found.tolist()} == set(range(8, 17))


def test_each_stage_reads_only_what_it_needs(root, classes):
    fit, test = ready(root, classes, "fit", val_size=20), ready(root, classes, "test", val_size=20)
    assert fit.test_set is None
    assert test.train_set is None
    train = fit.train_set
    fit.setup("fit")
    fit.setup("test")
    assert fit.train_set is train
    assert len(fit.test_set) == len(test.test_set)


def test_archive_in_the_folder_is_unpacked_without_a_network(tmp_path, monkeypatch, root, classes, no_network):
    source = {10: CIFAR10, 100: CIFAR100}[classes]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(root / source.base_folder, source.base_folder)
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / source.filename).write_bytes(packed.getvalue())
    monkeypatch.setattr(source, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    assert len(ready(place, classes, val_size=20).train_set) == 80


def test_failed_download_says_what_to_do(tmp_path, no_network, classes):
    source = {10: CIFAR10, 100: CIFAR100}[classes]
    with pytest.raises(RuntimeError, match=rf"^could not get {source.__name__} .*no route to host") as error:
        CIFARDataModule(tmp_path / "here", classes).prepare_data()
    assert f"Put {source.filename}, from {source.url}, into `root` (='{tmp_path / 'here'}')" in str(error.value)


@pytest.mark.parametrize("ending", ["early", "wrong"])
def test_damaged_download(tmp_path, monkeypatch, ending):
    def retrieve(url, path):
        Path(path).write_bytes(b"a part of the archive")
        if ending == "early":
            raise IncompleteRead(b"")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", retrieve)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    with pytest.raises(RuntimeError, match=r"^could not get CIFAR10 \(.*\): .* is damaged: its checksum is wrong. Put"):
        CIFARDataModule(tmp_path).prepare_data()


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_missing_files_without_download(tmp_path, stage):
    message = (
        "^CIFAR10 is missing or damaged: `root` has no folder cifar-10-batches-py. Put cifar-10-python.tar.gz, from"
    )
    with pytest.raises(FileNotFoundError, match=message):
        ready(tmp_path, stage=stage, download=False)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^CIFAR10 is .*: `root` \(='.*nowhere'\) does not exist. Put"):
        ready(tmp_path / "nowhere", download=False)


def test_other_number_of_classes(root, classes, no_network):
    other = 110 - classes
    have, want = (("cifar-10-batches-py", "CIFAR100"), ("cifar-100-python", "CIFAR10"))[classes == 100]
    message = f"`root` has {have}, which is for `num_classes={classes}`. Put cifar-{other}-python.tar.gz"
    with pytest.raises(FileNotFoundError, match=rf"^{want} is missing or damaged: {message}"):
        ready(root, other, download=False)
    with pytest.raises(RuntimeError, match=rf"^could not get {want} \(.*no route to host.*\): {message}"):
        ready(root, other)


def test_damaged_files_are_named(root, classes, monkeypatch):
    source = {10: CIFAR10, 100: CIFAR100}[classes]
    (name, _), *others = source.train_list
    monkeypatch.setattr(source, "train_list", [[name, "0" * 32], *others])
    with pytest.raises(FileNotFoundError, match=rf"{source.base_folder} are missing or damaged: {name}. Put"):
        ready(root, classes, download=False)
    monkeypatch.setattr(source, "train_list", [[name, None], *others])
    (root / source.base_folder / source.meta["filename"]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"are missing or damaged: {source.meta['filename']}. Put"):
        ready(root, classes, download=False)


@pytest.fixture
def whitenings(monkeypatch):
    """What whitening was asked for; decomposing 3072 x 3072 numbers takes too long here, so it only subtracts 100."""
    asked = []

    def fake(images, indices, folder):
        asked.append((images, sorted(indices.tolist()), folder))
        return lambda images: images.float() - 100

    monkeypatch.setattr("lightning_acu.data.in_memory.cached_whitening", fake)
    return asked


@pytest.mark.parametrize("stages", [["fit", "test"], ["test", "fit"], [None]])
def test_whitening_is_fitted_once_on_the_images_trained_on(root, classes, whitenings, stages):
    plain = ready(root, classes, val_size=20)
    data = CIFARDataModule(root, classes, val_size=20, preprocessing="whiten", augment=False)
    for stage in stages:
        data.setup(stage)
    ((images, indices, folder),) = whitenings
    assert folder == root
    assert torch.equal(images, plain.train_set.dataset.images)
    assert indices == sorted(plain.train_set.indices) == sorted(data.train_set.indices)
    for name in ("train_set", "val_set", "test_set"):
        # Whitened, and nothing else done to it.
        one, (image, label) = getattr(plain, name), getattr(data, name)[3]
        source, index = (one, 3) if name == "test_set" else (one.dataset, one.indices[3])
        assert torch.equal(image, source.images[index] - 100.0)
        assert label == source.labels[index]


def test_whitened_images_are_padded_with_zeros_after_whitening(root, classes, whitenings, tmp_path):
    data = ready(root, classes, "fit", val_size=20, preprocessing="whiten", whitening_cache=tmp_path / "cache")
    assert whitenings[0][2] == tmp_path / "cache"
    assert data.train_set.dataset.images.amin() < -1
    rows = torch.stack([data.train_set[0][0][2] for _ in range(50)])  # blue is the row less 100 where there is an image
    assert set(rows.unique().tolist()) == {0.0, *(row - 100.0 for row in range(32))}


def test_batches_on_the_device_are_those_of_single_images(root, classes):
    arguments = {"val_size": 20, "batch_size": 16}
    data, single = ready(root, classes, on_device=True, **arguments), ready(root, classes, num_workers=0, **arguments)
    for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        batches = zip(getattr(data, loader)(), getattr(single, loader)(), strict=True)
        assert all(torch.equal(i, j) and torch.equal(k, n) for (i, k), (j, n) in batches)
    train = data.train_dataloader()
    assert len(train) == 5
    images, labels = next(iter(train))
    assert (images.shape, images.dtype, labels.dtype) == ((16, 3, 32, 32), torch.float32, torch.int64)


def test_bad_arguments(root, classes):
    with pytest.raises(ValueError, match=r"^`num_classes` \(=20\) must be 10, for CIFAR-10, or 100, for CIFAR-100$"):
        CIFARDataModule(root, num_classes=20)
    with pytest.raises(ValueError, match=r"^`preprocessing` \(='zca'\) must be 'normalize' or 'whiten'$"):
        CIFARDataModule(root, preprocessing="zca")
    for name, value in (("num_workers", 2), ("pin_memory", True)):
        with pytest.raises(ValueError, match=rf"^`{name}` \(={value}\) has no effect with `on_device=True`"):
            CIFARDataModule(root, on_device=True, **{name: value})
    with pytest.raises(ValueError, match=r"^`val_size` \(=5000\) must be smaller than the 100 training images$"):
        ready(root, classes)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_no_pickle_is_read_but_the_published_ones(tmp_path, no_network, classes, stage):
    """With the checksums of the real files."""
    source = {10: CIFAR10, 100: CIFAR100}[classes]
    folder = tmp_path / source.base_folder
    folder.mkdir()
    for name in (*(file for file, _ in (*source.train_list, *source.test_list)), source.meta["filename"]):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "has run")))
    with pytest.raises(FileNotFoundError, match=rf"files in {folder} are missing or damaged: .*{name}. Put"):
        CIFARDataModule(tmp_path, classes, download=False).setup(stage)
    with pytest.raises(RuntimeError, match=r"no route to host"):
        CIFARDataModule(tmp_path, classes).prepare_data()
    assert not (tmp_path / "has run").exists()
    pickle.loads((folder / name).read_bytes()).close()
    assert (tmp_path / "has run").exists()  # it would have been seen
