import io
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from lightning_acu.data import ArrayDataModule


def ready(path, **arguments):
    data = ArrayDataModule(path, **arguments)
    data.setup()
    return data


def all_images(dataset):
    return torch.stack([image for image, _ in dataset])


def test_batches(arrays, save):
    data = ArrayDataModule(save(arrays), batch_size=8)
    # Known before setup, for a command line to link.
    assert (data.num_classes, data.in_chans, data.image_size) == (3, 3, (5, 7))
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 5, 7)
    assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (8,))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, ">f4", np.float16])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW1", "N1HW", "NHW"])
def test_layouts_hold_the_same_images(arrays, save, layout, dtype):
    rgb = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 3, 1, 2)}
    for key in ("x_train", "x_test"):
        images = arrays[key] if dtype == np.uint8 else (arrays[key] / 255).astype(dtype)
        grey = images[..., :1]
        arrays[key] = {"NHW1": grey, "N1HW": grey.transpose(0, 3, 1, 2), "NHW": grey[..., 0]}.get(
            layout, images.transpose(rgb.get(layout, rgb["NHWC"]))
        )
    channels = 3 if layout in rgb else 1
    data = ready(save(arrays), mean=[0.0] * channels, std=[1.0] * channels)
    assert (data.in_chans, data.image_size) == (channels, (5, 7))
    expected = np.random.default_rng(0).integers(0, 256, (90, 5, 7, 3), dtype=np.uint8)[..., :channels] / 255
    index = data.train_set.indices[0]
    tolerance = 1e-3 if dtype == np.float16 else 1e-6
    torch.testing.assert_close(
        data.train_set[0][0].permute(1, 2, 0).double(), torch.from_numpy(expected[index]), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("scale", [np.uint8(1), np.float32(10)])
def test_statistics_come_from_the_training_images(arrays, save, scale):
    # Channels of unlike brightness and contrast, for which one common mean would not do.
    arrays["x_train"] = (arrays["x_train"] // np.array([1, 2, 4], np.uint8) + np.array([0, 30, 90], np.uint8)) * scale
    arrays["x_test"] = np.zeros_like(arrays["x_train"][:12])
    data = ready(save(arrays), val_size=0)
    images = all_images(data.train_set)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    # Test images are seen through the same statistics, and not through their own.
    assert data.test_set[0][0].amax() < -0.5


def test_given_statistics(arrays, save):
    data = ready(save(arrays), mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.4])
    expected = (arrays["x_test"][3] / 255 - [0.5, 0.4, 0.3]) / [0.1, 0.2, 0.4]
    torch.testing.assert_close(
        data.test_set[3][0].permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-5, rtol=0
    )


def test_split_is_stratified_disjoint_and_seeded(arrays, save):
    path = save(arrays)
    data = ready(path, val_size=9, seed=1)
    train, val = data.train_set, data.val_set
    assert sorted([*train.indices, *val.indices]) == list(range(90))
    assert val.dataset.labels[val.indices].bincount().tolist() == [6, 2, 1]
    assert ready(path, val_size=0.1, seed=1).val_set.indices == val.indices
    assert ready(path, val_size=9, seed=2).val_set.indices != val.indices
    assert [label for _, label in data.test_set] == arrays["y_test"].tolist()


def test_labels_stay_with_their_images(arrays, save):
    # The brightness of an image tells its class.
    for part in ("train", "test"):
        arrays[f"x_{part}"][:] = 50 * arrays[f"y_{part}"].astype(np.uint8)[:, None, None, None]
    data = ready(save(arrays), mean=[0.0] * 3, std=[1.0] * 3)
    for dataset in (data.train_set, data.val_set, data.test_set):
        assert all(round(float(image.mean()) * 255 / 50) == label for image, label in dataset)


def test_augmentation_is_for_training_only(arrays, save):
    path = save(arrays)
    for options in ({}, {"crop_padding": 2}, {"flip": True}):
        data = ready(path, **options)
        views = {part: {tuple(part_set[0][0].flatten().tolist()) for _ in range(40)} for part, part_set in (
            ("train", data.train_set), ("val", data.val_set), ("test", data.test_set))}  # fmt: skip
        assert len(views["val"]) == len(views["test"]) == 1
        assert (len(views["train"]) > 1) == bool(options)
    data = ready(path, flip=True)
    plain = ready(path).train_set[0][0]
    for _ in range(20):
        image = data.train_set[0][0]
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_see_the_same_images(arrays, save):
    path = save(arrays)
    alone, helped = (ready(path, num_workers=n, batch_size=5).test_dataloader() for n in (0, 2))
    for (images, labels), (same_images, same_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)


def test_setup_twice_changes_nothing(arrays, save):
    data = ready(save(arrays))
    train = data.train_set
    data.setup("test")
    assert data.train_set is train


def test_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"^`path` \(='.*none.npz'\) does not exist or is not a file; give an .npz archive of x_t",
    ):
        ready(tmp_path / "none.npz")


def test_not_an_archive(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"^`path` \(='.*one.npy'\) is not an .npz archive"):
        ready(tmp_path / "one.npy")


def test_missing_arrays(arrays, save):
    del arrays["x_test"], arrays["y_test"]
    arrays["images"] = arrays["x_train"]
    with pytest.raises(ValueError, match=r"lacks x_test, y_test; it has x_train, y_train, images$"):
        ready(save(arrays))


def test_pickled_arrays_are_refused(arrays, save):
    arrays["y_train"] = np.array([object()] * 90)
    with pytest.raises(
        ValueError,
        match=r"^`path` \(='.*npz'\) cannot be read: `y_train` holds Python objects; store numbers, conv",
    ):
        ready(save(arrays))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("x_train", lambda x: x[:-1], r"^`x_train` has 89 images but `y_train` has 90 labels: they must match$"),
        ("y_test", lambda y: y[:5], r"^`x_test` has 12 images but `y_test` has 5 labels"),
        ("x_train", lambda x: x[:0], r"^`x_train` \(shape \(0, 5, 7, 3\)\) must hold at least one image$"),
        ("x_test", lambda x: x[:, :0], r"^`x_test` \(shape \(12, 0, 7, 3\)\) must hold at least one image$"),
        ("x_train", lambda x: x[0, 0, 0, 0], r"^`x_train` \(shape \(\)\) must hold at least one image$"),
        ("y_train", lambda y: y[:0], r"^`y_train` \(shape \(0,\)\) must hold at least one label$"),
        ("y_train", lambda y: y[:, None], r"^`y_train` \(shape \(90, 1\)\) must have one label per image"),
        ("y_train", lambda y: y.astype(float), r"^`y_train` \(dtype float64\) must hold integers; convert"),
        ("y_train", lambda y: y - 1, r"^`y_train` has the label -1; labels must start from 0$"),
        ("y_train", lambda y: y + 1, r"^`y_train` has labels up to 3 but none of \[0\]; number the classes from 0"),
        ("y_train", lambda y: y * 3, r"^`y_train` has labels up to 6 but none of \[1, 2, 4, 5\]"),
        ("y_test", lambda y: y + 5, r"^`y_test` has the label 7, but `y_train` has only 0 ... 2$"),
        (
            "x_test",
            lambda x: x[:, :4],
            r"^`x_train` and `x_test` must have the same .* \(5, 7, 3\) uint8 and \(4, 7, 3\) uint8$",
        ),
        ("x_test", lambda x: x / 255, r"must have the same image shape and dtype, but have .* uint8 and .* float64$"),
    ],
)
def test_arrays_that_do_not_fit(arrays, save, key, change, message):
    arrays[key] = change(arrays[key])
    path = save(arrays)
    with pytest.raises(ValueError, match=message.removesuffix("$") + rf".* \(`path`='{path}'\)$"):
        ready(path)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((90, 3, 7, 3), "u1", r"^`x_train` \(shape \(90, 3, 7, 3\)\) is ambiguous: both axis 1 and axis 3"),
        ((90, 5, 7, 2), "u1", r"^`x_train` \(shape \(90, 5, 7, 2\)\) has no channel axis: axis 1 or axis 3"),
        ((90, 35), "u1", r"^`x_train` \(shape \(90, 35\)\) must be \(N, H, W\), \(N, H, W, C\) or \(N, C, H, W\)$"),
        ((90, 5, 7), "i8", r"^`x_train` \(dtype int64\) must be uint8, for 0 ... 255, or floating point$"),
    ],
)
def test_images_that_are_unclear(arrays, save, shape, dtype, message):
    arrays["x_train"], arrays["x_test"] = np.zeros(shape, dtype), np.zeros((12, *shape[1:]), dtype)
    path = save(arrays)
    with pytest.raises(ValueError, match=message.removesuffix("$") + rf".* \(`path`='{path}'\)$"):
        ready(path)


def test_arguments_that_do_not_fit(arrays, save):
    path = save(arrays)
    for name in ("mean", "std"):
        with pytest.raises(
            ValueError, match=rf"^`{name}` \(=\[0.5\]\) must have one number for each of the 3 channels$"
        ):
            ready(path, **{name: [0.5]})
        with pytest.raises(ValueError, match=rf"^`{name}` \(=\[1.0\]\) has no effect with `preprocessing='whiten'`"):
            ArrayDataModule(path, preprocessing="whiten", **{name: [1.0]})
    with pytest.raises(ValueError, match=r"^`std` \(=\[1.0, 0.0, 1.0\]\), given, must be positive"):
        ready(path, std=[1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"^`val_size` \(=90\) must be smaller than the 90 training images$"):
        ready(path, val_size=90)
    with pytest.raises(ValueError, match=r"^`crop_padding` \(=-1\) must be at least 0 pixels$"):
        ArrayDataModule(path, crop_padding=-1)


def test_images_without_contrast(arrays, save):
    arrays["x_train"][..., 1] = 7
    path = save(arrays)
    with pytest.raises(ValueError, match=rf"computed from `x_train` of {path}, whose images may be constant, must be"):
        ready(path)
    with pytest.raises(ValueError, match=r"^`mean` \(=\[0.0, nan, 0.0\]\) must be finite in every channel$"):
        ready(path, mean=[0.0, float("nan"), 0.0], std=[1.0] * 3)


@pytest.mark.parametrize("key", ["x_train", "x_test"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_images_that_are_not_finite(arrays, save, key, value):
    arrays.update({name: arrays[name] / 255 for name in ("x_train", "x_test")})
    arrays[key][7, 2, 3, 1] = value
    path = save(arrays)
    message = rf"^`{key}` must be finite, but image 7 holds NaN, infinity or .* \(`path`='{path}'\)$"
    with pytest.raises(ValueError, match=message):
        ready(path)


def test_a_huge_label_costs_no_memory(arrays, save):
    for huge in (10**7, 2**62, np.uint64(2**64 - 1)):
        changed = arrays["y_train"].astype(np.asarray(huge).dtype)
        changed[3] = huge
        path = save(arrays | {"y_train": changed})
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"has labels up to {huge} but none of \[3, 4, 5, 6, 7\]; .*'{path}'"):
            ready(path)
        assert tracemalloc.get_traced_memory()[1] < 2e6
        tracemalloc.stop()


def test_a_damaged_archive(arrays, save):
    path = save(arrays)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1  # in x_train
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^`path` \(='{path}'\) is damaged \(`x_train`: Bad CRC-32.*\); download or write it again$"
    ):
        ready(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is not an .npz archive, or is cut short; write one with"):
        ready(path)


@pytest.fixture
def rewrite(arrays, save):
    """Writes the archive again with a change to the file of `x_train`, or to its entry in the archive."""

    def to(change=lambda content: content, **entry):
        path = save(arrays)
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                info = zipfile.ZipInfo(name)
                if name == "x_train.npy":
                    content = change(content)
                    for key, value in entry.items():
                        setattr(info, key, value)
                archive.writestr(info, content)
        return path

    return to


def header(shape, descr="'|u1'"):
    """Of x_train.npy, for another shape."""
    file = io.BytesIO()
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    file.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1"))
    return lambda content: file.getvalue() + content[128:]


@pytest.mark.parametrize(
    "change",
    [
        header("(90, 5, 7, 10**9)"),
        header("(10000000, 1000, 1000, 3)"),
        header("(90, 5, 7, 2)"),  # fewer numbers than there are
        header("(-90, -5, 7, 3)"),
        header("(90, 5, 7, 3)", "'|O'"),
        header("(90, 5, 7, 3)", "[('a', 'u1')]"),
        header("(90, 5, 7, 3)", "[]"),
        header("((((((((((90", "'"),
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: content[:20],
        lambda content: b"",
        lambda content: content[:6] + b"\x03" + content[7:],
    ],
)
def test_a_header_that_does_not_fit(rewrite, change):
    path = rewrite(change)
    with pytest.raises(ValueError, match=rf"'{path}'.*x_train|x_train.*'{path}'"):
        ready(path)


def test_ways_of_compression(rewrite):
    assert len(ready(rewrite(compress_type=zipfile.ZIP_DEFLATED)).train_set) == 81
    for other in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        path = rewrite(compress_type=other)
        with pytest.raises(ValueError, match=rf"'{path}'\) holds `x_train` compressed in a way that NumPy does not"):
            ready(path)


def test_an_archive_that_promises_more_than_it_holds(rewrite):
    """Its directory and its header agree on 30 TB of zeros; the data would be 7 kB."""
    path = rewrite(header("(3000000000, 100, 100)"), compress_type=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"'{path}'\) is damaged \(`x_train`: an array of shape \(3000000000, 100,"):
        ready(path)


def test_an_encrypted_archive(rewrite):
    path = rewrite()
    content = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + at] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^`path` \(='{path}'\) is encrypted \(`x_train`\); write it again"):
        ready(path)


def test_more_images_than_there_is_memory_for(arrays, save, monkeypatch):
    path = save(arrays)

    def read(*_, **__):
        raise MemoryError

    monkeypatch.setattr("lightning_acu.data.npz.npy.read_array", read)
    with pytest.raises(ValueError, match=rf"'{path}'\) is too large: `x_train` takes 0.0 GiB, more than there"):
        ready(path)
