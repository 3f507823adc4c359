"""Models of other libraries in files and folders. A library that is not installed is skipped."""

import copy
import json
import pickle
import sys

import pytest
import torch
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, fold_acu, from_pretrained, load_acu, save_acu, save_pretrained

pytestmark = pytest.mark.slow


def unet():
    """segmentation_models_pytorch."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    kwargs = {"encoder_name": "tu-resnet18", "encoder_weights": None, "classes": 2}
    return smp.Unet, kwargs, lambda: smp.Unet(**kwargs), torch.rand(1, 3, 64, 96)


def basic_unet():
    """monai."""
    nets = pytest.importorskip("monai.networks.nets")
    kwargs = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "features": [8, 8, 8, 8, 8, 8]}
    return nets.BasicUNet, kwargs, lambda: nets.BasicUNet(**kwargs), torch.rand(1, 1, 32, 48)


def segformer():
    """transformers: its class and configuration are known without arguments."""
    transformers = pytest.importorskip("transformers")
    cls = transformers.SegformerForSemanticSegmentation
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16, "num_labels": 3}
    return cls, None, lambda: cls(transformers.SegformerConfig(**sizes)), torch.rand(1, 3, 64, 96)


def tapped(model, **convert):
    convert_to_acu(model.eval(), **convert)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    return model


def output(model, image):
    with torch.no_grad():
        result = model(image)
    return result if isinstance(result, torch.Tensor) else result.logits


def how(model):
    return [(name, type(layer), layer.position_groups, layer.fixed_tap) for name, layer in acu_layers(model)]


@pytest.mark.parametrize("client", [unet, basic_unet, segformer])
def test_a_model_comes_back(client, tmp_path):
    cls, kwargs, build, image = client()
    model = tapped(build(), fixed_centre=False)
    builder = cls if kwargs else None
    save_acu(model, tmp_path / "model.pt", builder=builder, kwargs=kwargs)
    save_pretrained(model, tmp_path / "folder", builder=builder, kwargs=kwargs)
    expected = output(model, image)
    for load, where in ((load_acu, tmp_path / "model.pt"), (from_pretrained, tmp_path / "folder")):
        for arguments in ({"builder": cls}, {"model": build().eval()}, {"trust_builder": True}):
            loaded = load(where, **arguments)
            assert torch.equal(output(loaded, image), expected)
            assert how(loaded) == how(model)
        with pytest.raises(ValueError, match=rf"{cls.__module__}:{cls.__name__}' builds, .* Nothing was"):
            load(where)


# transformers' own save_pretrained and from_pretrained


@pytest.fixture
def hf():
    cls, _, build, image = segformer()
    return cls, tapped(build(), position_groups=2), image


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["whole", "in shards"])
def test_transformers_keeps_positions_or_refuses(hf, size, tmp_path):
    cls, model, image = hf
    settings = dict(vars(model.config))
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert vars(model.config).keys() == settings.keys()
    expected = output(model, image)
    for arguments in ({"builder": cls}, {"trust_builder": True}, {"model": cls(model.config).eval()}):
        loaded = from_pretrained(tmp_path, **arguments)
        assert type(loaded) is cls
        assert torch.equal(output(loaded, image), expected)
        assert how(loaded) == how(model)
    with pytest.raises(ValueError, match=r"active convolutions: load this folder with lightning_acu\.from_pretrained"):
        cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was saved by transformers, of the class '.*Segformer.*'; pass that class"):
        from_pretrained(tmp_path)


def test_the_guard_goes_with_the_model_and_a_fold_removes_it(hf, tmp_path):
    cls, model, image = hf
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected = output(model, image)
    for index, twin in enumerate(twins):
        with torch.no_grad():
            next(acu_layers(twin))[1].offsets.zero_()
        twin.save_pretrained(tmp_path / str(index))
        assert torch.equal(output(from_pretrained(tmp_path / str(index), builder=cls), image), output(twin, image))
        assert not torch.equal(output(twin, image), expected)
    fold_acu(model)
    assert "save_pretrained" not in vars(model)


def test_half_precision(hf, tmp_path):
    cls, model, _ = hf
    model.half().save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, builder=cls)
    assert loaded.dtype == torch.float16
    assert all(torch.equal(layer.offsets, own.offsets) for (_, layer), (_, own) in zip(
        acu_layers(loaded), acu_layers(model), strict=True))  # fmt: skip


def converting(cls):
    """A subclass that converts itself; of the same name, by which transformers knows how weights are called."""

    def init(self, config):
        cls.__init__(self, config)
        convert_to_acu(self, position_groups=2)

    return type(cls.__name__, (cls,), {"__init__": init})


def test_a_class_that_converts_itself_goes_on_by_itself(hf, tmp_path):
    cls, model, image = hf
    own = converting(cls)
    itself = own(model.config).eval()
    itself.load_state_dict(model.state_dict())
    itself.save_pretrained(tmp_path)
    assert "lightning_acu" not in (tmp_path / "config.json").read_text()
    loaded = own.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, image), output(model, image))
    loaded.init_weights()  # what has been loaded stays
    assert torch.equal(output(loaded, image), output(model, image))


def test_taps_of_a_class_that_converts_itself_start_on_the_grid(hf, tmp_path):
    cls, model, image = hf
    plain = cls(model.config).eval()
    plain.save_pretrained(tmp_path)
    garbage = [torch.full((size,), 7.0) for size in (144, 288, 576) for _ in range(50)]
    del garbage  # what is allocated next has this memory
    loaded = converting(cls).from_pretrained(tmp_path)
    assert len(how(loaded)) == 7
    assert not any(layer.displacement.any() for _, layer in acu_layers(loaded))
    # Not the logits: transformers does not find the weights of the decoder under the names that it wrote itself.
    states = [m.double().segformer(image.double()).last_hidden_state for m in (loaded, plain)]
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-10)


def changed(**values):
    return lambda config: config["lightning_acu"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(lightning_acu=[3]), "config.json in .* is damaged: `lightning_acu` is a list"),
        (changed(layers=None), r"config.json in .* is damaged: `layers` \(=None\)"),
        (changed(builder="os.system"), r"config.json in .* is damaged: `architecture.builder` \(='os.system'\)"),
        (changed(layers=[]), "does not fit SegformerForSemanticSegmentation: it has no place for the positions"),
        (lambda config: config["lightning_acu"]["layers"].pop(), "it has no place for the positions"),
        (lambda config: config["lightning_acu"]["layers"][0].update(name="no"), "no should be a convolution"),
        (lambda config: config["lightning_acu"]["layers"][0].update(position_groups=1), "does not fit"),
        (lambda config: config.update(depths=[2] * 4), "does not fit .*: there is no "),
        (lambda config: config.update(decoder_hidden_size=10**9), "many more tensors, or larger ones, than the file"),
    ],
)
def test_a_folder_of_transformers_that_is_wrong(change, message, hf, tmp_path):
    cls, model, _ = hf
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        from_pretrained(tmp_path, builder=cls)


def test_nothing_in_a_hostile_folder_of_transformers_is_run(hf, tmp_path, monkeypatch):
    cls, model, image = hf
    model.save_pretrained(tmp_path)
    marks = "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
    (tmp_path / "their_modeling.py").write_text(marks)
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "their_modeling.Net"},
        "attn_implementation": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "kernel_config": {"somebody/kernel": "a"},
        "transformers_weights": "../other.safetensors",
        "name_or_path": "somebody/model",
    }
    config["lightning_acu"]["builder"] = "their_modeling:Net"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/model"}))
    assert torch.equal(output(from_pretrained(tmp_path, builder=cls), image), output(model, image))
    with pytest.raises(ValueError, match=r"of the class 'their_modeling:Net'; pass that class"):
        from_pretrained(tmp_path)
    assert "their_modeling" not in sys.modules
    assert not (tmp_path / "imported").exists()


@pytest.mark.filterwarnings("ignore")  # of a training of theirs
def test_a_checkpoint_of_its_trainer(hf, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    cls, model, image = hf
    data = [{"pixel_values": torch.rand(3, 32, 32), "labels": torch.ones(32, 32, dtype=torch.long)}] * 4
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2
    )
    transformers.Trainer(model, arguments, train_dataset=data).train()
    loaded = from_pretrained(tmp_path / "checkpoint-2", builder=cls)
    assert torch.equal(output(loaded, image), output(model.eval(), image))
