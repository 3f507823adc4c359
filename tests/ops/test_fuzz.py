"""Random cases of the fast backends against `fast_oracle.py`: `case(seed)` is the case that a failure names."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fast_oracle import NAMES, acu_conv2d_closed_form, rounding_bounds
from oracle import acu_conv2d_loops
from torchvision.ops import deform_conv2d

from lightning_acu import acu_conv2d
from lightning_acu.ops import available_backends

SMALL, LARGE = (1, 2, 3, 5, 7, 8, 12), (16, 17, 31, 33, 40, 48, 64, 65)  # channels
KERNELS = ((1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (1, 4), (3, 2), (2, 2), (5, 1), (4, 3))
WORK = 40_000  # multiply-adds of a case, at most, while its image may still shrink
WITH_CYTHON = ["dense", "cython"] if "cython" in available_backends() else ["dense"]
CHUNKS = [pytest.param("dense", range(300), id="dense")]
if "cython" in available_backends():
    CHUNKS += [pytest.param("cython", range(i, i + 500), id=f"cython-{i}") for i in range(0, 10_000, 500)]


@dataclass
class Case:
    """Arguments of one call, the gradient that comes back into it, and which gradients are asked for."""

    tensors: list  # input, weight, offsets, bias or None
    arguments: dict
    corner: tuple  # padding at the top and the left
    direction: torch.Tensor
    needs: list

    def __str__(self):
        named = zip(("input", "weight", "offsets", "bias", "gradient"), [*self.tensors, self.direction], strict=True)
        tensors = [f"{name} {tuple(t.shape)} {t.stride()} {t.dtype}" for name, t in named if t is not None]
        return ", ".join(
            [*tensors, *(f"{key}={value}" for key, value in self.arguments.items()), f"needs {self.needs}"]
        )

    def run(self, backend):
        """Output and gradients, by name; no entry for a gradient that is not asked for."""
        leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(self.tensors, self.needs)]  # noqa: B905
        output = acu_conv2d(*leaves, **self.arguments, backend=backend)
        wanted = {name: leaf for name, leaf in zip(NAMES[1:], leaves, strict=True) if leaf is not None}
        wanted = {name: leaf for name, leaf in wanted.items() if leaf.requires_grad}
        grads = torch.autograd.grad(output, list(wanted.values()), self.direction) if wanted else ()
        return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}

    def oracle(self, magnitude=False, **changed):
        input, weight, offsets, bias = self.tensors
        arrays = {"input": input, "weight": weight, "offsets": offsets, "grad": self.direction}
        arrays["bias"] = weight.new_zeros(len(weight)) if bias is None else bias
        geometry = {key: self.arguments[key] for key in ("stride", "dilation", "groups")} | {"corner": self.corner}
        arrays["offsets"] = offsets.reshape(-1, *offsets.shape[-2:])
        return acu_conv2d_closed_form(**(arrays | geometry | changed), magnitude=magnitude)

    def errors(self, actual, where=True):
        """What is wrong with `actual`, the output and gradients of a backend; the output is compared at `where`."""
        input, weight, offsets, _ = self.tensors
        epsilon = max(
            torch.finfo(input.dtype).eps, torch.finfo(offsets.dtype).eps
        )  # fractions are in the offsets' dtype
        positions = offsets.shape[0] if offsets.ndim == 3 else 1
        bounds = rounding_bounds(
            self.oracle(magnitude=True),
            weight.shape,
            self.direction.shape,
            self.arguments["groups"],
            positions,
            epsilon,
        )
        for name, expected, bound, like in zip(NAMES, self.oracle(), bounds, [self.direction, *self.tensors]):  # noqa: B905
            if name not in actual:
                continue
            found = actual[name]
            if like is not None and (found.shape != like.shape or found.dtype != like.dtype):
                return f"{name} is {tuple(found.shape)} {found.dtype}"
            off = ~(np.abs(found.double().numpy().reshape(expected.shape) - expected) <= bound)  # NaN is off, too
            off &= where if name == "output" else True
            if off.any():
                at = tuple(np.argwhere(off)[0])
                value = found.reshape(expected.shape)[at]
                return f"{off.sum()} of {off.size} {name} wrong, [{at}] {value} not {expected[at]} +- {bound[at]:.1e}"
        return None


def case(seed, kinds=("zero", "whole", "partly whole", "small", "hairline", "wide", "far"), **fixed):
    """The random case of this seed; `fixed` sizes replace drawn ones."""
    dice, values = random.Random(seed), np.random.default_rng(seed)
    kernel, stride = dice.choice(KERNELS), tuple(dice.choice((1, 1, 1, 2, 3)) for _ in "yx")
    dilation = tuple(dice.choice((0, 1, 1, 1, 2, 3)) for _ in "yx")
    style = dice.choice(("full", "full", "grouped", "depthwise", "doubled"))
    a, b = (dice.choice(LARGE if dice.random() < 0.1 else SMALL) for _ in "ab")
    split = dice.choice((2, 3, 4)) if max(a, b) < 16 else 2
    kind_channels = {"full": (a, b, 1), "grouped": (a * split, b * split, split)}
    c_in, c_out, groups = kind_channels.get(style, (a, a * (1 + (style == "doubled")), a))
    c_in, c_out, groups = fixed.get("channels", (c_in, c_out, groups))
    divisors = [p for p in range(1, c_out + 1) if c_out % p == 0]
    positions = dice.choice((1, 1, c_out, dice.choice(divisors)))

    # Sides (top, left, bottom, right), and then an image that the kernel fits on
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    sides, padding = (lambda y, x: (y, x, y, x))(*[dice.randint(0, 3) for _ in "yx"]), None
    padding = sides[:2]
    if stride == (1, 1) and dice.random() < 0.4:
        sides, padding = (reach[0] // 2, reach[1] // 2, (reach[0] + 1) // 2, (reach[1] + 1) // 2), "same"
    elif dice.random() < 0.3:
        sides = tuple(dice.randint(0, 3) for _ in range(4))
        padding = (sides[1], sides[3], sides[0], sides[2])
    least = [max(1, reach[axis] + 1 - sides[axis] - sides[axis + 2]) for axis in (0, 1)]
    size, batch = [dice.randint(n, max(n, dice.choice((1, 4, 8, 12)))) for n in least], dice.choice((0, *(1, 2, 3) * 4))
    pixels = [(size[i] + sides[i] + sides[i + 2] - reach[i] - 1) // stride[i] + 1 for i in (0, 1)]
    if "size" in fixed:
        size, batch = fixed["size"], fixed["batch"]
