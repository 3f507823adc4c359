"""One call that turns the convolutions of a model into active ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from ..conv import ACUConv2d
from ..ops import check_backend
from .guards import guard_merging
from .rules import find_rule, named_conv2ds, why_not_convertible

__all__ = ["ConvertConfig", "NoEffectWarning", "convert_to_acu"]

#: Where convert_to_acu leaves, on a convolution it skipped, the reason; report_acu reads it.
SKIP_REASON = "acu_skip_reason"


class NoEffectWarning(UserWarning):
    """A conversion that matched no module."""


@dataclass
class ConvertConfig:
    """The arguments of :func:`convert_to_acu`, for configuration files.

    Args:
        kernel_sizes: sizes to convert; 3 stands for 3x3, [1, 7] for 1x7. None: 3 and 5.
        target_modules: only modules whose name matches: one regular expression (in full), or a list of name endings.
        exclude_modules: not those modules, given in the same way.
        depthwise: whether to convert depthwise convolutions.
        grouped: whether to convert other grouped convolutions.
        position_groups: sets of positions for each layer.
        fixed_centre: keep the centre tap of odd kernels in place.
        backend: which backend runs the layers.
    """

    kernel_sizes: list[int | tuple[int, int]] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    depthwise: bool = True
    grouped: bool = True
    position_groups: int = 1
    fixed_centre: bool = True
    backend: str = "auto"

    def apply(self, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
        """Convert ``model`` in place with these arguments, and with a function, which no configuration can hold."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        if arguments["kernel_sizes"] is None:
            del arguments["kernel_sizes"]
        return convert_to_acu(model, filter_fn=filter_fn, **arguments)


# Lightning checkpoints hold the arguments of ImageClassifier: torch.load(..., weights_only=True) may read this one.
torch.serialization.add_safe_globals([ConvertConfig])


def convert_to_acu(
    model: nn.Module,
    *,
    kernel_sizes: int | Sequence[int | tuple[int, int]] = (3, 5),
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    depthwise: bool = True,
    grouped: bool = True,
    position_groups: int = 1,
    fixed_centre: bool = True,
    backend: str = "auto",
) -> nn.Module:
    """Turn the convolutions of ``model`` into :class:`~lightning_acu.ACUConv2d`, in place; the output stays the same.

    Every module keeps its identity and its parameters; only its class changes, and ``offsets`` is added. Optimizers,
    hooks and shared modules therefore survive, but an optimizer made before does not know the offsets yet. Layers
    that are active already stay as they are, and frozen layers stay frozen. What was skipped and why:
    :func:`report_acu`.

    Args:
        model: any module, also a single convolution.
        kernel_sizes: which to convert; 3 stands for (3, 3).
        target_modules: only modules whose qualified name matches: a str is a regular expression for the whole name,
            a sequence lists names or their endings ("conv1" matches "layer1.0.conv1").
        exclude_modules: not those, given in the same way.
        filter_fn: only modules for which ``filter_fn(module, qualified_name)`` is true.
        depthwise: convert depthwise convolutions (one input channel for each group).
        grouped: convert other convolutions with more than one group.
        position_groups: sets of positions for each layer.
        fixed_centre: keep the centre tap of odd kernels in place, as in the paper.
        backend: the backend of the new layers.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: an argument that cannot be meant, such as a pattern that does not compile or ``position_groups``
            that do not divide the channels of a layer. Nothing has been converted then.

    Warns:
        NoEffectWarning: nothing matched, or one of several patterns matched no convolution.
    """
    check_model(model)
    check_backend(backend)
    kernel_sizes = [kernel_sizes] if isinstance(kernel_sizes, int) else list(kernel_sizes)
    sizes = {_size(size) for size in kernel_sizes}
    targeted, excluded = _matcher("target_modules", target_modules), _matcher("exclude_modules", exclude_modules)

    def why_not(module: nn.Module, names: list[str]) -> str | None:
        if target_modules is not None and not any(map(targeted, names)):
            return f"not among target_modules={target_modules!r}"
        if any(map(excluded, names)):
            return f"matches exclude_modules={exclude_modules!r}"
        if filter_fn is not None and not filter_fn(module, names[0]):
            return "filter_fn said no"
        size = tuple(module.kernel_size)  # type: ignore[arg-type]
        if size not in sizes:
            return f"kernel size {size[0]}x{size[1]} not among kernel_sizes={kernel_sizes}"
        groups = getattr(module, "groups", 1)
        if not depthwise and groups > 1 and groups == module.in_channels:
            return "depthwise=False"
        if not grouped and 1 < groups < module.in_channels:  # type: ignore[operator]
            return "grouped=False"
        return why_not_convertible(module)

    names = named_conv2ds(model)
    reasons = {m: why_not(m, aliases) for m, aliases in names.items() if not isinstance(m, ACUConv2d)}
    chosen = [module for module, reason in reasons.items() if reason is None]
    for module in chosen:  # all checked before the first is changed
        if position_groups < 1 or module.out_channels % position_groups:  # type: ignore[operator]
            raise ValueError(
                f"`position_groups` (={position_groups}) must divide the output channels of "
                f"{names[module][0] or 'the model'} "
                f"(={module.out_channels}); exclude it or choose another number"
            )
    for module, reason in reasons.items():
        if reason is not None and why_not_convertible(module) is None:  # what a rule says can be asked again
            setattr(module, SKIP_REASON, reason)
    for module in chosen:
        rule = find_rule(module)
        assert rule is not None
        vars(module).pop(SKIP_REASON, None)  # of an earlier, narrower conversion
        rule.convert(module, position_groups=position_groups, fixed_centre=fixed_centre, backend=backend)
    guard_merging(model)
    if any(isinstance(module, ACUConv2d) for module in model.modules()):
        _warn_of_idle_patterns(model, target_modules=target_modules, exclude_modules=exclude_modules)
    else:
        why = "; ".join(sorted({reason for reason in reasons.values() if reason})) or "it has no 2-D convolution"
        warnings.warn(
            f"convert_to_acu converted nothing in {type(model).__name__}: {why}", NoEffectWarning, stacklevel=2
        )
    return model


def _warn_of_idle_patterns(model: nn.Module, **arguments: str | Sequence[str] | None) -> None:
    """A misspelt name would otherwise convert, or leave out, nothing."""
    names = [name for aliases in named_conv2ds(model).values() for name in aliases]
    for argument, patterns in arguments.items():
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            matches = _matcher(argument, pattern if isinstance(patterns, str) else [pattern])
            if names and not any(map(matches, names)):
                warnings.warn(f"`{argument}`: {pattern!r} matches no convolution", NoEffectWarning, stacklevel=3)


def check_model(model: nn.Module) -> None:
    """TypeError for what surgery must not touch: no module, or a wrapper that has taken note of the parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__} (={model!r})")
    for module in model.modules():
        name = type(module).__name__
        if name in ("OptimizedModule", "DistributedDataParallel", "FullyShardedDataParallel") or name.startswith(
            "FSDP"
        ):
            raise TypeError(f"`model` contains a {name}; convert the plain model first, then compile or wrap it")
        if name == "DataParallel":
            raise TypeError("`model` contains a DataParallel; convert the module inside it")


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"`kernel_sizes` has {size!r}; each must be an int >= 1 or a pair of them")
    return pair


def _matcher(argument: str, patterns: str | Sequence[str] | None) -> Callable[[str], bool]:
    """Peft's convention: a str is a regular expression for the whole name, a sequence lists names or endings."""
    if patterns is None:
        return lambda name: False
    if isinstance(patterns, str):
        try:
            compiled = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"`{argument}` (={patterns!r}) is not a regular expression: {error}") from error
        return lambda name: compiled.fullmatch(name) is not None
    endings = tuple(patterns)
    return lambda name: any(name == ending or name.endswith(f".{ending}") for ending in endings)
