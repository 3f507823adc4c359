"""The Triton backend inside torch: operator checks, torch.compile, CUDA graphs, autocast, DistributedDataParallel."""

import os

import pytest
import torch
from helpers.triton_cases import DEVICE

from lightning_acu import ACUConv2d, acu_conv2d

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tensors(c_in=3, c_out=4, size=(5, 4), groups=1, seed=0):
    """Input, weight, offsets off the lattice, bias; on the device, with gradients."""
    torch.manual_seed(seed)
    offsets = torch.randint(-1, 2, (1, 6, 2)) + torch.rand(1, 6, 2) * 0.6 + 0.2
    made = torch.randn(2, c_in, *size), torch.randn(c_out, c_in // groups, 3, 2), offsets, torch.randn(c_out)
    return [t.to(DEVICE).requires_grad_() for t in made]


def make_layer(seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = ACUConv2d(3, 4, 3, padding=1, **kwargs).to(DEVICE)
    layer.backend = "triton"
    with torch.no_grad():
        layer.offsets.uniform_(-1, 1)
    return layer


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own
@pytest.mark.parametrize(("groups", "stride"), [(1, [1, 1]), (3, [2, 1])])
def test_opcheck(groups, stride):
    input, weight, offsets, bias = tensors(c_in=3, c_out=3, groups=groups)
    arguments = (input, weight, offsets, bias, stride, [1, 0, 1, 0], [1, 1], groups, "triton")
    torch.library.opcheck(torch.ops.lightning_acu.acu_conv2d.default, arguments)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (1, 2), (3, 1)])
def test_gradcheck(groups, stride):
    """In float32, so with the tolerances of differences of 1/100."""
    given = tensors(c_in=3, c_out=3, size=(4, 3), groups=groups)

    def call(*tensors):
        return acu_conv2d(*tensors, stride=stride, padding=1, groups=groups, backend="triton")

    with pytest.warns(UserWarning, match="not a double precision"):
        assert torch.autograd.gradcheck(call, given, eps=1e-2, atol=5e-3, rtol=1e-2, nondet_tol=0.0, fast_mode=True)


def test_compiled_in_one_graph():
    layer, image = make_layer(), torch.randn(2, 3, 6, 5, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True)
    for found, expected in zip(gradients(compiled, image), gradients(layer, image), strict=True):
        torch.testing.assert_close(found, expected)


def gradients(layer, image):
    image = image.clone().requires_grad_()
    output = layer(image)
    return output, *torch.autograd.grad(output.square().sum(), (image, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])  # wrong in the interpreter
def test_autocast_leaves_positions_in_float32(dtype):
    layer, image = make_layer(), torch.randn(2, 3, 6, 5, device=DEVICE)
    exact = gradients(layer, image)
    with torch.autocast(DEVICE, dtype):
        output, *grads = gradients(layer, image)
    assert output.dtype == dtype
    assert [grad.dtype for grad in grads] == [torch.float32] * 4
    for found, expected in zip((output, *grads), exact, strict=True):
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 4 * torch.finfo(dtype).eps


@gpu
def test_a_cuda_graph_replays_with_positions_that_moved():
    layer = ACUConv2d(64, 32, 3, padding=1, device=DEVICE)
    layer.backend = "triton"
    image = torch.randn(4, 64, 9, 11, device=DEVICE, requires_grad=True)

    def step():
        output = layer(image)
        return output, *torch.autograd.grad(output.square().sum(), (image, *layer.parameters()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [tensor.detach() for tensor in step()]  # without its autograd nodes, which remember the stream
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            layer.offsets.uniform_(-1.5, 1.5)
            image.normal_()
        graph.replay()
        for found, expected in zip(captured, step(), strict=True):
            assert torch.equal(found, expected)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_call_waits_for_the_gpu():
    layer, image = make_layer(), torch.randn(2, 3, 6, 5, device=DEVICE)
    gradients(layer, image)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradients(layer, image)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        layer, image = make_layer(), torch.randn(2, 3, 6, 5, device=DEVICE)
        expected = gradients(layer, image)
        wrapped = torch.nn.parallel.DistributedDataParallel(layer)
        for _ in range(2):
            layer.zero_grad()
            wrapped(image).square().sum().backward()
        for parameter, grad in zip(layer.parameters(), expected[2:], strict=True):
            torch.testing.assert_close(parameter.grad, grad)
    finally:
        torch.distributed.destroy_process_group()
