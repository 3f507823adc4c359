"""Random calls of the operator for scripts/stress_op.py: each equals the oracle or raises an error that is clear.

`stress(seed)` does the call of a number, always the same, and raises an AssertionError where it is wrong. Exact results
are those of `fast_oracle.py`, which shares no code with the package.
"""

import contextlib
import random
import threading

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_acu import ACUConv2d, acu_conv2d

from .fast_oracle import NAMES, Case, case, rounding_bounds
from .stress_memory import arrange, free

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
        assert any(part in str(error) for part in parts), f"unclear {type(error).__name__}: {error}"
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


def values(dice, seed, dtype=None):
    """The output and the gradients that are asked for, in any memory and under anything that may intervene."""
    one, backend = drawn(dice, seed, dtype)
    form, around = dice.choice(FORMS), dice.choice(list(AROUND))
    # (Torch's anomaly mode stops for good where two threads begin with it at once.)
    how = dice.choice(("autograd", "autograd", "autograd", "checkpoint", "thread", "subclass", "inference", "twice"))
    leaves = leaves_of(one)
    expected = exact(one)
    if how == "inference":
        with torch.inference_mode(), AROUND[around]():
            inside = [t if t is None or dice.random() < 0.5 else t.clone() for t in leaves]
            check({"output": call(one, inside, backend, form)}, expected, likes(one))
        return f"{backend}, {how}, {around}"
    if how == "subclass":
        leaves = [t if t is None else t.detach().as_subclass(Subclass).requires_grad_(t.requires_grad) for t in leaves]
    with AROUND[around]():
        if how == "checkpoint":
            output = checkpoint(lambda *given: call(one, given, backend, form), *leaves, use_reentrant=False)
        elif how == "thread" and around != "anomaly":
            outputs = []
            threads = [
                threading.Thread(target=lambda: outputs.append(call(one, leaves, backend, form))) for _ in "ab"
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(outputs) == 2, "a thread failed"
            output = outputs[1]
        else:
            output = call(one, leaves, backend, form)
        if how == "twice":
            first = gradients(one, output, leaves, retain_graph=True)
            check(first, expected, likes(one))
        check(gradients(one, output, leaves), expected, likes(one))
    return f"{backend}, {how}, {around}"


def half(dice, seed):
    """bfloat16 and float16: computed in them, or by autocast from a mixture of dtypes."""
    dtype = dice.choice(HALF)
    if dice.random() < 0.6:
        return values(dice, seed, dtype)
    one, backend = drawn(dice, seed, torch.float32)
    given = list(one.tensors)
    for at in (0, 1, 3):
        if given[at] is not None and dice.random() < 0.5:
            given[at] = given[at].to(dice.choice((*HALF, torch.float64 if at else torch.float16)))
    leaves = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(given, one.needs, strict=True)]
    direction = one.direction.to(dtype)
    rounded = [t if t is None or at == 2 else t.to(dtype) for at, t in enumerate(given)]
    one = Case(rounded, one.arguments, one.sides, direction, one.needs)
    with torch.autocast("cpu", dtype):
        output = call(one, leaves, backend, dice.choice(("function", "batchless", "2-D offsets")))
    check(gradients(one, output, leaves), exact(one), dict(zip(NAMES, [direction, *given], strict=True)))
    return f"{backend}, autocast"


def layer(dice, seed):
    """ACUConv2d: padding by name and in every mode, the fixed tap, batchless images, functional_call."""
    dtype = dice.choice((torch.float32, torch.float64, *HALF))
    one, backend = drawn(dice, seed, dtype, batch=dice.choice((1, 2)), stride=dice.choice(((1, 1), (1, 1), (2, 1))))
    input, weight, offsets, bias = one.tensors
    mode = dice.choice(("zeros", "reflect", "replicate", "circular"))
    sides = (one.sides[1], one.sides[1], one.sides[0], one.sides[0])
    padding = one.sides[:2]
    if mode == "zeros":
        padding = one.arguments["padding"]
    elif isinstance(one.arguments["padding"], str):
        top, left, bottom, right = one.sides
        padding, sides = "same", (left, right, top, bottom)
    dilation, dims = one.arguments["dilation"], (weight.shape[1] * one.arguments["groups"], len(weight))
    if min(dilation) < 1 or len(one.arguments["padding"]) == 4 and padding != "same":
        return values(dice, seed, dtype)  # what nn.Conv2d does not have
    convolution = ACUConv2d(
        *dims, tuple(weight.shape[2:]), one.arguments["stride"], padding, dilation, one.arguments["groups"],
        bias is not None, mode, dtype=dtype, position_groups=len(offsets), backend=backend,
        fixed_centre=dice.random() < 0.7,
    )  # fmt: skip
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    offsets = offsets.to(kept).clone()
    state = {"weight": weight, "offsets": offsets.flatten(), "bias": bias}
    if convolution.fixed_tap is not None:
        offsets[:, convolution.fixed_tap] = 0
    state = {name: t.detach().clone().requires_grad_() for name, t in state.items() if t is not None}
    image = input.detach().requires_grad_()

    padded, pulled = input.detach().double(), None
    one = Case([input, weight, offsets, bias], dict(one.arguments), one.sides, one.direction, [True] * 4)
    if mode != "zeros":
        try:
            padded, pulled = torch.func.vjp(lambda x: F.pad(x, sides, mode=mode), padded)
        except RuntimeError:  # reflection of fewer pixels than are asked for
            with refusing("adding", "size", "imension", "shape"):
                functional_call(convolution, state, (image,))
            return "layer, refused by F.pad"
        one.tensors[0], one.sides = padded.to(dtype), (0, 0, 0, 0)
        size = functional_call(convolution, state, (image,)).shape
        if size != one.direction.shape:
            one.direction = torch.randn(size, dtype=dtype)
    expected = exact(one)
    if pulled is not None:
        expected["input"] = tuple(pulled(t.reshape(padded.shape))[0].abs() if n else pulled(t)[0]
                                  for n, t in enumerate(expected["input"]))
    expected["offsets"] = tuple(t.clone().flatten() for t in expected["offsets"])
    if convolution.fixed_tap is not None:
        expected["offsets"][0].view(offsets.shape)[:, convolution.fixed_tap] = 0
    shaped = likes(one) | {"input": input, "offsets": offsets.flatten()}
    if dice.random() < 0.3:
        def loss(tensors, x):
            return (functional_call(convolution, tensors, (x,)) * one.direction).double().sum()

        found, found_input = grad(loss, (0, 1))({n: t.detach() for n, t in state.items()}, image.detach())
        actual = found | {"input": found_input}
    else:
        output = functional_call(convolution, state, (image[0] if len(image) == 1 else image,))
        output = output[None] if output.ndim == 3 else output
        grads = torch.autograd.grad(output, [image, *state.values()], one.direction)
        actual = {"output": output, **dict(zip(["input", *state], grads, strict=True))}
    check(actual, expected, shaped)
    return f"layer, {mode}"


def transform(dice, seed):
    """torch.func in float64: what autograd gives, or an error that names the backend that can do it."""
    one, backend = drawn(dice, seed, torch.float64, small=True)
    one.needs = [True] * 4
    one.tensors[2] = one.tensors[2].double()
    given = {n: t.detach() for n, t in zip(ARGUMENTS, one.tensors, strict=True) if t is not None}
    expected, direction, how = exact(one), one.direction.clone(), dice.choice(list(TRANSFORMS))

    def function(tensors):
        return call(one, [tensors.get(name) for name in ARGUMENTS], backend)

    actual = TRANSFORMS[how](function, given, direction, dice, backend)
    if actual is not None:
        check(actual, expected, likes(one))
    return f"{backend}, {how}"


def _of_each_image(function, given, direction, dice, backend):
    images = given["input"][:, None]
    rest = {name: t for name, t in given.items() if name != "input"}

    def loss(tensors, image, towards):
        return (function(tensors | {"input": image}) * towards).sum()

    if not len(images):
        return None
    each = vmap(grad(loss, (0, 1)), (None, 0, 0))(rest, images, direction[:, None])
    return {name: t.sum(0) for name, t in each[0].items()} | {"input": each[1][:, 0]}


def _jacobian(function, given, direction, dice, backend):
    name = dice.choice(list(given))
    rows = direction.flatten().narrow(0, 0, min(direction.numel(), 40))
    weights = torch.zeros_like(direction).flatten()
    weights[: len(rows)] = rows

    def some(tensor):
        return (function(given | {name: tensor}) * direction).flatten()[: len(rows)]

    def rest(tensor):
        return (function(given | {name: tensor}) * direction).flatten()[len(rows) :].sum()

    return {name: jacrev(some)(given[name]).sum(0) + grad(rest)(given[name])}


def _batched_gradients(function, given, direction, dice, backend):
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    grads = torch.autograd.grad(
        function(leaves), list(leaves.values()), torch.stack([direction * 3, -direction * 2]), is_grads_batched=True
    )
    return {name: g.sum(0) for name, g in zip(leaves, grads, strict=True)}


def _mapped(function, given, direction, dice, backend):
    name, dim = dice.choice(list(given)), dice.choice((0, -1))
    many = vmap(lambda t: function(given | {name: t}), dim, dim)(torch.stack([given[name]] * 2, dim))
    return {"output": many.select(dim, 1)}


def _forward_mode(function, given, direction, dice, backend):
    given = {name: t.clone(memory_format=torch.contiguous_format) for name, t in given.items()}  # as tangents are
    tangents = {name: torch.randn_like(t, memory_format=torch.contiguous_format) for name, t in given.items()}
    if backend != "reference":
        with refusing("use backend='reference' for jvp"):
            if dice.random() < 0.5:
                jvp(function, (given,), (tangents,))
            else:
                with forward_ad.dual_level():
                    function({n: forward_ad.make_dual(t, tangents[n]) for n, t in given.items()})
        return None
    output, pushed = jvp(function, (given,), (tangents,))
    (grads,) = vjp(function, given)[1](direction)
    there, back = (pushed * direction).sum(), sum((grads[n] * tangents[n]).sum() for n in given)
    scale = (pushed * direction).abs().sum() + 1
    assert (there - back).abs() <= 1e-9 * scale, f"jvp {there} and vjp {back} differ"
    return {"output": output}


def _second_derivative(function, given, direction, dice, backend):
    def twice():
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        output = function(leaves)
        grads = torch.autograd.grad(output, list(leaves.values()), direction, create_graph=True)
        found = torch.autograd.grad(sum(g.sum() for g in grads), leaves["weight"], allow_unused=True)
        return {"output": output, **dict(zip(leaves, grads, strict=True))}, found

    if backend == "reference":
        return twice()[0]
    with refusing("no second derivative"):
        twice()
    return None


def _gradient(function, given, direction, dice, backend):
    return grad(lambda tensors: (function(tensors) * direction).sum())(given)


def _pullback(function, given, direction, dice, backend):
    output, pull = vjp(function, given)
    return pull(direction)[0] | {"output": output}


TRANSFORMS = {
    "grad": _gradient,
    "vjp": _pullback,
    "vmap(grad)": _of_each_image,
    "jacrev": _jacobian,
    "batched gradients": _batched_gradients,
    "vmap": _mapped,
    "jvp": _forward_mode,
    "second derivative": _second_derivative,
}


def freed(dice, seed):
    """Memory that was freed before the forward or the backward pass: an error, and nothing is read."""
    one, backend = drawn(dice, seed, dice.choice((torch.float32, torch.float64, *HALF)), batch=dice.choice((1, 2)))
    one.tensors = [None if t is None else t.detach().clone() for t in one.tensors]
    one.direction = one.direction.detach().clone()
    leaves = [None if t is None else t.requires_grad_(n) for t, n in zip(one.tensors, one.needs, strict=True)]
    around = dice.choice([name for name in AROUND if name != "saved tensor hooks"])
    autocast = torch.autocast("cpu", enabled=dice.random() < 0.3)
    said = "was freed", "out of bounds", "not allocated"
    if dice.random() < 0.3 and any(one.needs[:3]) and backend != "reference":
        output = call(one, leaves, backend, dice.choice(FORMS))
        saved = [t for t in (*leaves[:3], one.direction) if t is not None]
        free(dice, dice.choice(saved))
        if not output.requires_grad:
            return "freed, nothing left to do"
        with AROUND[around](), refusing(*said):
            gradients(one, output, leaves)
        return f"freed before backward, {backend}"
    free(dice, dice.choice([t for t in leaves if t is not None]))
    how = dice.choice(("plain", "plain", "subclass", "vmap", "grad"))
    with AROUND[around](), autocast, refusing(*said):
        if how == "vmap":
            vmap(lambda image: call(one, [image[None], *leaves[1:]], backend))(leaves[0])
        elif how == "grad":
            grad(lambda image: call(one, [image, *leaves[1:]], backend).sum())(leaves[0])
        else:
            if how == "subclass":
                leaves = [None if t is None else t.detach().as_subclass(Subclass) for t in leaves]
            call(one, leaves, backend, "function" if autocast._enabled else dice.choice(FORMS))
    return f"freed, {backend}, {how}"


def shapes_only(dice, seed):
    """On the meta device: the shapes, dtypes and strides of real results."""
    dtype = dice.choice((torch.float32, torch.float64, *HALF))
    one, backend = drawn(dice, seed, dtype, backend=dice.choice(("auto", "cython", "dense")))
    one.tensors = [None if t is None else t.detach().clone() for t in one.tensors]
    form = dice.choice(FORMS)
    real = leaves_of(one)
    meta = [None if t is None else t.detach().to("meta").requires_grad_(t.requires_grad) for t in real]
    found = gradients(one, call(one, real, backend, form), real)
    one.direction = one.direction.to("meta")
    described = gradients(one, call(one, meta, backend, form), meta)
    for name, tensor in found.items():
        like = described[name]
        assert like.is_meta
        assert (like.shape, like.dtype) == (tensor.shape, tensor.dtype), name
        strides = [t.stride(axis) for t in (like, tensor) for axis, n in enumerate(tensor.shape) if n > 1]
        half = len(strides) // 2
        assert 0 in tensor.shape or strides[:half] == strides[half:], f"{name}: {like.stride()}, {tensor.stride()}"
    return "meta"


def written_between(dice, seed):
    """An argument that is changed between forward and backward: torch's error, as for its own functions."""
    backend = dice.choice(("auto", "cython", "dense"))  # (the formula need not keep its arguments themselves)
    one, backend = drawn(dice, seed, torch.float64, backend, batch=2, small=True)
    one.needs, one.tensors = [True] * 4, [None if t is None else t.detach().clone() for t in one.tensors]
    leaves = leaves_of(one)
    copies = [None if t is None else t * 1 for t in leaves]
    output = call(one, copies, backend, dice.choice(("function", "operator", "2-D offsets")))
    copies[dice.randrange(2)].add_(1)
    with refusing("modified by an inplace operation"):
        gradients(one, output, leaves)
    return "written between"


# ---- What must be refused.


def _shape(dice, tensor):
    how = dice.choice(("fewer dimensions", "more dimensions", "larger"))
    if how == "fewer dimensions":
        return tensor.flatten() if tensor.ndim > 1 else tensor.sum()
    if how == "more dimensions":
        return tensor[None] if tensor.ndim != 3 else tensor[None, None]
    return torch.cat([tensor, tensor[:, :1]], 1) if tensor.shape[1] else tensor[None, None]


#: How to spoil a tensor: what no convolution takes. Each is refused under the name of the argument.
SPOILT = {
    "None": lambda t: None,
    "array": lambda t: t.detach().double().numpy(force=True),
    "list": lambda t: t.detach().tolist(),
    "int64": lambda t: t.detach().long(),
    "bool": lambda t: t.detach().bool(),
    "complex64": lambda t: t.detach().to(torch.complex64),
    "conjugate": lambda t: t.detach().to(torch.complex128).conj(),
    "float8_e4m3fn": lambda t: t.detach().to(torch.float8_e4m3fn),
    "uint4": lambda t: torch.empty(t.shape, dtype=torch.uint4),
    "meta": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().float().to_sparse(),
    "mkldnn": lambda t: t.detach().float().contiguous().to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.detach(), t.detach()], layout=torch.jagged),
    "another dtype": lambda t: t.detach().to(torch.float32 if t.dtype == torch.float64 else torch.float64),
}
NUMBERS = {
    "stride": (0, -1, (1, 0), (1, 2, 3), (), 2**40, 2**63, 1.5, "2", None, True, (1, 2.5), torch.ones(2), [[1], 1]),
    "padding": (-1, (0, -1), (1, 2, 3), (1,) * 5, (), 2**20, 2**70, 1.5, "SAME", "full", None, True, [[1], 1]),
    "dilation": (-1, (1, -1), (1, 2, 3), (), 2**20, 2**64, 0.5, "1", None, False),
    "groups": (0, -1, 2**20, 2**63, 1.5, "1", None, True, (1, 2), 10_007),
    "backend": ("cuda", "", "Cython", None, 0, ("cython",), ["auto"], b"auto"),
}


def invalid(dice, seed):
    """One wrong argument: an error that names it."""
    one, backend = drawn(dice, seed, dice.choice((torch.float32, torch.float64)), small=True, batch=dice.choice((1, 2)))
    one.tensors = [None if t is None else t.detach().clone() for t in one.tensors]
    given = {n: t.requires_grad_(dice.random() < 0.5) for n, t in zip(ARGUMENTS, one.tensors, strict=True) if t is not None}
    arguments = {**given, **one.arguments, "backend": backend}
    kind = dice.choice(("number", "tensor", "shape"))
    if kind == "number":
        name = dice.choice(list(NUMBERS))
        arguments[name] = value = dice.choice(NUMBERS[name])
        if name == "stride" and arguments["padding"] == "same":
            arguments["padding"] = 0
        words = f"`{name}`", f"`{name}`s"
    else:
        name = dice.choice(list(given))
        value = dice.choice(list(SPOILT)) if kind == "tensor" else "shape"
        if name == "bias" and value in ("None", "shape") or name == "offsets" and value == "another dtype":
            return "invalid, but not this"
        arguments[name] = SPOILT[value](given[name]) if kind == "tensor" else _shape(dice, given[name])
        words = (f"`{name}`",)
    autocast = dice.random() < 0.1 and value != "another dtype"
    with torch.autocast("cpu", enabled=autocast), refusing(*words):
        acu_conv2d(**arguments)
    return f"invalid {name}: {value}" if kind == "tensor" else f"invalid {name}, {kind}"


def edges(dice, seed):
    """Sizes at the edge: no channels, no rows but padding, very wide, far more padding or stride than image, 2**40 images."""
    dtype, backend = dice.choice((torch.float32, torch.float64)), dice.choice(BACKENDS)
    how = dice.choice(("no channels", "no rows", "wide", "padding", "stride", "too many", "reach"))
    kernel, size, sides = (2, 3), (3, 2), (1, 1, 2, 3)  # sides: top, left, bottom, right
    dims, batch, stride, dilation = (4, 6), 2, (1, 1), (1, 1)
    if how == "no channels":
        dims = (0, 6)
    elif how == "no rows":
        size, sides = dice.choice(((0, 4), (3, 0), (0, 0))), (3, 2, 1, 2)
    elif how == "wide":
        size = dice.choice(((1, 3000), (3000, 1)))
    elif how == "padding":
        sides = tuple(dice.choice(few) for few in ((0, 1, 70), (1, 70), (0, 1, 70), (0, 1, 70)))
    elif how == "stride":
        stride = dice.choice(((2**40 - 1, 1), (50, 2**39)))
    elif how == "reach":
        dilation, sides = (30, 17), (15, 17, 16, 18)
    positions = dice.choice((1, 2, 6))
    input = torch.randn(batch, dims[0], *size, dtype=dtype)
    weight, bias = torch.randn(dims[1], dims[0], *kernel, dtype=dtype), torch.randn(dims[1], dtype=dtype)
    offsets = torch.randn(positions, 6, 2, dtype=dtype) * 2
    top, left, bottom, right = sides
    arguments = {"stride": stride, "padding": (left, right, top, bottom), "dilation": dilation, "groups": 1}
    if how == "too many":
        with refusing("memory", "too large", "overflow", "invalid"):
            acu_conv2d(input[:1].expand(2**dice.choice((45, 50, 55)), -1, -1, -1), weight, offsets, bias,
                       backend=backend, **arguments)
        return "edges, too many images"
    shape = [(size[a] + sides[a] + sides[a + 2] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]
    direction = torch.randn(batch, dims[1], *shape, dtype=dtype)
    one = Case([input, weight, offsets, bias], arguments, sides, direction, [True] * 4)
    leaves = leaves_of(one)
    actual = gradients(one, call(one, leaves, backend), leaves)
    if how == "no channels":
        torch.testing.assert_close(actual["output"].detach(), bias[:, None, None].expand_as(direction))
        torch.testing.assert_close(actual["bias"], direction.sum((0, 2, 3)))
        assert not any(actual[name].any() for name in ("input", "weight", "offsets"))
    else:
        check(actual, exact(one), likes(one))
    return f"edges, {how}, {backend}"


#: What is tried, and how often.
KINDS = {
    values: 38, half: 12, layer: 10, transform: 12, freed: 10, shapes_only: 4, invalid: 9, edges: 4, written_between: 1
}  # fmt: skip


def stress(seed, kind=None):
    """Do the call of a number; says of what kind it was. ``kind``: the name of a function above, to choose it.

    Raises:
        AssertionError: a wrong result, an error where there should be none, none where there should be one.
    """
    dice = random.Random(f"stress {seed}")
    torch.manual_seed(seed)
    kinds = {function.__name__: function for function in KINDS}
    chosen = kinds[kind] if kind else dice.choices(list(KINDS), list(KINDS.values()))[0]
    try:
        return f"{chosen.__name__}: {chosen(dice, seed)}"
    except AssertionError as error:
        raise AssertionError(f"{chosen.__name__}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{chosen.__name__}: {type(error).__name__}: {error}") from error
