"""The way past the dispatcher: the same numbers, and taken only where nobody could tell."""

import contextlib

import pytest
import torch
from helpers.oracle import GEOMETRY
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_acu import acu_conv2d
from lightning_acu.ops import acu_conv2d_op, op


@pytest.fixture
def calls(monkeypatch):
    """How often the operator itself has been called."""
    count = []

    def counted(*arguments):
        count.append(arguments)
        return acu_conv2d_op(*arguments)

    monkeypatch.setattr(op, "acu_conv2d_op", counted)
    return count


def run(case, backend="auto"):
    return acu_conv2d(*case, **GEOMETRY, backend=backend)


class _Subclass(torch.Tensor):
    pass


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_ordinary_calls_go_past_the_operator(case, calls, context):
    with context():
        run(case)
    with context():
        run([tensor.detach() for tensor in case])
    assert not calls


@pytest.mark.parametrize(("owner", "name"), op._PRIVATE, ids=lambda one: one if isinstance(one, str) else "")
def test_without_torchs_private_functions_every_call_is_the_operators(case, calls, monkeypatch, owner, name):
    expected = torch.autograd.grad(run(case).square().sum(), case)
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        keys = op._undisturbed_keys()
    monkeypatch.setattr(op, "_UNDISTURBED", keys)
    assert not calls
    actual = torch.autograd.grad(run(case).square().sum(), case)
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "context",
    [lambda: FlopCounterMode(display=False), profile, _Mode, forward_ad.dual_level],
    ids=["flop counter", "profiler", "torch function mode", "dual level"],
)
def test_modes_see_the_operator(case, calls, context):
    with context():
        run(case)
    assert len(calls) == 1


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.trace. is deprecated", "ignore::torch.jit.TracerWarning", "ignore:There is a"
)
def test_transforms_and_subclasses_see_the_operator(case, calls):
    input, *rest = (tensor.detach() for tensor in case)
    make_fx(lambda x: run([x, *rest]))(input)
    torch.jit.trace(lambda x: run([x, *rest]), input, check_trace=False)
    torch.func.vmap(lambda x: run([x, *rest]))(input[None])
    run([input.as_subclass(_Subclass), *rest])
    run([input.to("meta"), *(tensor.to("meta") for tensor in rest)])
    assert len(calls) == 5


def test_the_profiler_names_it(case):
    with profile() as seen:
        run(case).sum().backward()
    names = {event.key for event in seen.key_averages()}
    assert {"lightning_acu::acu_conv2d", "lightning_acu::acu_conv2d_backward"} <= names


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # forward_ad's own
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_forward_mode_derivatives_are_refused_and_not_lost(case, index):
    case = [tensor.detach() for tensor in case]
    case[index], direction = torch.randn_like(case[index]), torch.randn_like(case[index])

    def function(tensor, backend="auto"):
        return run([*case[:index], tensor, *case[index + 1 :]], backend)

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend='reference'"):
        function(forward_ad.make_dual(case[index], direction))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.func.jvp(function, (case[index],), (direction,))

    _, actual = torch.func.jvp(lambda tensor: function(tensor, "reference"), (case[index],), (direction,))
    step = 1e-6 * direction
    expected = (function(case[index] + step) - function(case[index] - step)) / 2e-6
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["dense", "cython", "auto"])
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,), (3,), (0, 1, 2, 3)])
def test_numbers_are_those_of_the_operator(case, backend, wanted, calls):
    case = [tensor.detach().requires_grad_(index in wanted) for index, tensor in enumerate(case)]
    leaves = [case[index] for index in wanted]
    results = []
    for context in (contextlib.nullcontext, _Mode):
        with context():
            output = run(case, backend)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_autograd_promises(case):
    output = run(case)
    with torch.no_grad():
        case[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()

    expected = torch.autograd.grad(run(case).square().sum(), case)
    actual = torch.autograd.grad(checkpoint(run, case, use_reentrant=False).square().sum(), case)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))

    (first,) = torch.autograd.grad(run(case).square().sum(), case[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(case):
    input, *rest = (tensor.detach() for tensor in case)
    batches = torch.stack([input, 2 * input, -input])
    mapped = torch.func.vmap(lambda x: run([x, *rest]))(batches)
    for one, batch in zip(mapped, batches, strict=True):
        torch.testing.assert_close(one, run([batch, *rest]))
