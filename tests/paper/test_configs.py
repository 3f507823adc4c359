"""The paper's experiments as configurations: each runs on fake data, and says what the paper says."""

import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from lightning_acu import acu_layers
from lightning_acu.cli import ACULightningCLI, main
from lightning_acu.cli.configs import configs_directory
from paper.settings import load_config

PAPER = configs_directory() / "paper"
NAMES = sorted(path.stem for path in PAPER.glob("*.yaml"))
ACTIVE = {
    "cifar10_plain_acu": 6,
    "cifar10_plain_acu_round": 6,
    "cifar10_plain_acu_c23": 4,
    "cifar10_plain_acu_f5": 6,
    "cifar10_residual_acu": 31,
    "cifar100_plain_acu": 6,
    "cifar100_residual_acu": 31,
    "places365_alexnet_acu": 4,
    "places365_resnet26_acu": 8,
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with a small CIFAR-10 and CIFAR-100, whose checksums torchvision leaves out, and a small Places365."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for source, classes, key in ((CIFAR10, 10, "labels"), (CIFAR100, 100, "fine_labels")):
            folder = root / source.base_folder
            folder.mkdir()
            for name, _ in source.train_list + source.test_list:
                labels = [i % classes for i in range(128)]
                images = rng.integers(0, 256, (128, 3072), dtype=np.uint8)
                (folder / name).write_bytes(pickle.dumps({"data": images, key: labels}))
            names = [str(i) for i in range(classes)]
            (folder / source.meta["filename"]).write_bytes(pickle.dumps({source.meta["key"]: names}))
            for part in ("train_list", "test_list"):
                monkeypatch.setattr(source, part, [[file, None] for file, _ in getattr(source, part)])
            monkeypatch.setattr(source, "meta", source.meta | {"md5": None})
        picture = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for part in ("train", "val"):
            for scene in range(365):
                (root / part / f"scene{scene:03}").mkdir(parents=True)
                picture.save(root / part / f"scene{scene:03}" / "0.png")
        yield root


def fit(monkeypatch, tmp_path, *arguments):
    """``lightning-acu fit`` in ``tmp_path``; gives the model."""
    trained = []
    monkeypatch.setattr(ACULightningCLI, "after_fit", lambda self: trained.append(self.model.model))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-acu", "fit", *arguments])
    main()
    return trained[0]


# fast_dev_run sets limit_val_batches, which is 0 in the files: there are no validation images.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Total length of `DeviceLoader` across ranks is zero")
@pytest.mark.parametrize("name", NAMES)
def test_every_config_trains_two_steps_on_data_of_its_shape(name, datasets, tmp_path, monkeypatch):
    quick = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    quick += ["--data.init_args.batch_size=2", f"--data.init_args.root={datasets}"]
    if name.startswith("cifar100"):  # one whitening to fit is enough, that of CIFAR-10
        quick += ["--data.init_args.preprocessing=normalize"]
    model = fit(monkeypatch, tmp_path, "--config", str(PAPER / f"{name}.yaml"), *quick)
    assert len(list(acu_layers(model))) == ACTIVE.get(name, 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def test_every_row_has_a_config():
    pairs = [f"{data}_{net}" for data in ("cifar10", "cifar100") for net in ("plain", "residual")]
    pairs += ["places365_alexnet", "places365_resnet26"]
    ablation = ["base_d2", "acu_round", "acu_c23", "base_f5", "acu_f5"]
    expected = {*pairs, *(f"{pair}_acu" for pair in pairs), *(f"cifar10_plain_{row}" for row in ablation)}
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cifar")])
def test_the_papers_training(name):
    config = load_config(PAPER / f"{name}.yaml")
    model, trainer = config["model"]["init_args"], config["trainer"]
    assert trainer["max_steps"] == (84_000 if name.endswith("round") else 64_000)
    assert config["data"]["init_args"]["batch_size"] == 64
    assert config["data"]["init_args"]["preprocessing"] == "whiten"
    assert config["data"]["init_args"]["num_classes"] == model["num_classes"] == (100 if "100" in name else 10)
    assert model["optimizer"]["class_path"] == "torch.optim.SGD"
    assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert model["lr_scheduler"]["init_args"] == {"milestones": [32_000, 48_000], "gamma": 0.1}
    assert model["lr_scheduler_interval"] == "step"
    callbacks = {c["class_path"].rpartition(".")[2]: c["init_args"] for c in trainer["callbacks"]}
    assert ("PositionLRSchedule" in callbacks) == (name in ACTIVE)
    if name in ACTIVE:
        assert callbacks["PositionLRSchedule"] == {"multiplier": 0.01, "warmup_steps": 10_000, "normalize": True}


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_acu")])
def test_base_and_acu_differ_in_the_conversion_and_its_callbacks_only(name):
    acu, base = (load_config(PAPER / f"{each}.yaml") for each in (name, name.removesuffix("_acu")))
    assert acu["model"]["init_args"].pop("convert")
    assert base["model"]["init_args"].pop("convert") is None
    added = [c["class_path"].rpartition(".")[2] for c in acu["trainer"]["callbacks"][1:]]
    assert added == ["PositionLRSchedule", "OffsetLogger"]
    del acu["trainer"]["callbacks"][1:]
    for config, folder in ((acu, name), (base, name.removesuffix("_acu"))):
        assert config["trainer"]["logger"]["init_args"].pop("name") == folder
    assert acu == base


def test_a_copied_config_brings_its_bases(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["configs", "paper/cifar100_plain_acu", "--to", "here"])
    names = {"cifar100_plain_acu.yaml", "cifar10_plain_acu.yaml", "cifar10_plain.yaml"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == names
    assert load_config("here/cifar100_plain_acu.yaml") == load_config(PAPER / "cifar100_plain_acu.yaml")
    # Another of the same bases; one that was edited is not lost.
    main(["configs", "paper/cifar10_plain_acu_c23", "--to", "here"])
    main(["configs", "paper/cifar10_plain_acu", "--to", "here"])  # which came as a base
    (tmp_path / "here" / "cifar10_plain.yaml").write_text("mine: 1\n")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["configs", "paper/cifar10_residual", "--to", "here"])
    assert "cifar10_plain.yaml already exists and differs" in capsys.readouterr().err
    assert not (tmp_path / "here" / "cifar10_residual.yaml").exists()


@pytest.mark.slow
def test_wrong_class_count_is_named(datasets, tmp_path, monkeypatch, capsys):
    config = ["--config", str(PAPER / "cifar100_plain.yaml"), f"--data.init_args.root={datasets}"]
    with pytest.raises(SystemExit):
        fit(monkeypatch, tmp_path, *config, "--model.init_args.num_classes=10", "--trainer.fast_dev_run=1")
    assert "`num_classes` (=10) is too small: the data have 100" in capsys.readouterr().err


def test_missing_data_are_named(tmp_path, monkeypatch, capsys):
    config = ["--config", str(PAPER / "cifar10_plain.yaml"), "--data.init_args.root=nowhere"]
    with pytest.raises(SystemExit):
        fit(monkeypatch, tmp_path, *config, "--data.init_args.download=false")
    assert "`root` (='nowhere') does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_the_saved_configuration_stands_alone(datasets, tmp_path, monkeypatch):
    """What a run writes down has no base any more, so that it can be moved and used again."""
    root = tmp_path / "data"
    shutil.copytree(datasets / CIFAR10.base_folder, root / CIFAR10.base_folder)
    quick = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--data.init_args.batch_size=2"]
    quick += ["--data.init_args.preprocessing=normalize", "--trainer.enable_progress_bar=false"]
    fit(monkeypatch, tmp_path, "--config", str(PAPER / "cifar10_plain.yaml"), *quick)
    saved = yaml.safe_load((tmp_path / "runs/paper/cifar10_plain/version_0/config.yaml").read_text())
    assert "base" not in saved
    assert saved["model"]["init_args"]["model"] == "acu_plain"
