"""Stress cases that must be refused: freed memory, wrong arguments, arguments that were overwritten."""

import torch
from torch.func import grad, vmap

from lightning_acu import acu_conv2d

from .stress_calls import (
    ARGUMENTS,
    AROUND,
    FORMS,
    HALF,
    Subclass,
    call,
    drawn,
    gradients,
    leaves_of,
    refusing,
)
from .stress_memory import free


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
    given = {
        n: t.requires_grad_(dice.random() < 0.5) for n, t in zip(ARGUMENTS, one.tensors, strict=True) if t is not None
    }
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
        if (name, value) in (("bias", "None"), ("bias", "shape"), ("offsets", "another dtype")):
            return "invalid, but not this"
        arguments[name] = SPOILT[value](given[name]) if kind == "tensor" else _shape(dice, given[name])
        words = (f"`{name}`",)
    autocast = dice.random() < 0.1 and value != "another dtype"
    with torch.autocast("cpu", enabled=autocast), refusing(*words):
        acu_conv2d(**arguments)
    return f"invalid {name}: {value}" if kind == "tensor" else f"invalid {name}, {kind}"
