"""save_acu and load_acu: a converted model in one file."""

import json

import lightning.pytorch as pl
import pytest
import safetensors
import safetensors.torch
import timm
import torch
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, create_model, fold_acu
from lightning_acu.saving import load_acu, save_acu

pytestmark = pytest.mark.slow

SUFFIXES = [".safetensors", ".pt"]


@pytest.fixture
def build():
    """A converted model with every tap between pixels, in eval mode."""

    def built(name="test_resnet", convert=None, **kwargs):
        model = convert_to_acu(create_model(name, **kwargs), **(convert or {})).eval()
        for _, layer in acu_layers(model):
            nn.init.uniform_(layer.offsets, -1, 1)
        return model

    return built


def same(model, loaded, size=64, in_chans=3):
    parameter = next(model.parameters())
    image = torch.randn(1, in_chans, size, size).to(parameter)
    with torch.no_grad():
        return torch.equal(model(image), loaded(image))


def settings(model):
    return [
        (name, type(layer), layer.position_groups, layer.fixed_tap, layer.start, layer.backend)
        for name, layer in acu_layers(model)
    ]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".pth"])
@pytest.mark.parametrize(
    ("name", "kwargs", "convert"),
    [
        ("test_resnet", {"num_classes": 5, "in_chans": 2}, {"position_groups": 2}),
        ("test_efficientnet", {"num_classes": 5}, {"fixed_centre": False, "kernel_sizes": [3], "depthwise": False}),
        ("test_efficientnet", {}, {"target_modules": ["conv_stem"], "backend": "reference"}),
        ("resnet18", {"num_classes": 3}, {"preset": "C23"}),
    ],
)
def test_a_model_comes_back_as_it_was(name, kwargs, convert, suffix, build, tmp_path):
    model = build(name, convert, **kwargs)
    save_acu(model, tmp_path / f"model{suffix}")
    loaded = load_acu(tmp_path / f"model{suffix}")
    assert settings(loaded) == settings(model)
    assert same(model, loaded, in_chans=kwargs.get("in_chans", 3))
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_layers_converted_in_two_ways_come_back_in_both(suffix, build, tmp_path):
    model = build(convert={"target_modules": r"layer1\..*", "position_groups": 2})
    convert_to_acu(model, target_modules=r"layer3\..*", fixed_centre=False, kernel_sizes=[1, 3], backend="dense")
    assert len({entry[2:] for entry in settings(model)}) == 2
    save_acu(model, tmp_path / f"model{suffix}")
    assert settings(load_acu(tmp_path / f"model{suffix}")) == settings(model)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", ["nf_resnet26", "tf_efficientnet_b0"])
def test_classes_of_timm_come_back_by_their_rules(name, suffix, build, tmp_path):
    model = build(name, num_classes=2)
    assert any(type(layer) is not ACUConv2d for _, layer in acu_layers(model))
    save_acu(model, tmp_path / f"model{suffix}")
    assert same(model, load_acu(tmp_path / f"model{suffix}"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_models_of_torchvision_are_saved_by_name(suffix, build, tmp_path):
    model, path = build("torchvision/resnet18", num_classes=4, in_chans=1), tmp_path / f"model{suffix}"
    save_acu(model, path, name="torchvision/resnet18", num_classes=4)
    assert same(model, load_acu(path), in_chans=1)
    with pytest.raises(ValueError, match=r"`model` \(=ResNet\) does not state.*name=\"torchvision/resnet18\""):
        save_acu(model, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shared_layers_are_kept_once_and_shared_again(suffix, build, tmp_path):
    model, path = build("coat_lite_tiny", num_classes=3), tmp_path / f"model{suffix}"
    names = [len(list(m.named_parameters(remove_duplicate=shared))) for m in [model] for shared in (True, False)]
    assert names[0] < names[1]
    save_acu(model, path)
    loaded = load_acu(path)
    assert same(model, loaded, 224)
    assert [len(list(loaded.named_parameters(remove_duplicate=shared))) for shared in (True, False)] == names
    if suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            assert len(list(file.keys())) < len(model.state_dict())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept_and_positions_stay_in_float32(dtype, suffix, build, tmp_path):
    model, path = build(num_classes=2).to(dtype), tmp_path / f"model{suffix}"
    save_acu(model, path)
    loaded = load_acu(path)
    state = loaded.state_dict()
    assert {key: value.dtype for key, value in model.state_dict().items()} == {k: v.dtype for k, v in state.items()}
    assert state["layer1.0.conv2.offsets"].dtype is (dtype if dtype is torch.float64 else torch.float32)
    assert same(model, loaded)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_buffers_that_no_state_dict_has_keep_their_precision(suffix, build, tmp_path, monkeypatch):
    def with_grid(*args, **kwargs):
        model = create_model(*args, **kwargs)
        model.register_buffer("grid", torch.ones(2), persistent=False)
        return model

    monkeypatch.setattr("lightning_acu.models.create_model", with_grid)
    model, path = build(), tmp_path / f"model{suffix}"
    model.register_buffer("grid", torch.ones(2), persistent=False)
    save_acu(model.half(), path)
    assert load_acu(path).grid.dtype is torch.float16


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_channels_last_and_tensors_that_share_a_storage_are_saved(suffix, build, tmp_path):
    model, path = build().to(memory_format=torch.channels_last), tmp_path / f"model{suffix}"
    flat = torch.zeros(len(model.bn1.weight) * 2)
    model.bn1.weight.data, model.bn1.bias.data = flat.chunk(2)
    save_acu(model, path)
    state = load_acu(path).state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_pt_file_is_read_with_weights_only(build, tmp_path):
    save_acu(build(), tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content.keys() == {"lightning_acu", "state_dict"}
    assert content["lightning_acu"]["architecture"]["name"].startswith("test_resnet.")  # the tag knows mean and size
    assert json.loads(json.dumps(content["lightning_acu"])) == content["lightning_acu"]


def test_arguments_of_the_architecture_are_saved(build, tmp_path):
    model = build(act_layer="silu", output_stride=8, num_classes=2)
    save_acu(model, tmp_path / "model.pt", act_layer="silu", output_stride=8, pretrained=True, weights=object())
    assert same(model, load_acu(tmp_path / "model.pt"))


def test_the_callers_random_numbers_are_left_alone_and_the_model_too(build, tmp_path):
    model = build().train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    save_acu(model, tmp_path / "deep" / "er" / "model.safetensors")
    load_acu(tmp_path / "deep" / "er" / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_replaced_at_once_or_not_at_all(suffix, build, tmp_path, monkeypatch):
    model, path = build(), tmp_path / f"model{suffix}"
    path.write_text("an earlier one")

    def full(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="disk full"):
            save_acu(model, path)
    assert path.read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [path]
    mode = path.stat().st_mode
    save_acu(model, str(path))
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode == mode
    assert same(model, load_acu(str(path), map_location=torch.device("cpu")))


@pytest.mark.parametrize(
    ("kwargs", "difference"),
    [
        ({"output_stride": 8}, r"stride of layer\d\.0 is 2 there and 1 in `model`"),
        ({"act_layer": "silu"}, r"class of act1 is .*ReLU there and .*SiLU in `model`"),
        ({"drop_rate": 0.25}, r"drop_rate of the model itself is 0.0 there and 0.25 in `model`"),
        ({"drop_path_rate": 0.25}, r"there is no module layer\d\.\d\.drop_path"),
        ({"global_pool": "max"}, r"pool_type of global_pool is 'avg' there and 'max' in `model`"),
    ],
)
def test_arguments_that_are_not_told_are_noticed(kwargs, difference, build, tmp_path):
    model = build("resnet18", num_classes=2, **kwargs)
    with pytest.raises(ValueError, match=rf"is not what create_model\('resnet.*builds.*{difference}.*keyword arg"):
        save_acu(model, tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda m: setattr(m, "fc", nn.Linear(m.fc.in_features, 7)),
            "out_features of fc is 1000 there and 7 in",
        ),
        (lambda m: m.add_module("more", nn.ReLU()), "there is no module more"),
        (lambda m: delattr(m, "fc"), "there is a module fc"),
        (lambda m: m.register_buffer("mean", torch.zeros(3)), r"shape of mean is absent there and \(3,\) in `model`"),
        (lambda m: m.register_buffer("mean", torch.zeros(3), persistent=False), "shape of mean is absent there"),
        (lambda m: setattr(m.layer1[0].bn1, "eps", 1e-3), r"eps of layer1\.0\.bn1 is 1e-05 there and 0.001"),
        (lambda m: setattr(m.layer1[0].bn1, "weight", m.bn1.weight), "other tensors are shared there"),
        (
            lambda m: setattr(m.layer1[0], "conv1", ACUConv2d.from_positions(32, 32, [(0, 0), (0, 1)])),
            r"layer1\.0\.conv1 is",
        ),
    ],
)
def test_models_that_were_changed_by_hand_are_noticed(change, difference, build, tmp_path):
    model = build("test_resnet")
    change(model)
    with pytest.raises(ValueError, match=difference):
        save_acu(model, tmp_path / "model.pt")


def test_a_head_made_by_hand_is_told_by_num_classes(build, tmp_path):
    model = build()
    model.fc = nn.Linear(model.fc.in_features, 7)
    save_acu(model, tmp_path / "model.pt", num_classes=7)
    assert same(model, load_acu(tmp_path / "model.pt"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"create_model\('resnet81', .*fails: .*did you mean"),
        ("test_efficientnet", r"conv1\.0 should be a convolution to convert, but does not exist"),
        ("hf-hub:timm/resnet18", "must be that of an architecture"),
    ],
)
def test_a_name_that_is_wrong_is_noticed(name, message, build, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_acu(build(), tmp_path / "model.pt", name=name)


def test_what_cannot_be_saved_says_why(build, tmp_path):
    path = tmp_path / "model.pt"
    model = build()
    with pytest.raises(TypeError, match=r"`act_layer` \(=<class .*SiLU'>\) cannot be saved as JSON"):
        save_acu(model, path, act_layer=nn.SiLU)
    with pytest.raises(ValueError, match=r"no_such_argument=1\) fails"):
        save_acu(model, path, no_such_argument=1)
    for suffix in ("", ".ckpt"):
        with pytest.raises(ValueError, match=r"`path` \(='.*model.*'\) must end in .safetensors, .pt, .pth"):
            save_acu(model, path.with_suffix(suffix))
    module = pl.LightningModule()
    module.model = model
    with pytest.raises(TypeError, match=r"is a LightningModule; save the model inside it"):
        save_acu(module, path)
    with pytest.raises(TypeError, match=r"is a OptimizedModule; save model\._orig_mod"):
        save_acu(torch.compile(model), path)
    with pytest.raises(TypeError, match=r"is a DataParallel; save model\.module"):
        save_acu(nn.DataParallel(model), path)
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got str"):
        save_acu("resnet18", path)
    with pytest.raises(ValueError, match=r"was folded into plain convolutions; .*torch\.export"):
        save_acu(fold_acu(model), path)
    with pytest.raises(ValueError, match=r"has no active convolution; .*convert_to_acu first"):
        save_acu(timm.create_model("test_resnet"), path)
    with pytest.raises(ValueError, match="on the meta device"):
        save_acu(build().to("meta"), path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_something_else_or_a_part_of_one_is_refused(suffix, build, tmp_path):
    path = tmp_path / f"model{suffix}"
    with pytest.raises(FileNotFoundError, match=r"`path` \(='.*model"):
        load_acu(path)
    with pytest.raises(ValueError, match="must end in"):
        load_acu(tmp_path / "model.bin")
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="was not written by save_acu; it has no record"):
        load_acu(path)
    save_acu(build(), path)
    content = path.read_bytes()
    for part in (content[: len(content) // 2], content[:20], b"", b"hello" * 100):
        path.write_bytes(part)
        with pytest.raises(ValueError, match="is damaged or was not written by save_acu"):
            load_acu(path)
    if suffix == ".pt":
        torch.save(nn.Linear(1, 1), path)
        with pytest.raises(ValueError, match="is damaged or was not written by save_acu: Weights only"):
            load_acu(path)


def edit(path, change):
    content = torch.load(path)
    change(content["lightning_acu"], content["state_dict"])
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record, state: record.update(format_version=3), "has format 3, .* reads formats up to 2; update it"),
        (
            lambda record, state: record["architecture"].update(name="resnet81"),
            "'resnet81'.*did you mean.*written with",
        ),
        (lambda record, state: record["architecture"].update(name="hf-hub:a/b"), "must be that of an architecture"),
        (lambda record, state: record["architecture"]["kwargs"].update(num_classes=9), "size mismatch for fc.weight"),
        (lambda record, state: record["layers"][0].update(name="layer9"), "layer9 should be .* does not exist"),
        (lambda record, state: record["layers"][0].update(name="bn1"), "bn1 should be .* is a BatchNorm(Act)?2d, for"),
        (lambda record, state: record["layers"][0].update({"class": "ACUConv3d"}), "not a ACUConv3d"),
        (lambda record, state: record["layers"][0].update(backend="warp"), "'warp'"),
        (lambda record, state: record.pop("layers"), "is damaged .*`layers` is missing"),
        (lambda record, state: state.pop("fc.bias"), "Missing key.*fc.bias"),
    ],
)
def test_a_file_that_does_not_fit_what_is_installed_says_what(change, message, build, tmp_path):
    path = tmp_path / "model.pt"
    save_acu(build(), path)
    edit(path, change)
    with pytest.raises(ValueError, match=rf"(?s)`path` \(='.*model.pt'\).*{message}"):
        load_acu(path)


def test_a_file_cannot_make_the_loader_fetch_weights(build, tmp_path):
    path = tmp_path / "model.pt"
    save_acu(build(), path)
    sources = {"pretrained": True, "checkpoint_path": "/no/such/file", "weights": "DEFAULT"}
    edit(path, lambda record, state: record["architecture"]["kwargs"].update(sources))
    load_acu(path)


def test_a_loaded_model_goes_on_as_a_converted_one(build, tmp_path):
    model = build("test_resnet", num_classes=2)
    save_acu(model, tmp_path / "model.pt")
    loaded = load_acu(tmp_path / "model.pt").train()
    loaded(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(layer.offsets.grad is not None for _, layer in acu_layers(loaded))
    plain = create_model("test_resnet", num_classes=2)
    for _, layer in acu_layers(loaded):
        layer.reset_parameters()
    with pytest.warns(UserWarning, match="of a plain model"):
        loaded.load_state_dict(plain.state_dict())
    assert not list(acu_layers(fold_acu(loaded)))
