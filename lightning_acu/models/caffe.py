"""The authors' released network, a Caffe model file, as the same network here.

Their repository (jyh2986/Active-Convolution) has the plain CIFAR-10 network with active convolutions at four times of
its training: ``models/ACU/plain_iter_10000.caffemodel`` to ``plain_iter_64000.caffemodel``. Its input is an RGB image
after global contrast normalisation and ZCA whitening (``preprocessing="whiten"`` of the CIFAR data modules).

What the file holds, from ``caffe.proto`` and ``aconv_fast_layer.cpp`` there: an AConvFast layer has four blobs, the
weight, a bias that is not used, and x and y of each tap in pixels from the centre. Its taps are not in raster order but
the centre first, then around it from (x, y) = (1, 0) towards positive y. A BatchNorm layer has sums of means and of
variances and, third, their number; a Scale layer has the weight and bias of the batch norm.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require_package
from ..conv import ACUConv2d
from ..surgery.convert import convert_to_acu
from .create import create_model

__all__ = ["import_caffe"]

#: Our modules by the names of the file's convolutions, and what their batch norm is called there.
_LAYERS = {
    "conv1_1": ("conv1.0", "1_1"),
    "conv1_1/1": ("conv1.1", "1_1/1"),
    "conv1_1/2": ("conv1.2", "1_1/2"),
    "conv2_1/1": ("conv2.1", "2_1/1"),
    "conv2_1/2": ("conv2.2", "2_1/2"),
    "conv3_1/1": ("conv3.1", "3_1/1"),
    "conv3_1/2": ("conv3.2", "3_1/2"),
    "fc1": ("conv4", "_fc1"),
}

#: (y, x) of the taps of a 3x3 kernel in the file's order: sines and cosines of eighths of a turn, to the nearest pixel.
_TAPS = [(0, 0), *((round(math.sin(n * math.pi / 4)), round(math.cos(n * math.pi / 4))) for n in range(8))]

#: Where each of them is in raster order.
_RASTER = [3 * (y + 1) + x + 1 for y, x in _TAPS]


def import_caffe(path: str | os.PathLike[str]) -> nn.Module:
    """The paper's plain CIFAR-10 network from a .caffemodel of its authors, with its positions; in eval mode.

    Save it with :func:`lightning_acu.save_acu`. Needs the package protobuf.

    Args:
        path: the file.

    Returns:
        The network ``acu_plain`` with six active 3x3 convolutions: (N, 3, 32, 32) to scores (N, 10).

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: protobuf is not installed.
        ValueError: it is no Caffe model, or that of another network; the message names the layer that is missing or
            does not fit.
    """
    layers = _read(Path(path))
    model = convert_to_acu(create_model("acu_plain", num_classes=10), kernel_sizes=[3]).eval()
    with torch.no_grad():
        for name, (ours, norm) in _LAYERS.items():
            module = model.get_submodule(ours)
            _set_conv(module.conv, layers, name, path)
            _set_norm(module.bn, layers, norm, path)
        classifier = model.get_submodule("fc")
        _set(classifier.weight, layers, "score", 0, path)
        _set(classifier.bias, layers, "score", 1, path)
    return model


def _set_conv(conv: Any, layers: dict[str, list[Tensor]], name: str, path: Any) -> None:
    if not isinstance(conv, ACUConv2d):
        _set(conv.weight, layers, name, 0, path)
        return
    weight = torch.empty_like(conv.weight)
    _set(weight, layers, name, 0, path)
    conv.weight.flatten(2)[:, :, _RASTER] = weight.flatten(2)
    x, y = torch.empty(2, 3, 3, dtype=torch.float32, device="cpu")
    _set(x, layers, name, 2, path)
    _set(y, layers, name, 3, path)
    conv.offsets.view(9, 2)[_RASTER] = torch.stack((y.flatten(), x.flatten()), 1) - torch.tensor(
        _TAPS, dtype=torch.float32, device="cpu"
    )


def _set_norm(norm: Any, layers: dict[str, list[Tensor]], name: str, path: Any) -> None:
    count = torch.empty(1, dtype=torch.float32, device="cpu")
    _set(count, layers, f"bn{name}", 2, path)
    if not count > 0:
        raise ValueError(f"{path}: layer bn{name} has a count of {count.item():g} of its statistics; it is not trained")
    for number, statistic in enumerate((norm.running_mean, norm.running_var)):
        _set(statistic, layers, f"bn{name}", number, path)
        statistic /= count
    for number, parameter in enumerate((norm.weight, norm.bias)):
        _set(parameter, layers, f"scale{name}", number, path)


def _set(ours: Any, layers: dict[str, list[Tensor]], name: str, number: int, path: Any) -> None:
    """Fill the tensor ``ours`` from blob ``number`` of layer ``name``; unit axes do not count."""
    blobs = layers.get(name, [])
    if len(blobs) <= number:
        found = f"has {len(blobs)} blobs" if name in layers else f"is missing; there are {', '.join(layers) or 'none'}"
        raise ValueError(f"{path} is not the authors' plain network: layer {name} {found}")
    blob = blobs[number]
    shapes = [[size for size in shape if size > 1] for shape in (ours.shape, blob.shape)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{path} is not the authors' plain network: blob {number} of layer {name} has shape {tuple(blob.shape)}, "
            f"not {tuple(ours.shape)}"
        )
    if not blob.isfinite().all():
        raise ValueError(f"{path}: blob {number} of layer {name} is not finite")
    ours.copy_(blob.view(ours.shape))


def _read(path: Path) -> dict[str, list[Tensor]]:
    """The blobs of each layer that has some."""
    require_package("protobuf", "reading a Caffe model", module="google.protobuf")
    from google.protobuf.message import DecodeError

    network = _message()()
    try:
        network.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a Caffe model, or is damaged: {error}") from error
    return {
        layer.name: [_tensor(blob, layer.name, path) for blob in layer.blobs] for layer in network.layer if layer.blobs
    }


def _tensor(blob: Any, name: str, path: Path) -> Tensor:
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]
    values = torch.tensor(blob.data, dtype=torch.float32, device="cpu")
    if any(size < 0 for size in shape) or math.prod(shape) != len(values):
        raise ValueError(f"{path}: a blob of layer {name} should have shape {shape}, but holds {len(values)} numbers")
    return values.view(shape)


@functools.cache
def _message() -> Any:
    """The class of Caffe's NetParameter, of which only what is read here is described; other fields are skipped."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="lightning_acu/caffe.proto", package="caffe", syntax="proto2")

    def describe(message: str, **fields: tuple[int, int | str, bool]) -> None:
        described = file.message_type.add(name=message)
        for name, (number, kind, repeated) in fields.items():
            added = described.field.add(name=name, number=number)
            added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                added.type, added.type_name = field.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                added.type = kind

    number, text = field.TYPE_INT32, field.TYPE_STRING
    old_shape = {name: (place, number, False) for place, name in enumerate(("num", "channels", "height", "width"), 1)}
    describe("BlobShape", dim=(1, field.TYPE_INT64, True))
    describe("BlobProto", shape=(7, "BlobShape", False), data=(5, field.TYPE_FLOAT, True), **old_shape)
    describe("LayerParameter", name=(1, text, False), type=(2, text, False), blobs=(7, "BlobProto", True))
    describe("NetParameter", name=(1, text, False), layer=(100, "LayerParameter", True))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))
