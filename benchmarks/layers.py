"""What is timed: convolution layers of well-known networks, and the tensors of one with its taps off the grid."""

import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layer:
    kind: str
    network: str
    c_in: int
    c_out: int
    size: int  # of the square input image
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        channels = f"{self.c_in}" if self.c_in == self.c_out else f"{self.c_in}->{self.c_out}"
        grouped = f" g{self.groups}" if self.kind == "grouped" else ""
        stride = f" s{self.stride}" if self.stride > 1 else ""
        return f"{self.network} {channels}@{self.size} {self.kernel}x{self.kernel}{stride}{grouped}"


def _depthwise(network: str, channels: int, size: int, kernel: int = 3, stride: int = 1) -> Layer:
    return Layer("depthwise", network, channels, channels, size, kernel, stride, channels)


LAYERS = [
    Layer("dense3x3", "ResNet", 64, 64, 56),
    Layer("dense3x3", "ResNet", 128, 128, 28),
    Layer("dense3x3", "ResNet", 256, 256, 14),
    Layer("dense3x3", "ResNet", 512, 512, 7),
    Layer("dense3x3", "ResNet-18", 64, 128, 56, stride=2),
    Layer("dense3x3", "ResNet-18", 128, 256, 28, stride=2),
    Layer("dense3x3", "ResNet-18", 256, 512, 14, stride=2),
    Layer("dense3x3", "ResNet-50", 128, 128, 56, stride=2),
    Layer("dense3x3", "ResNet-50", 256, 256, 28, stride=2),
    Layer("dense3x3", "ResNet-50", 512, 512, 14, stride=2),
    Layer("dense5x5", "GoogLeNet", 16, 32, 28, 5),
    Layer("dense5x5", "GoogLeNet", 32, 96, 28, 5),
    Layer("dense5x5", "(wide)", 64, 64, 28, 5),
    Layer("dense5x5", "AlexNet", 64, 192, 27, 5),
    _depthwise("MobileNetV2", 32, 112),
    _depthwise("EfficientNet", 96, 112, stride=2),
    _depthwise("EfficientNet", 144, 56),
    _depthwise("EfficientNet", 240, 28, 5),
    _depthwise("EfficientNet", 480, 14),
    _depthwise("EfficientNet", 672, 14, 5),
    _depthwise("EfficientNet", 1152, 7, 5),
    _depthwise("EfficientNet", 1152, 7),
    Layer("grouped", "ResNeXt-50", 128, 128, 56, groups=32),
    Layer("grouped", "ResNeXt-50", 256, 256, 28, groups=32),
    Layer("grouped", "RegNetX-1.6GF", 168, 168, 28, groups=7),  # 24 channels a group
    Layer("grouped", "RegNetX-3.2GF", 192, 192, 28, groups=4),  # 48 channels a group
]
KINDS = list(dict.fromkeys(layer.kind for layer in LAYERS))


class Case:
    """The tensors of one layer: input, weight and offsets, all wanting gradients.

    Offsets come from uniform(-1, 1) with the centre tap at 0, other ones for each layer, the same in each run.
    """

    def __init__(
        self, layer: Layer, batch: int, device: str, dtype: torch.dtype, memory_format: torch.memory_format, seed: int
    ) -> None:
        self.layer, self.device, self.dtype = layer, device, dtype
        generator = torch.Generator().manual_seed(seed + zlib.crc32(layer.name.encode()))
        taps = layer.kernel**2
        offsets = torch.rand(taps, 2, generator=generator) * 2 - 1
        offsets[taps // 2] = 0
        weight = torch.randn(layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel, generator=generator)
        image = torch.randn(batch, layer.c_in, layer.size, layer.size, generator=generator)
        options = {"device": device, "dtype": dtype, "memory_format": memory_format}
        self.input = image.to(**options).requires_grad_()
        self.weight = (weight / (weight[0].numel() ** 0.5)).to(**options).requires_grad_()
        self.offsets = offsets.to(device).requires_grad_()  # float32 whatever ``dtype``
        self.padding = layer.kernel // 2
        out = (layer.size + 2 * self.padding - layer.kernel) // layer.stride + 1
        grad = torch.randn(batch, layer.c_out, out, out, generator=generator)
        self.grad = grad.to(**options)

    @property
    def configuration(self) -> dict:
        return {"stride": self.layer.stride, "padding": self.padding, "groups": self.layer.groups}
