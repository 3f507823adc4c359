"""The operator inside torch: compile, export, autocast, memory formats, FLOP counting, imports."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle import GEOMETRY, assert_close
from torch.utils.flop_counter import FlopCounterMode

from lightning_acu import acu_conv2d
from lightning_acu.ops import acu_conv2d_op

backends = pytest.mark.parametrize("backend", ["reference", "dense", "cython"])


@pytest.mark.slow
@backends
def test_compiles_without_graph_breaks_forward_and_backward(case, backend):
    def function(*tensors):
        return acu_conv2d(*tensors, **GEOMETRY, backend=backend).relu()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected, actual = function(*case), compiled(*case)
    assert_close(actual, expected)
    direction = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, case, direction) for y in (actual, expected)), strict=True):
        assert_close(one, other)


class _Module(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.weight, self.offsets, self.bias = (torch.nn.Parameter(tensor.detach().clone()) for tensor in case[1:])

    def forward(self, input):
        return acu_conv2d(input, self.weight, self.offsets, self.bias, **GEOMETRY)


def test_exports_as_one_operator_that_is_tied_to_no_backend(case):
    sizes = {
        axis: torch.export.Dim(name, min=low, max=64) for axis, name, low in ((0, "n", 2), (2, "h", 5), (3, "w", 4))
    }
    module = _Module(case)  # (outputs of one row or column are a case of their own, as for a plain convolution)
    exported = torch.export.export(module, (case[0].detach(),), dynamic_shapes=(sizes,))
    nodes = [node for node in exported.graph.nodes if node.op == "call_function" and "acu" in str(node.target)]
    assert [str(node.target) for node in nodes] == ["lightning_acu.acu_conv2d.default"]
    assert nodes[0].args[-1] == "auto"
    larger = torch.randn(5, 4, 11, 9, dtype=torch.float64)
    assert_close(exported.module()(larger), module(larger))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 9.0])
def test_opcheck(case, channels_last, scale):
    input, weight, offsets, bias = (tensor.detach().clone() for tensor in case)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    leaves = [tensor.detach().requires_grad_() for tensor in (input, weight, offsets * scale)]
    arguments = (*leaves, bias, (2, 1), (1, 0, 1, 0), (2, 1), 2, "auto")
    torch.library.opcheck(acu_conv2d_op._opoverload, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_its_dtype_and_keeps_positions_in_float32(dtype):
    input, weight, bias = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    offsets = (torch.randn(9, 2) * 0.5).requires_grad_()
    expected = acu_conv2d(input, weight, offsets, bias, padding=1)
    with torch.autocast("cpu", dtype=dtype):
        actual = acu_conv2d(input, weight, offsets, bias, padding=1)
    assert actual.dtype == dtype
    # As close as a plain convolution of the same numbers in that dtype.
    rounded = acu_conv2d(input.to(dtype).double(), weight.to(dtype).double(), offsets.double(), None, padding=1)
    rounded = rounded + bias.to(dtype).double()[:, None, None]
    assert_close(actual.double(), rounded.detach(), torch.finfo(dtype).eps)
    actual.float().square().sum().backward()
    (gradient,) = torch.autograd.grad(expected.square().sum(), offsets)
    assert offsets.grad.dtype == torch.float32
    assert F.cosine_similarity(offsets.grad.flatten(), gradient.flatten(), dim=0) > 0.999


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_input_keeps_its_dtype(backend, dtype):
    input, weight = torch.randn(2, 3, 9, 8, dtype=dtype), torch.randn(4, 3, 3, 3, dtype=dtype)
    offsets = torch.randn(9, 2)
    actual = acu_conv2d(input, weight, offsets, padding=1, backend=backend)
    assert actual.dtype == dtype
    assert_close(
        actual.double(),
        acu_conv2d(input.double(), weight.double(), offsets.double(), padding=1),
        torch.finfo(dtype).eps,
    )


@pytest.mark.parametrize("which", ["input", "weight"])
def test_channels_last_is_kept(which):
    tensors = {"input": torch.randn(2, 4, 7, 6), "weight": torch.randn(8, 4, 3, 3)}
    tensors[which] = tensors[which].contiguous(memory_format=torch.channels_last).requires_grad_()
    output = acu_conv2d(**tensors, offsets=torch.randn(9, 2), padding=1)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert tensors[which].grad.is_contiguous(memory_format=torch.channels_last)


def test_non_contiguous_input_and_gradient(case):
    _, weight, offsets, bias = (tensor.detach() for tensor in case)
    strided = torch.randn(2, 4, 10, 8, dtype=torch.float64)[:, :, ::2, ::2].requires_grad_()
    expanded = torch.ones((), dtype=torch.float64).expand(2, 6, 2, 3)
    results = []
    for source in (strided, strided.detach().contiguous().requires_grad_()):
        output = acu_conv2d(source, weight, offsets, bias, **GEOMETRY)
        results.append([output, *torch.autograd.grad(output, source, expanded)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


def test_meta_tensors_give_shapes():
    output = acu_conv2d(
        torch.empty(2, 4, 9, 8, device="meta"), torch.empty(6, 4, 3, 3, device="meta"), torch.empty(9, 2, device="meta")
    )
    assert output.shape == (2, 6, 7, 6)


def test_flop_counter_counts_a_convolution_of_k_taps():
    input, weight = torch.randn(2, 4, 9, 8, requires_grad=True), torch.randn(6, 4, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as plain:
        F.conv2d(input, weight, padding=1).sum().backward()
    with FlopCounterMode(display=False) as active:
        acu_conv2d(input, weight, torch.zeros(9, 2), padding=1).sum().backward()
    assert active.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.slow
def test_the_operator_needs_neither_lightning_nor_timm():
    code = "import sys, lightning_acu, lightning_acu.ops, lightning_acu.functional; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert {"lightning", "timm", "torchvision", "matplotlib", "rich"}.isdisjoint(loaded)
