"""What LightningCLI does with the data section of a configuration."""

import inspect

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule

from lightning_acu import data

LOADER = {"batch_size": 16, "num_workers": 1, "pin_memory": False, "seed": 3}
ARGUMENTS = {
    "DigitsDataModule": {"val_size": 100, "test_size": 0.3, "augment": False},
    "ArrayDataModule": {
        "path": "images.npz", "mean": [0.5], "std": [0.25], "val_size": 0.2, "crop_padding": 2, "flip": True,
        "preprocessing": "normalize", "on_device": False, "whitening_cache": "cache",
    },
    "CIFARDataModule": {
        "root": "here", "num_classes": 100, "val_size": 0.1, "augment": False, "download": False,
        "preprocessing": "whiten", "on_device": False, "whitening_cache": "cache",
    },
    "Places365DataModule": {
        "root": "here", "image_size": 227, "num_classes": 12, "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1],
        "download": True,
    },
    "ImageFolderDataModule": {
        "root": "here", "train": "a", "val": "b", "test": "c", "image_size": [160, 192], "mean": [0.1, 0.2, 0.3],
        "std": [0.3, 0.2, 0.1], "interpolation": "bilinear", "crop_pct": 0.9, "transforms_of": "test_resnet",
        "auto_augment": "rand-m9", "hflip": 0.1, "scale": [0.2, 0.9], "color_jitter": 0.4,
        "val_size": 0.2, "test_size": 3,
    },
}  # fmt: skip


@pytest.fixture
def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser


def instantiate(parser, config):
    # jsonargparse renames this method: with the old name the new version warns, and Lightning still uses the old one.
    return getattr(parser, "instantiate", parser.instantiate_classes)(config)


def section(name, **arguments):
    return {"data": {"class_path": f"lightning_acu.data.{name}", "init_args": arguments}}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_can_be_configured(parser, name):
    given = ARGUMENTS[name] | LOADER
    signature = inspect.signature(getattr(data, name)).parameters
    assert set(ARGUMENTS[name]) == set(signature) - {"loader"}, "an argument is not tested here"
    config = parser.parse_object(section(name, **given))
    parsed = config.data.init_args.as_dict()
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in parsed.items()} == given
    module = instantiate(parser, config).data
    assert type(module) is getattr(data, name)
    assert {key: getattr(module, key) for key in LOADER} == LOADER


@pytest.mark.parametrize("name", ARGUMENTS)
def test_defaults_are_shown_and_valid(parser, name):
    required = {key: value for key, value in ARGUMENTS[name].items() if key in ("path", "root")}
    config = parser.parse_object(section(name, **required))
    assert config.data.init_args.batch_size == 64
    assert config.data.init_args.num_workers is None
    assert "seed: 0" in parser.dump(config)
    instantiate(parser, config)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_key_is_named(parser, name):
    with pytest.raises(ArgumentError, match="batch_sise"):
        parser.parse_object(section(name, **{**ARGUMENTS[name], "batch_sise": 3}))


def test_an_impossible_type_is_named(parser):
    with pytest.raises(ArgumentError, match="crop_padding"):
        parser.parse_object(section("ArrayDataModule", path="images.npz", crop_padding="much"))


def test_a_shape_of_the_data_can_be_linked_to_the_model(parser):
    parser.add_argument("--classes", type=int)
    parser.link_arguments("data.num_classes", "classes", apply_on="instantiate")
    config = parser.parse_object(section("DigitsDataModule"))
    assert instantiate(parser, config).classes == 10
