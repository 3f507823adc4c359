"""Random calls of the operator for scripts/stress_op.py: each equals the oracle or raises an error that is clear.

`stress(seed)` does the call of a number, always the same, and raises an AssertionError where it is wrong. Exact results
are those of `fast_oracle.py`, which shares no code with the package.
"""

import random
import threading

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

from lightning_acu import ACUConv2d, acu_conv2d

from .fast_oracle import NAMES, Case
from .stress_calls import (
    AROUND,
    BACKENDS,
    FORMS,
    HALF,
    Subclass,
    call,
    check,
    drawn,
    exact,
    gradients,
    leaves_of,
    likes,
    refusing,
)
from .stress_errors import freed, invalid, written_between
from .stress_transforms import transform


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
            threads = [threading.Thread(target=lambda: outputs.append(call(one, leaves, backend, form))) for _ in "ab"]
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
    if min(dilation) < 1 or (len(one.arguments["padding"]) == 4 and padding != "same"):
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
        expected["input"] = tuple(
            pulled(t.reshape(padded.shape))[0].abs() if n else pulled(t)[0] for n, t in enumerate(expected["input"])
        )
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


def edges(dice, seed):
    """Sizes at the edge: no channels, no rows but padding, much padding or stride, 2**40 images."""
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
            acu_conv2d(
                input[:1].expand(2 ** dice.choice((45, 50, 55)), -1, -1, -1),
                weight,
                offsets,
                bias,
                backend=backend,
                **arguments,
            )
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
