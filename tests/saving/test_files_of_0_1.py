"""Files that version 0.1 wrote go on loading (tests/fixtures/v0.1/README.md says what they are)."""

import copy
import gzip
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_acu import (
    ImageClassifier,
    acu_layers,
    acu_state_dict,
    convert_to_acu,
    create_model,
    fold_acu,
    load_acu,
    load_acu_state_dict,
)
from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1"
IMAGE = torch.linspace(-1, 1, 2 * 3 * 24 * 31).view(2, 3, 24, 31)


@pytest.fixture
def unzip(tmp_path):
    """From the name of a file to where it is, unzipped."""

    def unzipped(name):
        path = tmp_path / name
        path.write_bytes(gzip.decompress((FIXTURES / f"{name}.gz").read_bytes()))
        return path

    return unzipped


@pytest.fixture
def load(unzip):
    """Trusted pickles: they hold whole modules."""
    return lambda name: torch.load(unzip(name), weights_only=False)


@pytest.fixture
def outputs(unzip):
    return torch.load(unzip("outputs.pt"), weights_only=True)


def equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    return bool(expected.any())


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_file_of_save_acu(name, unzip, outputs):
    model = load_acu(unzip(name))
    assert {layer.position_groups for _, layer in acu_layers(model)} == {2}
    assert equal(model(IMAGE), outputs["model"])


def test_positions_alone(unzip):
    positions = torch.load(unzip("positions.pt"), weights_only=True)
    model = create_model("test_efficientnet", num_classes=3)
    load_acu_state_dict(convert_to_acu(model, position_groups=2, exclude_modules=["conv_stem"]), positions)
    loaded = acu_state_dict(model)
    assert loaded.keys() == positions.keys()
    assert all(torch.equal(loaded[key], value) and value.any() for key, value in positions.items())


def test_a_whole_model(load, outputs):
    model = load("whole.pt")
    assert equal(model(IMAGE), outputs["model"])
    model.load_state_dict(copy.deepcopy(model).state_dict())
    assert "load_state_dict" not in vars(model)  # what that version put there is gone
    assert equal(fold_acu(model)(IMAGE), outputs["model"])


def test_a_whole_network_of_the_paper(load, outputs):
    model = load("whole_cifar.pt")
    assert type(model) is type(create_model("acu_plain"))
    assert equal(model(IMAGE), outputs["whole_cifar"])


def test_guards_of_a_whole_model(load, outputs, monkeypatch):
    models, image = load("whole_merging.pt"), torch.linspace(-1, 1, 2 * 4 * 9 * 11).view(2, 4, 9, 11)
    active, folded = models["active"], models["folded"]
    assert equal(active(image), outputs["whole_merging"])
    assert equal(folded(image), outputs["whole_merging"])
    for block, method, layer in ((active[0], "reparameterize", "0."), (active[1], "fuse", "1.linear")):
        with pytest.raises(RuntimeError, match=rf"merges weights of active convolutions \({re.escape(layer)}"):
            getattr(block, method)()
    with monkeypatch.context() as patched:
        patched.setattr(type(folded[0]), "reparameterize", lambda block: nn.init.zeros_(block.conv_scale.conv.weight))
        with pytest.raises(RuntimeError, match=r"because the fold of 0\."):
            folded[0].reparameterize()
    folded[0].reparameterize()  # timm's takes any kernel size here
    assert equal(nn.Sequential(folded[0], folded[1].fuse())(image), outputs["whole_merging"])
    fold_acu(active)
    assert equal(nn.Sequential(active[0], active[1].fuse())(image), outputs["whole_merging"])


def test_a_lightning_checkpoint(unzip):
    path = unzip("lightning.ckpt")
    state = torch.load(path, weights_only=False)["state_dict"]
    module = ImageClassifier.load_from_checkpoint(path)
    assert sum(1 for _ in acu_layers(module)) == sum("offsets" in key for key in state) > 0
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    offsets = torch.cat([layer.offsets for _, layer in acu_layers(module)])
    assert (offsets != offsets.round()).any()


def test_a_training_goes_on_from_a_lightning_checkpoint(unzip, tmp_path):
    path = unzip("lightning.ckpt")
    images = [(torch.randn(3, 24, 24), i % 3) for i in range(8)]
    module = ImageClassifier(
        "test_efficientnet", num_classes=3, convert={"position_groups": 2, "exclude_modules": ["conv_stem"]}
    )
    callbacks = [
        PositionLRSchedule(multiplier=200.0, warmup_steps=1),
        RoundThenFinetune(at_step=5, keep=False),
        OffsetLogger(2, figures=False),
    ]
    trainer = pl.Trainer(
        max_steps=6, limit_val_batches=0, accelerator="cpu", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(images, batch_size=4)
    trainer.fit(module, loader, loader, ckpt_path=path, weights_only=False)
    assert trainer.global_step == 6
    offsets = torch.cat([layer.offsets for _, layer in acu_layers(module)])
    assert torch.equal(offsets, offsets.round())
    assert offsets.any()  # as learned before the checkpoint
