"""The ways to compute one layer with its taps off the grid, checked against each other before they are timed.

Every method works on the same tensors of a :class:`Case`. Gradients are those of input, weight and positions; there is
no bias, as in the networks themselves. Those with "-autocast" keep weight and positions in float32, as a network under
``torch.autocast`` does, and get the image in the low precision, as it comes from the layer before.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from layers import Case
from tables import METHODS, Problems, brief
from timing import synchronize
from torch import Tensor
from torch.nn import functional as F

from lightning_acu import acu_conv2d

#: How far results may be from the reference, in units of the largest number: a few times what rounding each number by
#: 2^-24, 2^-11 (TF32 and float16) or 2^-8 makes of them. Methods that round positions may exceed it.
TOLERANCES = {"float32": 1e-4, "tf32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
RESULTS = ["the output", "the gradient of the input", "the gradient of the weight", "the gradient of offsets"]


@dataclass
class Method:
    """``forward()`` computes the layer; ``leaves`` are its input, weight and positions (plain has none)."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    #: The gradient of the last leaf as one of offsets (K, 2), to compare methods.
    offset_gradient: Callable[[Tensor], Tensor] = lambda grad: grad

    def step(self, grad: Tensor) -> list[Tensor]:
        return [*torch.autograd.grad(self.forward(), self.leaves, grad)]


def _plain(case: Case) -> Method:
    def forward():
        return F.conv2d(case.input, case.weight, **case.configuration)

    return Method(forward, [case.input, case.weight])


def _acu(case: Case, backend: str) -> Method:
    def forward():
        return acu_conv2d(case.input, case.weight, case.offsets, backend=backend, **case.configuration)

    return Method(forward, [case.input, case.weight, case.offsets])


def _dcls(case: Case, autocast: bool) -> Method:
    """DCLS with the shared positions written into each channel's own.

    v1 is bilinear. It writes the taps into a kernel that holds every position which they may learn, 5x5 for a 3x3 whose
    offsets stay within 1 pixel, and convolves with that. Outputs are the same but for the 1e-7 in its normalisation.
    What is not: it learns positions for each channel (C_out * C_in / groups * K pairs; the gradients differ in that
    they are not summed) and makes tensors of 25 * 2 times as many numbers as there are weights.

    Under autocast it writes the kernel in float32 and convolves in the low precision (elementwise operations, ``sum``
    and ``prod`` do not go down); without, positions are rounded to the low precision, as everything is.
    """
    from DCLS.construct.modules import Dcls2d

    layer = case.layer
    with _quiet():  # it warns for each layer of kernels that are not installed
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
        ).to(case.device, torch.float32 if autocast else case.dtype)
    steps = torch.arange(layer.kernel) - layer.kernel // 2
    grid = torch.cartesian_prod(steps, steps).to(case.device)
    positions = (grid + case.offsets.detach()).flip(-1)  # its first coordinate is x
    with torch.no_grad():
        module.weight.copy_(case.weight.flatten(2))
        module.P.copy_(positions.T[:, None, None])

    def forward():
        with _autocast(case, autocast):
            return module(case.input)

    return Method(forward, [case.input, module.weight, module.P], lambda grad: grad.sum((1, 2)).T.flip(-1))


def _deform(case: Case, autocast: bool) -> Method:
    """Torchvision's deformable convolution with the same offsets at every pixel; sums the gradient over pixels.

    Under autocast on CUDA it casts all to float32, computes there and rounds the output; on the CPU torchvision 0.29
    has no such rule. Without autocast it takes one precision for all, also for the places where it samples (in float16
    1/16 pixel apart beyond pixel 64), and knows no bfloat16.
    """
    from torchvision.ops import deform_conv2d

    weight = case.weight.detach().float().requires_grad_() if autocast else case.weight
    configuration = {"stride": case.layer.stride, "padding": case.padding}  # groups follow from the weight's shape

    def forward():
        field = case.offsets.to(weight.dtype).reshape(1, -1, 1, 1)
        field = field.expand(len(case.input), -1, *case.grad.shape[2:])
        with _autocast(case, autocast):
            return deform_conv2d(case.input, field, weight, **configuration)

    return Method(forward, [case.input, weight, case.offsets])


def _autocast(case: Case, enabled: bool) -> AbstractContextManager:
    if enabled and case.dtype == torch.float32:
        raise ValueError("autocast goes to bfloat16 or float16; choose one by --dtype")
    return torch.autocast(case.device, case.dtype) if enabled else nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def build(name: str, case: Case, backend: str) -> Method:
    """One of ``METHODS`` on the tensors of ``case``; ``backend`` is that of "ours"."""
    kind, _, suffix = name.partition("-")
    if kind == "plain":
        return _plain(case)
    if kind in ("ours", "dense"):
        return _acu(case, backend if kind == "ours" else "dense")
    return {"dcls": _dcls, "deform": _deform}[kind](case, suffix == "autocast")


def methods_for(dtype: str) -> list[str]:
    """All of ``METHODS`` that differ from each other in ``dtype``: there is no autocast to float32."""
    return [name for name in METHODS if dtype != "float32" or not name.endswith("-autocast")]


def reference(case: Case) -> list[Tensor]:
    """Output and gradients by the dense backend on the CPU in float32, whatever the device and precision of ``case``.

    That backend equals float64 loops to rounding (the package's tests); no TF32 and no GPU has a part in it.
    """
    leaves = [t.detach().cpu().float().requires_grad_() for t in (case.input, case.weight, case.offsets)]
    output = acu_conv2d(*leaves, backend="dense", **case.configuration)
    return [output.detach(), *torch.autograd.grad(output, leaves, case.grad.cpu().float())]


def prepare(
    case: Case, names: list[str], backend: str, tolerance: float, problems: Problems
) -> tuple[dict[str, Method], dict[str, Tensor], dict[str, float]]:
    """Methods after a warm-up, the output gradient for each, and how far each is from the reference, in all results.

    One that cannot run here is left out; why goes to ``problems``, as does one that is further off than ``tolerance``.
    """
    methods, grads, differences = {}, {}, {}
    taps = case.layer.kernel**2
    moving = torch.arange(taps) != taps // 2  # the centre tap sits at a kink, where each picks its own slope
    expected = reference(case)
    expected[3] = expected[3][moving]
    for name in names:
        try:
            method = build(name, case, backend)
            output = method.forward()
            grad = torch.empty_like(output).copy_(case.grad)  # laid out as the output is
            found = method.step(grad)
            synchronize(case.device)
        except Exception as error:  # whatever a compiler or a driver raises: it is reported, and the next one runs
            problems.add(name, f"cannot run: {brief(error)}", case.layer.name)
            continue
        methods[name], grads[name] = method, grad
        if name == "plain":
            continue
        offsets = method.offset_gradient(found[2]).cpu()[moving]
        results = zip(RESULTS, [output, *found[:2], offsets], expected, strict=True)
        far = {what: _difference(result, exact) for what, result, exact in results}
        wrong = [f"{what} by {size:.1e}" for what, size in far.items() if not size <= tolerance]  # NaN is wrong
        if wrong:
            problems.add(name, f"differs from float32 in {', '.join(wrong)}", case.layer.name)
        differences[name] = torch.tensor([*far.values()]).max().item()  # NaN if one is; Python's max loses it
    return methods, grads, differences


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    found = found.detach().cpu().float().reshape(expected.shape)
    return ((found - expected).abs().max() / expected.abs().max()).item()
