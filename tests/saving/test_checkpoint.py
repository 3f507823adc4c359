"""Converted models out of Lightning checkpoints, whoever converted them, and positions put where they belong."""

import copy
import sys

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import TinyModule, fit, loader
from lightning.pytorch.cli import LightningCLI
from timm.layers import Conv2dSame
from torch import nn

from lightning_acu import ImageClassifier, acu_layers, convert_to_acu, fold_acu
from lightning_acu.callbacks import ConvertToACU
from lightning_acu.saving import save_acu
from lightning_acu.saving.checkpoint import load_any, load_converted
from lightning_acu.surgery import convert_like

# ImageClassifier could validate; here it only has to be saved.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class PlainModule(TinyModule):
    """Builds plain layers; a callback converts them. Keeps its arguments in checkpoints."""

    def __init__(self, width=4, name="plain"):
        super().__init__(convert=False)
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(2, width, (3, 5), padding=1), nn.Tanh(), nn.Conv2d(width, 3, 3, padding=1))
        self.restored = []

    def forward(self, images):
        return self.net(images)

    def on_load_checkpoint(self, checkpoint):
        self.restored.append(sorted(checkpoint["state_dict"]))


def move(model):
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
        if layer.fixed_tap is not None:
            layer.offsets.data.view(layer.position_groups, -1, 2)[:, layer.fixed_tap] = 0
    return model


def equal(state, other):
    return list(state) == list(other) and all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.fixture
def converted(tmp_path):
    """A PlainModule that ConvertToACU converted and a Trainer trained and saved; (module, path)."""
    module, path = PlainModule(width=6, name="wide"), tmp_path / "plain.ckpt"
    callback = ConvertToACU(kernel_sizes=[3, (3, 5)], position_groups=3, fixed_centre=False)
    trainer = fit(module, [callback], tmp_path, max_steps=3)
    move(module)
    trainer.save_checkpoint(path)
    return module.eval(), path


def test_positions_weights_and_hyperparameters_come_back_exactly(converted):
    module, path = converted
    loaded = load_converted(PlainModule, path)
    assert type(loaded) is PlainModule
    assert equal(loaded.state_dict(), module.state_dict())
    assert dict(loaded.hparams) == {"width": 6, "name": "wide"}
    assert {(layer.position_groups, layer.fixed_tap) for _, layer in acu_layers(loaded)} == {(3, None)}
    assert loaded.restored == [sorted(module.state_dict())] * 2  # its own hook ran too
    images = torch.randn(3, 2, 9, 8)
    assert torch.equal(loaded.eval()(images), module(images))


def test_arguments_replace_those_of_the_checkpoint(converted):
    assert load_converted(PlainModule, converted[1], name="other").hparams == {"width": 6, "name": "other"}
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.0\.weight"):
        load_converted(PlainModule, converted[1], width=9)


def test_the_loaded_module_trains_on_and_saves_again(converted, tmp_path):
    loaded = load_converted(PlainModule, converted[1])
    before = copy.deepcopy(loaded.state_dict())
    fit(loaded, [], tmp_path, max_steps=2).save_checkpoint(tmp_path / "again.ckpt")
    again = load_converted(PlainModule, tmp_path / "again.ckpt")
    assert equal(again.state_dict(), loaded.state_dict())
    assert not torch.equal(again.net[2].offsets, before["net.2.offsets"])


def test_a_plain_checkpoint_stays_plain(tmp_path):
    module = PlainModule(width=5)
    fit(module, [], tmp_path, max_steps=1).save_checkpoint(tmp_path / "plain.ckpt")
    loaded = load_converted(PlainModule, tmp_path / "plain.ckpt")
    assert equal(loaded.state_dict(), module.state_dict())
    assert not any(acu_layers(loaded))


def test_any_takes_the_class_by_its_path(converted, monkeypatch):
    module, path = converted
    monkeypatch.setitem(sys.modules, "their_package", sys.modules[__name__])
    loaded = load_any(path, "their_package.PlainModule")
    assert type(loaded) is PlainModule
    assert not loaded.training
    assert equal(loaded.state_dict(), module.state_dict())


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("PlainModule", r"`class_path` \(='PlainModule'\) cannot be imported: .*give package.Class"),
        ("no_such_package.Module", "cannot be imported: No module named 'no_such_package'"),
        ("lightning_acu.NoSuchModule", "cannot be imported: .*NoSuchModule"),
        ("lightning_acu.ACUConv2d", r"`class_path` \(='lightning_acu.ACUConv2d'\) is not a LightningModule"),
        ("lightning_acu.convert_to_acu", "is not a LightningModule"),
        ("lightning_acu.ImageClassifier", "model"),
    ],
)
def test_any_explains_a_wrong_class(converted, class_path, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load_any(converted[1], class_path)


def classifier(**arguments):
    return ImageClassifier("test_resnet", num_classes=3, in_chans=2, convert={"kernel_sizes": [3]} | arguments)


def test_any_gives_the_network_inside_an_image_classifier(tmp_path):
    module = classifier(position_groups=2)
    fit(module, [], tmp_path, max_steps=2).save_checkpoint(tmp_path / "own.ckpt")
    for model in (load_any(tmp_path / "own.ckpt"), load_converted(ImageClassifier, tmp_path / "own.ckpt").eval().model):
        assert type(model) is type(module.model)
        assert not model.training
        assert equal(model.state_dict(), module.model.state_dict())
        assert {layer.position_groups for _, layer in acu_layers(model)} == {2}


def test_an_image_classifier_loads_a_plain_checkpoint_with_convert(tmp_path):
    plain = ImageClassifier("test_resnet", num_classes=3, in_chans=2)
    fit(plain, [], tmp_path, max_steps=2).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match="of a plain model"):
        loaded = ImageClassifier.load_from_checkpoint(
            tmp_path / "plain.ckpt", convert={"kernel_sizes": [3]}, map_location="cpu"
        )
    assert any(acu_layers(loaded))
    images = torch.randn(3, 2, 33, 40)
    assert torch.equal(loaded.eval()(images), plain.eval()(images))
    assert equal(load_any(tmp_path / "plain.ckpt").state_dict(), plain.model.state_dict())


@pytest.mark.parametrize(
    "subclass_mode",
    [
        False,
        True,
    ],
)
def test_any_reads_the_checkpoint_of_the_command_line(tmp_path, monkeypatch, subclass_mode):
    prefix, cls = "--model.", ImageClassifier
    arguments = ["lightning-acu", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_steps=1"]
    if subclass_mode:  # as lightning-acu does
        prefix, cls = "--model.init_args.", pl.LightningModule
        arguments.append("--model.class_path=lightning_acu.ImageClassifier")
    given = ("model=test_resnet", "num_classes=3", "in_chans=2", "convert.kernel_sizes=[3]")
    monkeypatch.setattr(sys, "argv", arguments + [prefix + argument for argument in given])
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    cli = LightningCLI(
        cls, subclass_mode_model=subclass_mode, run=False, save_config_callback=None, seed_everything_default=0,
        trainer_defaults=quiet | {"default_root_dir": str(tmp_path)},
    )  # fmt: skip
    cli.trainer.fit(cli.model, loader())
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    assert equal(load_any(tmp_path / "cli.ckpt").state_dict(), cli.model.model.state_dict())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_any_reads_what_save_acu_wrote(tmp_path, ending):
    model = move(classifier().model)
    save_acu(model, tmp_path / f"net.{ending}")
    loaded = load_any(tmp_path / f"net.{ending}")
    assert not loaded.training
    assert equal(loaded.state_dict(), model.state_dict())


def test_any_says_what_is_no_file_of_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist or is not a file"):
        load_any(tmp_path / "none.ckpt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    for name in ("weights", "list"):
        with pytest.raises(ValueError, match=rf"{name}.ckpt is not a Lightning checkpoint; files of save_acu end in"):
            load_any(tmp_path / f"{name}.ckpt")


def layers():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, (3, 5)), Conv2dSame(4, 6, 3, stride=2), nn.Conv2d(6, 2, 1))


@pytest.mark.parametrize("arguments", [{}, {"position_groups": 2}, {"fixed_centre": False}, {"kernel_sizes": [3]}])
def test_convert_like_makes_active_what_the_state_dict_has_positions_for(arguments):
    source = move(convert_to_acu(layers(), **{"kernel_sizes": [3, (3, 5)], "backend": "dense"} | arguments))
    model = layers()
    kept = list(model.parameters())
    assert convert_like(model, source.state_dict(), backend="dense") is model
    assert all(any(p is q for q in model.parameters()) for p in kept)
    assert not any(layer.offsets.any() for _, layer in acu_layers(model))  # nothing is loaded
    model.load_state_dict(source.state_dict())
    for (name, layer), (other, expected) in zip(acu_layers(model), acu_layers(source), strict=True):
        assert (name, type(layer), layer.backend) == (other, type(expected), "dense")
        assert (layer.position_groups, layer.fixed_tap) == (expected.position_groups, expected.fixed_tap)
    images = torch.randn(2, 2, 12, 17)
    assert torch.equal(model(images), source(images))
    convert_like(model, source.state_dict())  # a second time changes nothing
    assert equal(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"9.offsets": s["0.offsets"], "9.weight": s["0.weight"]}), "has no convolution '9'"),
        (lambda s: s.update({"3.offsets": torch.zeros(3)}), "has 3 numbers in '3.offsets', which do not fit '3'"),
        (lambda s: s.update({"0.offsets": torch.zeros(54)}), "has 54 numbers in '0.offsets'"),  # 3 groups of 4 channels
        (lambda s: s.update({"0.offsets": torch.zeros(0)}), "has 0 numbers in '0.offsets'"),
    ],
)
def test_convert_like_converts_nothing_where_positions_do_not_fit(change, message):
    state = convert_to_acu(layers()).state_dict()
    change(state)
    model = layers()
    with pytest.raises(ValueError, match=message):
        convert_like(model, state)
    assert not any(acu_layers(model))


def test_convert_like_names_a_layer_that_cannot_be_converted():
    state, model = convert_to_acu(layers()).state_dict(), layers()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match=r"has '0.offsets', but '0' cannot be converted: .*parametrized"):
        convert_like(model, state)
    assert not any(acu_layers(model))


def test_convert_like_leaves_what_others_call_offsets_alone():
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.offsets = nn.Conv2d(2, 4, 3), nn.Parameter(torch.ones(4))

    model = Boxes()
    assert convert_like(model, model.state_dict()) is model
    assert not any(acu_layers(model))
    assert not any(acu_layers(convert_like(fold_acu(convert_to_acu(layers())), layers().state_dict())))


def test_convert_like_takes_what_a_fixed_centre_has_stored_for_no_position():
    source = convert_to_acu(layers())
    nn.init.uniform_(source[0].offsets, -1, 1)
    images = torch.randn(2, 2, 12, 17)
    for given in (True, None):  # told so, it is fixed; else numbers that are not zero count as a position
        model = convert_like(layers(), source.state_dict(), fixed_centre=given)
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(images), source(images)) is (given is True)


def test_what_convert_like_converted_takes_a_plain_state_dict_too():
    model = convert_like(layers(), convert_to_acu(layers()).state_dict())
    with pytest.warns(UserWarning, match="of a plain model"):
        model.load_state_dict(layers().state_dict())
