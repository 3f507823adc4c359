import re

import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from lightning_acu.data import ImageFolderDataModule

#: One colour for each class, by which an image can be told.
COLOURS = {"apple": (200, 30, 10), "leaf": (20, 180, 40), "sky": (30, 60, 250)}


def write(folder, classes=tuple(COLOURS), images=3):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (40 + i, 30), COLOURS.get(name, (0, 0, 0))).save(folder / name / f"{i}.png")


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "train", images=5)
    write(tmp_path / "val", images=2)
    return tmp_path


def ready(root, stage=None, **arguments):
    data = ImageFolderDataModule(root, **{"image_size": (16, 24), "num_workers": 0, **arguments})
    data.setup(stage)
    return data


def test_batches(root):
    data = ready(root, batch_size=4)
    assert (data.num_classes, data.in_chans, data.image_size) == (3, 3, (16, 24))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 16, 24)
        assert (images.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (4,))
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [15, 6, 6]


def test_images_are_normalised_and_keep_their_labels(root):
    data = ready(root)
    mean, std = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    for dataset in (data.train_set, data.val_set, data.test_set):
        for image, label in dataset:
            colour = torch.tensor(COLOURS[data.classes[label]]) / 255
            torch.testing.assert_close(image[:, 7, 11], (colour - mean) / std, atol=0.02, rtol=0)


def test_number_of_classes_is_known_before_setup(root):
    data = ImageFolderDataModule(root)
    assert (data.num_classes, data.image_size, data.classes) == (3, (224, 224), ["apple", "leaf", "sky"])


def test_defaults_are_those_of_imagenet(root):
    assert ImageFolderDataModule(root).preprocessing == {
        "input_size": (3, 224, 224),
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def test_settings_of_a_model(root, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("the model was built"))
    data = ImageFolderDataModule(root, transforms_of="tf_efficientnet_lite0")
    assert data.preprocessing["mean"] == data.preprocessing["std"] == (0.5, 0.5, 0.5)
    data = ImageFolderDataModule(root, transforms_of="test_resnet")
    assert data.image_size == timm.get_pretrained_cfg("test_resnet").input_size[1:] != (224, 224)
    # What is given goes before what is published.
    data = ImageFolderDataModule(root, transforms_of="tf_efficientnet_lite0", image_size=96, mean=[0.1, 0.2, 0.3])
    assert (data.image_size, data.preprocessing["mean"], data.preprocessing["std"]) == (
        (96, 96),
        (0.1, 0.2, 0.3),
        (0.5,) * 3,
    )


def test_centre_crop(tmp_path):
    # Black, but for a white frame of 2 of the 16 pixels on each side: 0.75 of a side lies within it.
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    image.paste((0, 0, 0), (2, 2, 14, 14))
    for part in ("train", "val"):
        (tmp_path / part / "box").mkdir(parents=True)
        image.save(tmp_path / part / "box" / "0.png")
    options = {"image_size": 12, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "nearest"}
    assert ready(tmp_path, crop_pct=0.75, **options).val_set[0][0].max() == 0
    assert ready(tmp_path, crop_pct=1.0, **options).val_set[0][0].max() == 1


def test_augmentation_options_reach_timm(root):
    def steps(**options):
        return [type(step).__name__ for step in ready(root, "fit", **options).train_set.transform.transforms]

    assert steps() == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    assert "RandomHorizontalFlip" not in steps(hflip=0.0)
    assert "RandAugment" in steps(auto_augment="rand-m9-mstd0.5-inc1")
    assert "ColorJitter" in steps(color_jitter=0.4)
    assert ready(root, scale=(0.5, 0.7)).train_set.transform.transforms[0].scale == (0.5, 0.7)


def test_evaluation_is_not_augmented(root):
    data = ready(root, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4)
    for dataset in (data.val_set, data.test_set):
        assert torch.equal(dataset[0][0], dataset[0][0])
    assert any(not torch.equal(data.train_set[0][0], data.train_set[0][0]) for _ in range(5))


def test_folder_of_its_own_for_tests(root):
    write(root / "exam", images=4)
    data = ready(root, test="exam")
    assert (len(data.val_set), len(data.test_set)) == (6, 12)


def test_only_fitting_needs_the_training_images(tmp_path):
    write(tmp_path / "val")
    for stage in ("test", "predict", "validate"):
        assert ready(tmp_path, stage).num_classes == 3
    with pytest.raises(FileNotFoundError, match=r"^`train` \(='train'\): .* does not exist"):
        ready(tmp_path, "fit")


def test_setup_twice_changes_nothing(root):
    data = ready(root, "fit")
    train = data.train_set
    assert data.test_set is None
    data.setup("fit")
    data.setup("test")
    assert data.train_set is train


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers(root):
    data = ready(root, num_workers=2, batch_size=2)
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 6


@pytest.mark.parametrize("argument", ["train", "val", "test"])
def test_missing_folder(root, argument):
    folder = root / "nowhere"
    message = f"`{argument}` (='nowhere'): {folder} does not exist; expected {folder}/CLASS/*.jpg"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        ready(root, **{argument: "nowhere"})


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^`train` \(='train'\): .*nowhere/train does not exist"):
        _ = ImageFolderDataModule(tmp_path / "nowhere").num_classes


def test_folder_without_classes(root):
    (root / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(root / "flat" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"^`val` \(='flat'\): .* has no class folders; expected"):
        ready(root, val="flat")


@pytest.mark.parametrize("argument", ["val", "test"])
def test_other_classes(root, argument):
    write(root / "other", classes=("apple", "sky", "stone"))
    message = (
        rf"^`{argument}` \(='other'\) must have the class folders of `train`: it lacks \['leaf'\] and adds \['stone'\]$"
    )
    with pytest.raises(ValueError, match=message):
        ready(root, **{argument: "other"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.5]}, r"^`mean` \(=\[0.5\]\) must have one finite number for each of the 3 channels$"),
        ({"std": [0.5]}, r"^`std` \(=\[0.5\]\) must have one finite number for each of the 3 channels$"),
        ({"interpolation": "cubic"}, r"^`interpolation` \(='cubic'\) must be .*'bicubic'"),
        ({"crop_pct": 87.5}, r"^`crop_pct` \(=87.5\) must be a share of a side: above 0 and at most 1$"),
        ({"transforms_of": "resnet5000"}, r"^`transforms_of` \(='resnet5000'\) is not a timm model with published"),
        (
            {"transforms_of": "resnet50.nobody"},
            r"^`transforms_of` \(='resnet50.nobody'\) is not a timm model with published",
        ),
    ],
)
def test_bad_arguments(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(root, **arguments)
