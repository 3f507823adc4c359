"""The outputs of a model before and after a change, and how far they are apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "Arguments",
    "difference",
    "image_sizes",
    "map_tensors",
    "random_devices",
    "recorded_arguments",
    "recorded_outputs",
    "run",
    "run_at_another_size",
    "tensors_in",
    "tolerance",
]

#: The arguments and keyword arguments of a call, with tensors on the meta device in place of real ones.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Largest difference, relative to the largest value, that another order of the same arithmetic may make.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

#: By how many pixels images are made larger to try another size: an odd one, by which code that pads shows itself, and
#: what networks take that halve their images five or six times and put them together again.
_MORE_PIXELS = (1, 32, 64)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in the output of a model, in the order that exporters use."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors_in(part)
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))


def tolerance(outputs: list[Tensor]) -> float:
    """The largest relative difference to expect from rounding, by the least precise of ``outputs``."""
    floats = {tensor.dtype for tensor in outputs if tensor.is_floating_point()} or {torch.float32}
    return max(_TOLERANCE.get(dtype, 16 * torch.finfo(dtype).eps) for dtype in floats)


def difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of one output from another, relative to its largest value; inf for other shapes.

    What is NaN, or the same infinity, in both is equal.
    """
    if [tensor.shape for tensor in got] != [tensor.shape for tensor in expected]:
        return float("inf")
    return max(map(_difference, got, expected), default=0.0)


def _difference(got: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    dtype = torch.complex128 if expected.is_complex() or got.is_complex() else torch.float64
    got, expected = got.detach().cpu().to(dtype), expected.detach().cpu().to(dtype)
    equal = (got == expected) | (got.isnan() & expected.isnan())
    finite = expected[expected.isfinite()].abs()
    scale = finite.max().clamp(min=1e-30) if len(finite) else 1.0
    return float(torch.where(equal, 0.0, ((got - expected).abs() / scale).nan_to_num(torch.inf, torch.inf)).max())


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The tensors that ``model`` gives in eval mode for these arguments; always with the same random numbers."""
    training = {module: module.training for module in model.modules()}
    devices = random_devices(model)
    try:
        for module in training:  # not model.eval(), which some models override to merge their weights
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(0)  # (torch.manual_seed would reseed devices that are not in use here)
            for device in devices:
                torch.cuda.default_generators[device].manual_seed(0)
            return [tensor.clone() for tensor in tensors_in(model(*args, **(kwargs or {})))]
    finally:
        for module, flag in training.items():
            module.training = flag


def image_sizes(args: Any) -> list[tuple[int, ...]]:
    """The distinct (height, width) of all images: floating-point tensors of three dimensions or more."""
    images = [tensor for tensor in tensors_in(args) if tensor.is_floating_point() and tensor.ndim > 2]
    return list(dict.fromkeys(tuple(image.shape[-2:]) for image in images if image.numel()))


def run_at_another_size(model: nn.Module, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """Arguments like ``args`` with larger images, and what ``model`` gives for them; None if it takes one size only.

    Masks, tensors of any kind with the height and width of an image, grow as it does.
    """
    sizes = image_sizes(args)

    def larger(tensor: Tensor, by: int) -> Tensor:
        if tuple(tensor.shape[-2:]) in sizes:
            for axis in (-2, -1):  # its first rows and columns once more
                length = tensor.shape[axis]
                index = torch.arange(length + by, dtype=torch.long, device=tensor.device) % length
                tensor = tensor.index_select(axis, index)
        return tensor

    for by in _MORE_PIXELS if sizes else ():
        other = map_tensors(functools.partial(larger, by=by), args)
        try:
            return other, run(model, other)
        except Exception:  # whatever this model says about a size that it does not take
            continue
    return None


def random_devices(model: nn.Module) -> list[int]:
    """The GPUs of ``model``, whose random states ``torch.random.fork_rng`` should keep."""
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})


@contextmanager
def recorded_arguments(model: nn.Module) -> Iterator[dict[nn.Module, Arguments]]:
    """The shapes of what each module of ``model`` is called with in this block, of the last call."""
    found: dict[nn.Module, Arguments] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module] = map_tensors(lambda tensor: tensor.detach().to("meta"), (args, kwargs))

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in model.modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[list[tuple[str, list[Tensor]]]]:
    """(name, tensors) of what each module of ``model`` gives in this block, in the order in which they end."""
    found: list[tuple[str, list[Tensor]]] = []

    def record(name: str, output: Any) -> None:
        found.append((name, [tensor.detach().clone() for tensor in tensors_in(output)]))

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def map_tensors(fn: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``fn`` of each tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return fn(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(fn, part) for part in value)
    if type(value) is dict:
        return {key: map_tensors(fn, part) for key, part in value.items()}
    return value
