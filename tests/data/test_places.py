import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Places365

from lightning_acu.data import Places365DataModule

CLASSES = ("/a/airfield", "/b/bakery/shop", "/b/bakery/window")
COLOURS = {"airfield": (200, 30, 10), "shop": (20, 180, 40), "window": (30, 60, 250)}


def colour(name):
    return COLOURS[name.rstrip("/").replace("-", "/").split("/")[-1]]


def picture(name, path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour(name)).save(path)


@pytest.fixture
def folders(tmp_path):
    """A folder for each class."""
    for part, count in (("train", 3), ("val", 2)):
        for name in ("airfield", "bakery-shop", "bakery-window"):
            for i in range(count):
                picture(name, tmp_path / part / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """What torchvision unpacks, whose checksums it is made to leave out."""
    train, val = [], []
    for number, name in enumerate(CLASSES):
        for i in range(3):
            train.append(f"{name}/{i}.png {number}")
            picture(name, tmp_path / "data_256_standard" / name[1:] / f"{i}.png")
        val.append(f"{number}.png {number}")
        picture(name, tmp_path / "val_256" / f"{number}.png")
    (tmp_path / "places365_train_standard.txt").write_text("\n".join(train))
    (tmp_path / "places365_val.txt").write_text("\n".join(val))
    (tmp_path / "categories_places365.txt").write_text("\n".join(f"{name} {i}" for i, name in enumerate(CLASSES)))
    monkeypatch.setattr(Places365, "_CATEGORIES_META", (Places365._CATEGORIES_META[0], None))
    monkeypatch.setattr(Places365, "_FILE_LIST_META", {k: (f, None) for k, (f, _) in Places365._FILE_LIST_META.items()})
    return tmp_path


@pytest.fixture(params=["folders", "lists"])
def root(request):
    return request.getfixturevalue(request.param)


def ready(root, stage=None, **arguments):
    data = Places365DataModule(root, **{"num_classes": 3, "num_workers": 0, **arguments})
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.mark.parametrize("size", [224, 227])
def test_batches(root, size):
    data = ready(root, batch_size=2, image_size=size)
    assert (data.num_classes, data.in_chans, data.image_size) == (3, 3, (size, size))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (2, 3, size, size)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert len(data.train_set) == 9


def test_known_before_the_data_are_there(tmp_path):
    data = Places365DataModule(tmp_path)
    assert (data.num_classes, data.in_chans, data.image_size) == (365, 3, (224, 224))


def test_images_are_normalised_and_keep_their_labels(root):
    data = ready(root)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    names = ("airfield", "shop", "window")
    for part in (data.train_set, data.val_set, data.test_set):
        seen = set()
        for image, label in part:
            expected = (torch.tensor(COLOURS[names[label]]) / 255 - mean) / std
            torch.testing.assert_close(image[:, 100, 17], expected)
            assert (image == image[:, :1, :1]).all()
            seen.add(label)
        assert seen == {0, 1, 2}


def gradient(root, width, height):
    """One picture whose red is its column and whose green is its row, resized or not."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    for path in root.rglob("*.png"):
        Image.fromarray(pixels).save(path)


def views(part, count):
    return [(part[0][0] * 255).round().int() for _ in range(count)]


PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


def test_evaluation_crops_at_the_centre(root):
    gradient(root, 256, 256)
    data = ready(root, **PLAIN)
    for part in (data.val_set, data.test_set):
        image, same = views(part, 2)
        assert torch.equal(image, same)
        # (256 - 224) / 2 = 16 pixels off each side.
        assert image[0, 7].tolist() == image[1, :, 7].tolist() == list(range(16, 240))


def test_training_crops_and_mirrors_at_random(root):
    gradient(root, 256, 256)
    data = ready(root, image_size=250, **PLAIN)
    torch.manual_seed(0)
    rows, columns, mirrored = [], [], []
    for image in views(data.train_set, 150):
        row, column = int(image[1, 0, 0]), image[0, 0].tolist()
        assert image[1, :, 3].tolist() == list(range(row, row + 250))
        assert column == sorted(column, reverse=column[0] > column[-1])
        rows.append(row)
        columns.append(min(column))
        mirrored.append(column[0] > column[-1])
    assert set(rows) == set(columns) == set(range(7))
    assert 50 < sum(mirrored) < 100


def test_resized_whatever_the_proportions(root):
    gradient(root, 512, 64)
    image = views(ready(root, **PLAIN).val_set, 1)[0]
    # 256 columns for 512: about one grey level each, as for the rows. A resize of the shorter side would show 0 columns
    # near the borders.
    for line in (image[0, 7], image[1, :, 7]):
        assert (line.double() - torch.arange(16, 240)).abs().max() <= 2


def test_folders_are_looked_for_first(folders, lists):
    assert len(ready(folders).val_set) == 6  # and not the 3 of the list


def test_only_the_split_that_is_asked_for(lists):
    (lists / "places365_train_standard.txt").unlink()
    data = ready(lists, "test")
    assert len(data.test_set) == 3
    with pytest.raises(FileNotFoundError, match=r"^Places365 is missing or damaged \(The file .*train_standard.txt"):
        data.setup("fit")


def test_wrong_number_of_classes(folders):
    message = (
        r"`num_classes` \(=365\) must be the number of class folders, but `root` \(='.*'\) has 3: airfield, bakery-s"
    )
    with pytest.raises(ValueError, match=message):
        ready(folders, num_classes=365)


def test_wrong_number_of_classes_in_the_list(lists):
    with pytest.raises(ValueError, match=r"`num_classes` \(=4\) must be the number of classes in its list, .* 3: /a/"):
        ready(lists, num_classes=4)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^Places365 is missing or damaged") as error:
        ready(tmp_path / "nowhere")
    for part in (
        "Put filelist_places365-standard.tar, train_256_places365standard.tar and val_256.tar, from http",
        f"into `root` (='{tmp_path / 'nowhere'}')",
        "train/CLASS/*.jpg",
    ):
        assert part in str(error.value)


def test_missing_images(lists):
    for path in (lists / "val_256").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"^Places365 is incomplete: .*/val_256/0.png does not exist. Delete "):
        ready(lists, "test")


@pytest.mark.parametrize("number", [1, 2])
def test_images_that_were_unpacked_in_part(lists, number):
    (lists / "val_256" / f"{number}.png").unlink()
    missing = rf".*/val_256/{number}.png does not exist"
    message = rf"^Places365 is incomplete: {missing}. Delete .*/val_256 if .* partly unpacked. Put"
    with pytest.raises(FileNotFoundError, match=message):
        ready(lists, "test")


def test_damaged_list(lists, monkeypatch):
    monkeypatch.setattr(Places365, "_CATEGORIES_META", ("categories_places365.txt", "0" * 32))
    with pytest.raises(FileNotFoundError, match=r"^Places365 is missing or damaged \(.*categories_places365.txt"):
        ready(lists)


def test_failed_download_says_what_to_do(tmp_path, no_network):
    with pytest.raises(RuntimeError, match=r"^could not get Places365 \(.*no route to host.*\). Put filelist"):
        Places365DataModule(tmp_path / "here", download=True).prepare_data()


def test_no_download_where_the_data_are(root, no_network):
    assert len(ready(root, download=True).train_set) == 9


def test_archives_in_the_folder_are_unpacked_without_a_network(lists, tmp_path, monkeypatch, no_network):
    place = tmp_path / "elsewhere"
    place.mkdir()

    def pack(filename, **members):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, source in members.items():
                archive.add(lists / source, name.replace("__", "."))
        (place / filename).write_bytes(packed.getvalue())
        return filename, hashlib.md5(packed.getvalue()).hexdigest()

    names = ("places365_train_standard.txt", "places365_val.txt", "categories_places365.txt")
    devkit = pack("filelist_places365-standard.tar", **{name.replace(".", "__"): name for name in names})
    images = {
        ("train-standard", True): pack("train_256_places365standard.tar", data_256="data_256_standard"),
        ("val", True): pack("val_256.tar", val_256="val_256"),
    }
    monkeypatch.setattr(Places365, "_DEVKIT_META", {"standard": devkit})
    monkeypatch.setattr(Places365, "_IMAGES_META", images)
    data = ready(place, download=True)
    assert (len(data.train_set), len(data.val_set)) == (9, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 257}, r"^`image_size` \(=257\) must be 1 to 256 pixels, the size before the crop$"),
        ({"image_size": 0}, r"^`image_size` \(=0\) must be 1 to 256"),
        ({"num_classes": 0}, r"^`num_classes` \(=0\) must be at least 1$"),
        ({"mean": [0.5]}, r"^`mean` \(=\[0.5\]\) must have one number for each of the 3 channels$"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Places365DataModule(tmp_path, **arguments)


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b"", lambda content: content[9:]])
def test_damaged_images_are_named(root, damage):
    path = next(path for part in ("val", "val_256") for path in sorted((root / part).rglob("*.png")))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=rf"^{path} cannot be read as an image \(.*\); replace or remove it$"):
        list(ready(root, "validate").val_set)
