"""Guards for methods that read ``conv.weight`` and would lose the positions.

RepVGG, RepViT, MobileOne, LeViT and others merge branches and norms into one kernel (timm's ``reparameterize_model``
calls these methods). They treat an active convolution as the nn.Conv2d it derives from and would silently drop its
positions, so the guard raises. After a fold whose kernel has another shape than the method expects, the guard tries
the method on a copy first, and raises if that changes the output.

The guards are attributes of the instance, because the guarded methods belong to other people's classes.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import few, qualified_name
from ..conv import ACUConv2d
from .marks import RESHAPED

__all__ = ["MergingGuard", "guard_merging", "tensors_in"]

#: The methods that timm's ``reparameterize_model``, the models' own scripts and torchvision's quantisation call.
_MERGING = ("fuse", "reparameterize", "switch_to_deploy", "convert_to_deploy", "fuse_model")

#: Image sizes to try a module with, to see whether merging changes its output; some modules take one size only.
_TRIAL_SIZES = ((15, 18), (16, 16), (14, 14), (7, 7), (28, 28), (56, 56), (224, 224))

#: Largest difference, relative to the largest value, that rounding in float64 may make.
_TOLERANCE = 1e-9


class MergingGuard:
    """Replaces a method that merges weights, as an attribute of the instance.

    It raises if the module contains active convolutions, whose positions would be lost. After they are folded it tries
    the method on a copy first, and calls it if the output stays the same. It is copied and pickled with its module,
    and does not keep it alive.

    Args:
        module: the module whose method is guarded.
        method: the name of the method.
        name: the qualified name of ``module``, for messages.

    Raises:
        RuntimeError: when called, as above; the module is not changed.
        ReferenceError: when called after ``module`` is gone.
    """

    def __init__(self, module: nn.Module, method: str, name: str = "") -> None:
        self._module = weakref.ref(module)
        self.method = method
        self.name = name

    def __reduce__(self) -> tuple[type[MergingGuard], tuple[nn.Module | None, str, str]]:
        return type(self), (self._module(), self.method, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, if that keeps the output."""
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module of this guarded {self.method}() does not exist any more")
        active, reshaped = _layers_to_guard(module, self.name)
        if active:
            _refuse(type(module).__name__, self.method, few(active))
        return _merge_if_equal(module, self.method, few(reshaped), *args, **kwargs)


def guard_merging(model: nn.Module) -> None:
    """Guard the methods of all modules in ``model`` that need it now, and remove the guards of those that do not."""
    for name, module in model.named_modules():
        for method in _MERGING:
            guard = vars(module).get(method)
            if isinstance(guard, MergingGuard) or getattr(guard, "func", None) in (_refuse, _merge_if_equal):
                delattr(module, method)
        methods = [
            method for method in _MERGING if callable(getattr(type(module), method, None))
        ]  # not a layer of that name
        if methods and any(_layers_to_guard(module, name)):
            for method in methods:
                setattr(module, method, MergingGuard(module, method, name))


def _layers_to_guard(module: nn.Module, name: str) -> tuple[list[str], list[str]]:
    """Qualified names of the layers in ``module`` that are active, and of those whose fold has another shape."""
    inside = [(qualified_name(name, own) or "(the model)", layer) for own, layer in module.named_modules()]
    active = [own for own, layer in inside if isinstance(layer, ACUConv2d)]
    return active, [own for own, layer in inside if getattr(layer, RESHAPED, False)]


# Whole models pickled by version 0.1 have partials of the following two functions in place of a MergingGuard.


def _refuse(owner: str, method: str, layers: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{owner}.{method}() merges weights of active convolutions ({layers}) and would lose their positions; call "
        "lightning_acu.fold_acu(model) first"
    )


def _merge_if_equal(module: nn.Module, method: str, layers: str, *args: Any, **kwargs: Any) -> Any:
    why: Exception | None = None
    got: list[Tensor] = []
    expected: list[Tensor] = []
    trial = copy.deepcopy(module).eval().double()
    try:
        image, expected = _try(trial)
        with _NewInFloat64():
            merged = getattr(type(trial), method)(trial, *args, **kwargs)
        with torch.no_grad():
            got = list(tensors_in((trial if merged is None else merged)(image)))
    except Exception as error:  # whatever it is, it would have been raised by the model itself
        why = error
    equal = why is None and len(got) == len(expected) and all(map(_close, got, expected))
    if not equal:
        raise RuntimeError(
            f"{type(module).__name__}.{method}() expects kernels of the original shape and would change the output, "
            f"because the fold of {layers} has another shape (its taps are not on the regular grid). The block was not "
            "changed. The folded model consists of plain convolutions: run or export it as it is"
        ) from why
    delattr(module, method)
    return getattr(module, method)(*args, **kwargs)


class _NewInFloat64(TorchFunctionMode):
    """Create tensors in float64 unless a dtype is given, in this block and thread only (torch's default is global)."""

    _NEW = frozenset((torch.empty, torch.zeros, torch.ones, torch.eye, torch.rand, torch.randn))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._NEW and kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def _try(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """An image that ``module`` accepts, (2, C, H, W) in float64, and the output for it."""
    channels = next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    device = next(module.parameters()).device
    for size in _TRIAL_SIZES:
        image = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64).to(device)
        try:
            with torch.no_grad():
                return image, list(tensors_in(module(image)))
        except Exception as error:  # a size or a layout that this module does not take
            why = error
    raise RuntimeError(f"{type(module).__name__} did not accept any image of {channels} channels") from why


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in the output of a model, in the order that exporters use."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors_in(part)
    elif isinstance(output, dict):
        yield from tensors_in(list(output.values()))


def _close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= _TOLERANCE * expected.abs().max())
