"""The import of the authors' Caffe network, from files that are written here byte by byte."""

import sys

import pytest
import torch
from helpers.caffe_file import CONVS, encoded, layers
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, load_acu, save_acu
from lightning_acu.models import import_caffe

pytest.importorskip("google.protobuf")


def as_they_compute(found):
    """The network in the file's own order of taps, in float64."""
    modules = []
    for name, (inputs, outputs, kernel, stride) in CONVS.items():
        weight, *rest = found[name]
        positions = torch.zeros(1, 2) if kernel == 1 else torch.stack((rest[2].flatten(), rest[1].flatten()), 1)
        conv = ACUConv2d.from_positions(inputs, outputs, positions, stride=stride, bias=False).double()
        conv.weight.data.copy_(weight.reshape(outputs, inputs, 1, kernel**2))
        norm = nn.BatchNorm2d(outputs).double()
        key = name.removeprefix("conv") if name != "fc1" else "_fc1"
        norm.running_mean.copy_(found[f"bn{key}"][0].double() / 999.5)
        norm.running_var.copy_(found[f"bn{key}"][1].double() / 999.5)
        norm.weight.data.copy_(found[f"scale{key}"][0])
        norm.bias.data.copy_(found[f"scale{key}"][1])
        modules += [conv, norm, nn.ReLU()]
    head = nn.Linear(1000, 10).double()
    head.weight.data.copy_(found["score"][0].reshape(10, 1000))
    head.bias.data.copy_(found["score"][1])
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


@pytest.mark.parametrize("packed", [True, False])
def test_the_imported_network_computes_what_the_file_says(tmp_path, packed):
    found = layers()
    path = tmp_path / "plain.caffemodel"
    path.write_bytes(encoded(found, packed))
    model = import_caffe(path)
    assert not model.training
    assert len(list(acu_layers(model))) == 6
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = as_they_compute(found)(images)
        torch.testing.assert_close(model.double()(images), expected, rtol=1e-5, atol=1e-5)  # means in float32
    assert expected.std() > 0.1
    saved = tmp_path / "plain.safetensors"
    save_acu(import_caffe(path), saved)
    with torch.no_grad():
        assert torch.equal(load_acu(saved).eval()(images.float()), import_caffe(path)(images.float()))


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "plain.caffemodel"
    with pytest.raises(FileNotFoundError, match=r"plain\.caffemodel"):
        import_caffe(path)
    path.write_bytes(b"\xff\xff\xff\xff not protobuf")
    with pytest.raises(ValueError, match=r"plain\.caffemodel is not a Caffe model, or is damaged"):
        import_caffe(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not the authors' plain network: layer conv1_1 is missing; there are none"):
        import_caffe(path)
    whole = encoded(layers())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        import_caffe(path)


@pytest.mark.parametrize(
    ("name", "blobs", "says"),
    [
        ("conv2_1/1", None, r"layer conv2_1/1 is missing; there are conv1_1, "),
        ("conv2_1/1", lambda blobs: blobs[:2], r"layer conv2_1/1 has 2 blobs"),
        (
            "conv1_1/2",
            lambda blobs: [blobs[0][:, :, :2], *blobs[1:]],
            r"blob 0 of layer conv1_1/2 has shape \(48, 48, 2",
        ),
        ("conv3_1/2", lambda blobs: [*blobs[:3], blobs[3] * float("nan")], r"blob 3 of layer conv3_1/2 is not finite"),
        ("bn_fc1", lambda blobs: [*blobs[:2], torch.zeros(1)], r"layer bn_fc1 has a count of 0"),
    ],
)
def test_the_message_names_the_layer_that_does_not_fit(tmp_path, name, blobs, says):
    found = layers()
    found[name] = [] if blobs is None else blobs(found[name])
    if blobs is None:
        del found[name]
    path = tmp_path / "plain.caffemodel"
    path.write_bytes(encoded(found))
    with pytest.raises(ValueError, match=says):
        import_caffe(path)


def test_without_protobuf(tmp_path, monkeypatch):
    path = tmp_path / "plain.caffemodel"
    path.write_bytes(b"")
    monkeypatch.setattr("lightning_acu.checks.find_spec", lambda name: None if name == "google.protobuf" else sys)
    with pytest.raises(ModuleNotFoundError, match="pip install protobuf"):
        import_caffe(path)
