"""What is timed: convolution layers of well-known networks, and the ways to compute one with its taps off the grid.

Every method works on the same tensors of a :class:`Case`. Gradients are those of input, weight and positions; there is
no bias, as in the networks themselves.
"""

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_acu import acu_conv2d


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


@dataclass
class Method:
    """``forward()`` computes the layer; ``leaves`` are its input, weight and positions (plain has none)."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    #: The gradient of the last leaf as one of offsets (K, 2), to compare methods.
    offset_gradient: Callable[[Tensor], Tensor] = lambda grad: grad

    def step(self, grad: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(self.forward(), self.leaves, grad)]


def _plain(case: Case, backend: str) -> Method:
    def forward():
        return F.conv2d(case.input, case.weight, **case.configuration)

    return Method(forward, [case.input, case.weight])


def _acu(case: Case, backend: str) -> Method:
    def forward():
        return acu_conv2d(case.input, case.weight, case.offsets, backend=backend, **case.configuration)

    return Method(forward, [case.input, case.weight, case.offsets])


def _dcls(case: Case, backend: str) -> Method:
    """DCLS with the shared positions written into each channel's own.

    v1 is bilinear. It writes the taps into a kernel that holds every position which they may learn, 5x5 for a 3x3 whose
    offsets stay within 1 pixel, and convolves with that. Outputs are the same but for the 1e-7 in its normalisation.
    What is not: it learns positions for each channel (C_out * C_in / groups * K pairs; the gradients differ in that
    they are not summed), makes tensors of 25 * 2 times as many numbers as there are weights, and has no lower precision
    of its own: weights and positions stay in float32, and autocast does the convolution.
    """
    from DCLS.construct.modules import Dcls2d

    layer = case.layer
    logging.disable(logging.WARNING)  # of the kernels it could use if they were installed; it warns for each layer
    module = Dcls2d(
        layer.c_in,
        layer.c_out,
        layer.kernel**2,
        layer.stride,
        case.padding + 1,
        layer.kernel + 2,
        layer.groups,
        bias=False,
        version="v1",
        use_implicit_gemm=layer.stride == 1,  # those kernels, for depthwise layers on CUDA, ignore the stride
    ).to(case.device)
    logging.disable(logging.NOTSET)
    steps = torch.arange(layer.kernel) - layer.kernel // 2
    grid = torch.cartesian_prod(steps, steps).to(case.device)
    positions = (grid + case.offsets.detach()).flip(-1)  # its first coordinate is x
    with torch.no_grad():
        module.weight.copy_(case.weight.flatten(2))
        module.P.copy_(positions.T[:, None, None])

    def forward():
        with torch.autocast(case.device, case.dtype, enabled=case.dtype != torch.float32):
            return module(case.input)

    return Method(forward, [case.input, module.weight, module.P], lambda grad: grad.sum((1, 2)).T.flip(-1))


def _deform(case: Case, backend: str) -> Method:
    """Torchvision's deformable convolution with the same offsets at every pixel; sums the gradient over pixels."""
    from torchvision.ops import deform_conv2d

    configuration = {"stride": case.layer.stride, "padding": case.padding}  # groups follow from the weight's shape

    def forward():
        field = case.offsets.to(case.dtype).reshape(1, -1, 1, 1)
        field = field.expand(len(case.input), -1, *case.grad.shape[2:])
        return deform_conv2d(case.input, field, case.weight, **configuration)

    return Method(forward, [case.input, case.weight, case.offsets])


_BUILDERS = {
    "plain": _plain,
    "ours": _acu,
    "dense": lambda case, backend: _acu(case, "dense"),
    "dcls": _dcls,
    "deform": _deform,
}
METHODS = list(_BUILDERS)


def build(name: str, case: Case, backend: str) -> Method:
    """One of ``METHODS`` on the tensors of ``case``; ``backend`` is that of "ours"."""
    return _BUILDERS[name](case, backend)


def prepare(
    case: Case, names: list[str], backend: str, problems: dict[str, None]
) -> tuple[dict[str, Method], dict[str, Tensor], dict[str, float]]:
    """Methods after a warm-up, the output gradient for each, and how far each is from dense, in all that it computes.

    One that cannot run here is left out; why goes to ``problems``, as does one that computes something else.
    """
    methods, grads, results = {}, {}, {}
    taps = case.layer.kernel**2
    moving = torch.arange(taps) != taps // 2  # the centre tap sits at a kink, where each picks its own slope
    for name in names:
        try:
            method = build(name, case, backend)
            output = method.forward()
            grad = torch.empty_like(output).copy_(case.grad)  # laid out as the output is
            found = method.step(grad)
        except (ImportError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            problems[f"{name} cannot run: {type(error).__name__}: {str(error).splitlines()[0]}"] = None
            continue
        methods[name], grads[name] = method, grad
        if name != "plain":
            results[name] = [output, *found[:2], method.offset_gradient(found[2])[moving]]
    differences = {}
    for name, result in results.items() if "dense" in results else ():
        differences[name] = max(map(_difference, result, results["dense"]))
        if differences[name] > (2e-3 if case.dtype == torch.float32 else 0.1):
            problems[f"{name} differs from dense by {differences[name]:.1e} on {case.layer.name}"] = None
    return methods, grads, differences


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    found, expected = found.detach().float().reshape(expected.shape), expected.detach().float()
    return ((found - expected).abs().max() / expected.abs().max()).item()
