"""Methods that read ``conv.weight`` and would lose the positions: guarded until they are right.

RepVGG, RepViT, MobileOne, LeViT and others merge branches and norms into one kernel (timm's ``reparameterize_model``
calls them all). They see an active convolution as the nn.Conv2d it derives from and would silently drop its shape:
there they raise. After a fold whose kernel has another shape than the merging was written for, they are tried on a
copy first, and raise if that changes the output.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..conv import ACUConv2d
from .marks import RESHAPED

__all__ = ["guard_merging", "tensors_in"]

#: The methods that timm's ``reparameterize_model``, the models' own recipes and torchvision's quantisation call.
_MERGING = ("fuse", "reparameterize", "switch_to_deploy", "convert_to_deploy", "fuse_model")

#: Image sizes that a module is tried at, to see whether merging changes what it computes; some take one size only.
_TRIAL_SIZES = ((15, 18), (16, 16), (14, 14), (7, 7), (28, 28), (56, 56), (224, 224))

#: Largest difference, of the largest value, that float64 rounding may make.
_TOLERANCE = 1e-9


def guard_merging(model: nn.Module) -> None:
    """Guard those methods wherever ``model`` now needs it, and nowhere else."""
    for name, module in model.named_modules():
        for method in _MERGING:
            if getattr(vars(module).get(method), "func", None) in (_refuse, _merge_if_equal):
                delattr(module, method)
        methods = [method for method in _MERGING if callable(getattr(type(module), method, None))]  # no layers
        if not methods:
            continue
        inside = [(".".join(filter(None, (name, n))) or "(the model)", m) for n, m in module.named_modules()]
        active = [n for n, m in inside if isinstance(m, ACUConv2d)]
        reshaped = [n for n, m in inside if getattr(m, RESHAPED, False)]
        for method in methods:
            # In the instance, over the method of its class; a partial can be copied and pickled with the model.
            if active:
                setattr(module, method, functools.partial(_refuse, type(module).__name__, method, _few(active)))
            elif reshaped:
                setattr(module, method, functools.partial(_merge_if_equal, module, method, _few(reshaped)))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _refuse(owner: str, method: str, layers: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{owner}.{method}() merges weights of active convolutions ({layers}) without their positions, which would be "
        "lost; call lightning_acu.fold_acu(model) first"
    )


def _merge_if_equal(module: nn.Module, method: str, layers: str, *args: Any, **kwargs: Any) -> Any:
    why: Exception | None = None
    got: list[Tensor] = []
    expected: list[Tensor] = []
    trial = copy.deepcopy(module).eval().double()
    precision = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for what the merging makes
    try:
        image, expected = _try(trial)
        merged = getattr(type(trial), method)(trial, *args, **kwargs)
        with torch.no_grad():
            got = list(tensors_in((trial if merged is None else merged)(image)))
    except Exception as error:  # whatever it is, it would have happened to the model itself
        why = error
    finally:
        torch.set_default_dtype(precision)
    equal = why is None and len(got) == len(expected) and all(map(_close, got, expected))
    if not equal:
        raise RuntimeError(
            f"{type(module).__name__}.{method}() was written for kernels of their first shape and would change the "
            f"output, because the fold of {layers} has another one (their taps are not on the regular grid). The block "
            "was left as it was. The folded model consists of plain convolutions: run or export it as it is"
        ) from why
    delattr(module, method)
    return getattr(module, method)(*args, **kwargs)


def _try(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """An image that ``module`` takes, (2, C, H, W) in float64, and what comes out."""
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
    raise RuntimeError(f"could not try {type(module).__name__} on an image of {channels} channels") from why


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in whatever a model returns, in the order exporters give them."""
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
