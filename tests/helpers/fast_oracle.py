"""Random cases of the operator with their exact results, from a fast oracle that shares no code with the package.

The oracle is the output and its gradients in closed form, in float64 numpy: every tap gathers its 4 integer neighbours
by index, from an image with a row and a column of zeros behind it that stand for everything outside. `test_fuzz.py`
checks the oracle itself, against the explicit loops of `oracle.py` and against torchvision.
"""

import dataclasses
import math
import random

import numpy as np
import torch

from lightning_acu import acu_conv2d

#: The order of all results.
NAMES = ("output", "input", "weight", "offsets", "bias")

SMALL, MANY = (1, 2, 3, 5, 7, 8, 12), (16, 17, 31, 33, 40, 48, 64, 65)  # channels
KERNELS = ((1, 1), (3, 3), (3, 3), (5, 5), (2, 3), (1, 4), (3, 2), (2, 2), (5, 1), (4, 3))
WORK = 600_000  # multiply-adds of a case; images shrink, as far as they can, where it would be more
#: More pixels, columns, output channels and depth than any block of a kernel holds.
LARGE = [
    {"channels": (64, 64, 1), "size": (20, 17), "batch": 3, "positions": 1},
    {"channels": (96, 96, 96), "size": (15, 14), "batch": 2, "positions": 6},
    {"channels": (32, 48, 4), "size": (14, 17), "batch": 2, "positions": 3},
    {"channels": (40, 40, 1), "size": (17, 20), "batch": 2, "positions": 2, "stride": (2, 2)},
    {"channels": (3, 520, 1), "size": (13, 14), "batch": 1, "positions": 2},
    {"channels": (290, 5, 1), "size": (13, 14), "batch": 1, "positions": 1},
]
NEAR = ("zero", "whole", "partly whole", "small", "wide")
KINDS = (*NEAR, "partly whole", "hairline", "far", "far")  # of offsets
LAYOUTS = ("plain", "plain", "plain", "channels_last", "channels_last", "strided", "cropped", "transposed", "expanded")


def acu_conv2d_closed_form(input, weight, offsets, bias, grad, stride, corner, dilation, groups, magnitude=False):
    """[output, and the gradients of input, weight, offsets, bias] as float64 arrays, given the output's gradient.

    Arrays: input (N, C_in, H, W), weight (C_out, C_in/groups, kh, kw), offsets (P, K, 2), bias (C_out,), and grad
    (N, C_out, H_out, W_out), which also says the output size; corner is the padding at (top, left).

    magnitude: absolute values of all arrays instead, with every bilinear weight, and every slope of one, at its largest
    possible magnitude 1. That bounds the sum of |products| behind each result, also where weights are rounded.
    """
    input, weight, bias, grad = (np.asarray(array, np.float64) for array in (input, weight, bias, grad))
    if magnitude:
        input, weight, bias, grad = map(np.abs, (input, weight, bias, grad))
    (batch, _, height, width), (c_out, inputs, kh, kw) = input.shape, weight.shape
    positions, taps, out_height, out_width = len(offsets), kh * kw, *grad.shape[2:]
    samples_per_tap = out_height * out_width * batch

    # Output channels in equal runs that have one convolution group and one position group each.
    runs = math.lcm(groups, positions)
    group, position = np.arange(runs) * groups // runs, np.arange(runs) * positions // runs

    offsets, tap = np.asarray(offsets, np.float64), np.arange(taps)
    start_y, start_x = tap // kw * dilation[0] - corner[0], tap % kw * dilation[1] - corner[1]
    rows, share_y = _neighbours(offsets[..., 0], start_y, stride[0], out_height, height)
    columns, share_x = _neighbours(offsets[..., 1], start_x, stride[1], out_width, width)
    slope = np.array([-1.0, 1.0])  # of the two shares of one axis, by the fraction
    if magnitude:
        share_y, share_x, slope = np.ones_like(share_y), np.ones_like(share_x), np.ones(2)
    share = (share_y[..., :, None] * share_x[..., None, :]).reshape(positions, taps, 1, 4)[position]

    # The 4 neighbours of every tap: (runs, taps, 4, out_height * out_width * batch * inputs)
    image = np.zeros((groups, height + 1, width + 1, batch, inputs))
    image[:, :height, :width] = input.reshape(batch, groups, inputs, height, width).transpose(1, 3, 4, 0, 2)
    pixel = rows[:, :, :, None, :, None] * (width + 1) + columns[:, :, None, :, None, :]
    pixel = pixel[position] + (group * (height + 1) * (width + 1))[:, None, None, None, None, None]
    neighbours = image.reshape(groups * (height + 1) * (width + 1), batch * inputs)[pixel]
    neighbours = neighbours.reshape(runs, taps, 4, samples_per_tap * inputs)

    samples = (share @ neighbours).reshape(runs, taps, samples_per_tap, inputs)
    by_tap = weight.reshape(runs, c_out // runs, inputs, taps).transpose(0, 3, 2, 1)  # (runs, taps, inputs, outputs)
    output = (samples @ by_tap).sum(1).reshape(runs, out_height, out_width, batch, c_out // runs)
    output = output.transpose(3, 0, 4, 1, 2).reshape(grad.shape) + bias[:, None, None]

    # d output = by_tap * d samples + samples * d by_tap,   d samples = share * d neighbours + d share * neighbours
    grad_output = grad.reshape(batch, runs, c_out // runs, out_height * out_width).transpose(1, 3, 0, 2)
    grad_output = grad_output.reshape(runs, 1, samples_per_tap, c_out // runs)
    grad_weight = (samples.swapaxes(2, 3) @ grad_output).transpose(0, 3, 2, 1).reshape(weight.shape)
    grad_samples = (grad_output @ by_tap.swapaxes(2, 3)).reshape(runs, taps, 1, samples_per_tap * inputs)

    grad_neighbours = share.swapaxes(2, 3) * grad_samples
    place = (pixel * (batch * inputs))[..., None] + np.arange(batch * inputs)
    grad_image = np.bincount(place.ravel(), grad_neighbours.ravel(), image.size).reshape(image.shape)
    grad_input = grad_image[:, :height, :width].transpose(3, 0, 4, 1, 2).reshape(input.shape)

    grad_share = neighbours @ grad_samples.swapaxes(2, 3)
    grad_share = grad_share.reshape(positions, runs // positions, taps, 2, 2).sum(1)
    grad_offsets = np.stack(
        (
            (slope[:, None] * share_x[..., None, :] * grad_share).sum((2, 3)),
            (share_y[..., :, None] * slope * grad_share).sum((2, 3)),
        ),
        axis=-1,
    )
    return [output, grad_input, grad_weight, grad_offsets, grad.sum((0, 2, 3))]


def _neighbours(offset, start, stride, outputs, size):
    """Along one axis: indices (P, K, 2, outputs) of the two neighbours, `size` for outside; their shares (P, K, 2).

    floor() picks the cell, so a tap on the lattice has the slope to its right. An infinite tap is outside everywhere.
    """
    cell = np.floor(offset)
    fraction = np.where(np.isfinite(offset), offset, 0.0) - np.where(np.isfinite(offset), cell, 0.0)
    at = (cell + start)[:, :, None, None] + np.arange(2)[:, None] + np.arange(outputs) * stride
    return np.where((at >= 0) & (at < size), at, size).astype(np.intp), np.stack((1 - fraction, fraction), -1)


def rounding_bounds(magnitudes, weight_shape, grad_shape, groups, positions, epsilon):
    """How far results in floating point of precision `epsilon` may lie from the exact ones, element by element.

    A sum of n products, in any order, is off by at most n * u * (sum of |products|) with u = epsilon / 2, and by
    lambda * sqrt(n) * u * (...) with probability 1 - 2 exp(-lambda^2 / 2) where roundings are independent (Higham and
    Mary 2019). Here lambda is 3, on top of magnitudes that count each of a tap's 4 neighbours in full, and 5 u stand
    for the roundings within a product: shares, the fraction, storing. Seen in 2,000 cases: errors up to 0.2 of it.
    """
    c_out, inputs, kh, kw = weight_shape
    pixels = grad_shape[0] * grad_shape[2] * grad_shape[3]
    taps, per_position = 4 * kh * kw, 4 * pixels * inputs * c_out // positions
    terms = (taps * inputs + 1, taps * c_out // groups, 4 * pixels, per_position, pixels)
    factors = ((5 + 3 * math.sqrt(n)) * epsilon / 2 for n in terms)
    return [factor * bound for factor, bound in zip(factors, magnitudes, strict=True)]


@dataclasses.dataclass
class Case:
    """The arguments of one call, the gradient that comes back into it, and which gradients are asked for."""

    tensors: list  # input, weight, offsets (P, K, 2), bias or None
    arguments: dict
    sides: tuple  # the padding at (top, left, bottom, right)
    direction: torch.Tensor
    needs: list

    def __str__(self):
        named = [*zip(NAMES[1:], self.tensors, strict=True), ("gradient", self.direction)]
        tensors = [f"{name} {tuple(t.shape)} strides {t.stride()} {t.dtype}" for name, t in named if t is not None]
        return "\n  ".join([*tensors, str(self.arguments), f"requires_grad {self.needs}"])

    def oracle(self, **changed):
        """The exact results, or those with `changed` arguments of :func:`acu_conv2d_closed_form`."""
        arrays = {name: t for name, t in zip(NAMES[1:], self.tensors, strict=True) if t is not None}
        arrays = {"bias": torch.zeros(self.direction.shape[1]), "grad": self.direction} | arrays
        geometry = {name: self.arguments[name] for name in ("stride", "dilation", "groups")}
        return acu_conv2d_closed_form(**(arrays | geometry | {"corner": self.sides[:2]} | changed))

    def check(self, actual, where=True):
        """Results of a backend against the oracle's; the output only `where` it is right to compare."""
        input, weight, offsets, _ = self.tensors
        precision = max(torch.finfo(input.dtype).eps, torch.finfo(offsets.dtype).eps)  # fractions are as offsets are
        sizes = weight.shape, self.direction.shape, self.arguments["groups"], len(offsets)
        bounds = rounding_bounds(self.oracle(magnitude=True), *sizes, precision)
        likes = [self.direction, *self.tensors]
        for name, expected, bound, like in zip(NAMES, self.oracle(), bounds, likes, strict=True):
            if name in actual:
                assert (actual[name].shape, actual[name].dtype) == (like.shape, like.dtype), name
                value = actual[name].double().numpy()
                wrong = ~(np.abs(value - expected) <= bound) & (where if name == "output" else True)  # NaN is wrong
                at = tuple(np.argwhere(wrong)[0].tolist()) if wrong.any() else None
                assert at is None, (
                    f"{wrong.sum()} of {wrong.size} numbers of {name} are wrong, first {list(at)}: "
                    f"{value[at]} instead of {expected[at]} +- {bound[at]:.1e}"
                )


def case(seed, kinds=KINDS, **fixed):
    """The random case of this seed.

    `fixed` channels (in, out, groups), positions, stride, size, batch or dtype stay; `small`: few channels and taps.

    Valid by construction: the image is drawn last, at least as large as the kernel needs for one output pixel.
    """
    dice, values = random.Random(seed), np.random.default_rng(seed)
    kernel, stride = dice.choice(KERNELS), fixed.get("stride", tuple(dice.choice((1, 1, 1, 2, 3)) for _ in "yx"))
    dilation = tuple(dice.choice((0, 1, 1, 1, 2, 3)) for _ in "yx")

    large = 0.7 if dice.random() < 0.15 else 0.05
    if fixed.get("small"):
        large, kernel = 0, min(kernel, (4, 3))
    a, b = (dice.choice(MANY if dice.random() < large else SMALL) for _ in "io")
    split = dice.choice((2, 3, 4)) if max(a, b) < 16 else 2
    kinds_of_groups = ((a, b, 1), (a, b, 1), (a * split, b * split, split), (a, a, a), (a, 2 * a, a))
    c_in, c_out, groups = fixed.get("channels", dice.choice(kinds_of_groups))
    divisor = dice.choice([p for p in range(1, c_out + 1) if c_out % p == 0])
    positions = fixed.get("positions", dice.choice((1, 1, c_out, divisor)))

    top, left, bottom, right = (dice.choice((0, 1, 1, 2, 3)) for _ in "tlbr")
    reach_y, reach_x = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    style = dice.choice(("pair", "four", "same" if stride == (1, 1) else "pair"))
    padding = {"pair": (top, left), "four": (left, right, top, bottom), "same": "same"}[style]
    if style == "pair":
        bottom, right = top, left
    elif style == "same":
        top, left, bottom, right = reach_y // 2, reach_x // 2, (reach_y + 1) // 2, (reach_x + 1) // 2

    least = max(1, reach_y + 1 - top - bottom), max(1, reach_x + 1 - left - right)  # for an output of one pixel
    batch = fixed.get("batch", dice.choice((0, 1, 1, 1, 2, 2, 2, 3, 3, 3)))
    for most in (7, 3, 1) if fixed.get("small") else (14, 7, 3, 1):
        size = fixed.get("size", tuple(dice.randint(n, max(n, dice.choice((1, most, most)))) for n in least))
        out_size = (
            (size[0] - 1 + top + bottom - reach_y) // stride[0] + 1,
            (size[1] - 1 + left + right - reach_x) // stride[1] + 1,
        )
        if batch * c_in // groups * c_out * kernel[0] * kernel[1] * out_size[0] * out_size[1] <= WORK:
            break

    dtype, other = dice.choice(((torch.float32, torch.float64), (torch.float64, torch.float32)))
    if "dtype" in fixed:
        dtype = other = fixed["dtype"]
    offsets = _offsets(dice, values, (positions, kernel[0] * kernel[1], 2), dice.choice(kinds))
    tensors = [
        _lay_out(dice, values.standard_normal((batch, c_in, *size)), dtype),
        _lay_out(dice, values.standard_normal((c_out, c_in // groups, *kernel)), dtype),
        _lay_out(dice, offsets, dice.choice((dtype, dtype, other))),
        _lay_out(dice, values.standard_normal(c_out), dtype) if dice.random() < 0.5 else None,
    ]
    direction = _lay_out(dice, values.standard_normal((batch, c_out, *out_size)), dtype)
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    every = dice.random() < 0.6
    return Case(
        tensors, arguments, (top, left, bottom, right), direction, [every or dice.random() < 0.5 for _ in NAMES[1:]]
    )


def _offsets(dice, values, shape, kind):
    if kind == "zero":
        return np.zeros(shape)
    if kind == "whole":
        return values.integers(-3, 4, shape).astype(float)
    if kind == "small":
        return values.uniform(-1, 1, shape)
    if kind == "hairline":  # just beside a whole number, where a rounded fraction may become 1
        return values.integers(-1, 2, shape) + values.standard_normal(shape) * 10.0 ** -dice.randint(3, 18)
    offsets = values.standard_normal(shape) * (4 if kind == "wide" else 1.5)
    if kind == "partly whole":
        return np.where(values.random(shape) < 0.5, offsets.round(), offsets)
    if kind == "far":
        far = values.choice([40, -40, 1e4, -1e4, 1e9, -1e9, np.inf, -np.inf], shape)
        return np.where(values.random(shape) < 0.3, far, offsets)
    return offsets


def _lay_out(dice, array, dtype):
    """The array as a tensor in some memory format. Memory between its numbers holds NaN, which must not be read."""
    tensor, layout = torch.from_numpy(array).to(dtype), dice.choice(LAYOUTS)
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0]
    if tensor.ndim != 4 or layout == "plain":
        return tensor
    if layout == "cropped":
        return torch.nn.functional.pad(tensor, (1, 2, 1, 0), value=torch.nan)[..., 1:, 1:-2]
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded" and tensor.numel():
        return tensor.narrow(dice.randrange(4), 0, 1).expand_as(tensor)
    return tensor.contiguous(memory_format=torch.channels_last)


def run(one, backend, device="cpu"):
    """{name: output or gradient} of a case, without the gradients that it does not ask for."""
    given = [tensor if tensor is None else _moved(tensor.detach(), device) for tensor in one.tensors]
    leaves = [t if t is None else t.requires_grad_(n) for t, n in zip(given, one.needs, strict=True)]
    output = acu_conv2d(*leaves, **one.arguments, backend=backend)
    wanted = {name: t for name, t in zip(NAMES[1:], leaves, strict=True) if t is not None and t.requires_grad}
    grads = torch.autograd.grad(output, list(wanted.values()), _moved(one.direction, device)) if wanted else ()
    return {"output": output.detach().cpu(), **dict(zip(wanted, (grad.cpu() for grad in grads), strict=True))}


def _moved(tensor, device):
    """On the device with its gaps and its place in the storage, which ``Tensor.to`` gives up."""
    if tensor.device.type == device:
        return tensor
    whole = tensor.new_empty(0).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def each(seeds, body, **how):
    """Run `body(seed, case(seed, **how))` for each seed; a failure says how to get the case."""
    for seed in seeds:
        one = case(seed, **how)
        try:
            body(seed, one)
        except Exception as error:
            call = ", ".join([str(seed), *(f"{name}={value}" for name, value in how.items())])
            raise AssertionError(f"{error}\ncase({call}) is\n  {one}") from error
