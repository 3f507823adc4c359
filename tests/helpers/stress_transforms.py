"""Stress cases of torch.func: what autograd gives, or an error that names the backend that can do it."""

import torch
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

from .stress_calls import ARGUMENTS, call, check, drawn, exact, likes, refusing


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
