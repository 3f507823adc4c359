"""A Caffe model file of the authors' plain network, written byte by byte."""

import struct

import torch

__all__ = ["CONVS", "encoded", "layers"]

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
