"""What stress cases share: cases in random memory, ways to call the operator, the comparison with the oracle."""

import contextlib

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lightning_acu import acu_conv2d

from .fast_oracle import NAMES, Case, case, rounding_bounds
from .stress_memory import arrange

BACKENDS = ("auto", "auto", "cython", "cython", "cython", "dense", "dense", "reference")
HALF = (torch.bfloat16, torch.float16)
ARGUMENTS = NAMES[1:]


class Subclass(torch.Tensor):
    """A tensor subclass without anything of its own."""


# ---- What is exact, and how near to it results must be.


def exact(one):
    """{name: (expected, bound)} of a case, in float64; precision is that of its tensors."""
    double = Case(
        [None if t is None else _double(t) for t in one.tensors],
        one.arguments, one.sides, _double(one.direction), one.needs,
    )  # fmt: skip
    input, weight, offsets, _ = one.tensors
    precision = max(torch.finfo(t.dtype).eps for t in (input, weight, offsets))
    sizes = weight.shape, one.direction.shape, one.arguments["groups"], len(offsets)
    bounds = rounding_bounds(double.oracle(magnitude=True), *sizes, precision)
    results = zip(double.oracle(), bounds, strict=True)
    return {n: tuple(map(torch.as_tensor, pair)) for n, pair in zip(NAMES, results, strict=True)}


def _double(tensor):
    return tensor.detach().resolve_neg().double()


def check(actual, expected, likes):
    """Results {name: tensor} against `exact`; `likes` have their shapes and dtypes."""
    for name, value in actual.items():
        (right, bound), like = expected[name], likes[name]
        assert (value.shape, value.dtype) == (like.shape, like.dtype), f"{name}: {value.shape} {value.dtype}"
        error = (value.detach().as_subclass(torch.Tensor).double() - right).abs()
        # Beyond the smallest normal number of float16, precision ends.
        wrong = ~(error <= bound + torch.finfo(value.dtype).tiny)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} numbers of {name} are wrong by {error.max():g}"


def likes(one):
    return dict(zip(NAMES, [one.direction, *one.tensors], strict=True))


@contextlib.contextmanager
def refusing(*parts, kinds=(RuntimeError, TypeError, ValueError)):
    """The error that must be raised, and what one of the parts of its message must be."""
    try:
        yield
    except kinds as error:
        if not any(part in str(error) for part in parts):
            raise AssertionError(f"unclear {type(error).__name__}: {error}") from error
    else:
        raise AssertionError(f"no error, expected one about {' or '.join(parts)}")


# ---- Calls.


def drawn(dice, seed, dtype=None, backend=None, **fixed):
    """(case in random memory, backend)."""
    backend = backend or dice.choice(BACKENDS)
    small = fixed.pop("small", dice.random() < 0.5) or backend == "reference"
    one = case(seed, small=small, **fixed | ({} if dtype is None else {"dtype": dtype}))
    if dtype is not None:
        one.tensors[2] = one.tensors[2].to(dice.choice((torch.float32, torch.float64)))
    one.tensors = [None if t is None else arrange(dice, t) for t in one.tensors]
    one.direction = arrange(dice, one.direction)
    return one, backend


def call(one, leaves, backend, form="function"):
    """The output; "operator" is what compiled graphs call, "batchless" what a single image is given to."""
    input, weight, offsets, bias = leaves
    if form == "operator" and backend != "reference":
        a = one.arguments
        return torch.ops.lightning_acu.acu_conv2d(
            input, weight, offsets, bias, list(a["stride"]), list(one.sides), list(a["dilation"]), a["groups"], backend
        )
    if form == "batchless" and len(input) == 1:
        return acu_conv2d(input[0], weight, offsets, bias, **one.arguments, backend=backend)[None]
    if form == "2-D offsets" and len(offsets) == 1:
        offsets = offsets[0]
    return acu_conv2d(input, weight, offsets, bias, **one.arguments, backend=backend)


def leaves_of(one):
    given = [None if t is None else t.detach() for t in one.tensors]
    return [t if t is None else t.requires_grad_(n) for t, n in zip(given, one.needs, strict=True)]


def gradients(one, output, leaves, **how):
    wanted = {name: t for name, t in zip(ARGUMENTS, leaves, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), one.direction, **how) if wanted else ()
    return {"output": output, **dict(zip(wanted, grads, strict=True))}


FORMS = ("function", "function", "function", "operator", "batchless", "2-D offsets")
AROUND = {
    "nothing": contextlib.nullcontext,
    "nothing special": contextlib.nullcontext,
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    "a default device": lambda: torch.device("meta"),
    "flop counter": lambda: FlopCounterMode(display=False),
    "dual level": forward_ad.dual_level,
}
