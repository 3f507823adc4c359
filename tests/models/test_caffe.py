"""The import of the authors' Caffe network, from files that are written here byte by byte."""

import struct
import sys

import pytest
import torch
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, load_acu, save_acu
from lightning_acu.models import import_caffe

pytest.importorskip("google.protobuf")

CONVS = {
    "conv1_1": (3, 16, 1, 1), "conv1_1/1": (16, 48, 3, 1), "conv1_1/2": (48, 48, 3, 1), "conv2_1/1": (48, 96, 3, 2),
    "conv2_1/2": (96, 96, 3, 1), "conv3_1/1": (96, 192, 3, 2), "conv3_1/2": (192, 192, 3, 1), "fc1": (192, 1000, 1, 1),
}  # fmt: skip

#: (x, y) of the regular grid in the authors' order: the centre, then around it.
AROUND = [(0, 0), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]


def varint(number):
    out = b""
    while number > 127:
        out += bytes([number % 128 + 128])
        number //= 128
    return out + bytes([number])


def chunk(field, content):
    return varint(field * 8 + 2) + varint(len(content)) + content


def encoded(layers, packed=True):
    """A NetParameter (name 1, layer 100) of layers (name 1, type 2, blobs 7) of blobs (shape 7, data 5)."""
    out = chunk(1, b"ACU_plain")
    for name, blobs in layers.items():
        body = chunk(1, name.encode()) + chunk(2, b"Any") + varint(10 * 8) + varint(1)  # and a phase, which is skipped
        for blob in blobs:
            values = struct.pack(f"<{blob.numel()}f", *blob.flatten().tolist())
            if packed:
                shape = chunk(7, chunk(1, b"".join(map(varint, blob.shape))))
            else:  # the shape of old files: num, channels, height, width
                sizes = [1] * (4 - blob.ndim) + list(blob.shape)
                shape = b"".join(varint(place * 8) + varint(size) for place, size in enumerate(sizes, 1))
            body += chunk(7, chunk(5, values) + shape)
        out += chunk(100, body)
    return out


def layers():
    """The authors' layers with random numbers."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, (inputs, outputs, kernel, _) in CONVS.items():
        blobs = [torch.randn(outputs, inputs, kernel, kernel, generator=random) / (inputs * kernel**2) ** 0.5]
        if name != "fc1":
            taps = torch.tensor(AROUND, dtype=torch.float32)[: kernel**2]
            taps[1:] += torch.rand(kernel**2 - 1, 2, generator=random) - 0.5
            x, y = taps.T.reshape(2, 1, 1, kernel, kernel)
            blobs += [torch.zeros(1, 1, 1, 1), x, y]
        found[name] = blobs
        norm = name.removeprefix("conv") if name != "fc1" else "_fc1"
        mean, variance, weight, bias = torch.rand(4, outputs, generator=random) + 0.5
        found[f"bn{norm}"] = [mean * 999.5, variance * 999.5, torch.tensor([999.5])]
        found[f"scale{norm}"] = [weight, bias]
    found["score"] = [torch.randn(10, 1000, 1, 1, generator=random), torch.randn(10, generator=random)]
    return found


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
