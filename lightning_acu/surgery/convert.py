"""Convert the convolutions of a model to active ones, in one call."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import nn

from ..checks import find_wrapper
from ..choices import one_of
from ..conv import ACUConv2d
from ..folded import kernel_size_of
from ..ops import check_backend
from ..plain import PositionGroups
from .activate import Activation, activate
from .checks import check_model
from .marks import SKIP_REASON
from .patterns import NoEffectWarning, kernel_size_pair, name_matcher, warn_of_idle_patterns
from .presets import PRESETS, check_preset
from .rules import named_conv2ds, why_not_convertible

__all__ = ["ConvertConfig", "convert_to_acu"]


@dataclass
class ConvertConfig:
    """The arguments of :func:`convert_to_acu`, for configuration files.

    Args:
        kernel_sizes: sizes to convert; 3 stands for 3x3, [1, 7] for 1x7. None: 3 and 5.
        target_modules: only modules whose name matches: one regular expression (in full), or a list of name endings.
        exclude_modules: not those modules, given in the same way.
        depthwise: whether to convert depthwise convolutions.
        grouped: whether to convert other grouped convolutions.
        position_groups: sets of positions for each layer, or "channels": one for each channel of depthwise layers.
        fixed_centre: keep the centre tap of odd kernels in place.
        backend: which backend runs the layers.
        preset: "all", or "C23": all but the first stage.
        on_unsupported: "skip" or "error", for convolutions that are selected but cannot be converted.
    """

    kernel_sizes: list[int | tuple[int, int]] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    depthwise: bool = True
    grouped: bool = True
    position_groups: PositionGroups = 1
    fixed_centre: bool = True
    backend: str = "auto"
    preset: str = "all"
    on_unsupported: str = "skip"

    def apply(self, model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
        """Convert ``model`` in place with these arguments; ``filter_fn`` cannot be part of a configuration file.

        Unlike :func:`convert_to_acu` it accepts a LightningModule, and a model without convolutions.
        """
        check_model(model)
        return _convert(model, self, filter_fn)


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
    position_groups: PositionGroups = 1,
    fixed_centre: bool = True,
    backend: str = "auto",
    preset: str = "all",
    on_unsupported: str = "skip",
) -> nn.Module:
    """Turn the convolutions of ``model`` into :class:`~lightning_acu.ACUConv2d`, in place; the output stays the same.

    Every module keeps its identity and its parameters; only its class changes, and ``offsets`` is added. Optimizers,
    hooks and shared modules therefore survive, but an existing optimizer does not have the offsets yet. Layers that
    are already active are not changed, and frozen layers stay frozen. :func:`report_acu` lists what was skipped, and
    why.

    Args:
        model: any module, also a single convolution; not a LightningModule, which may contain other networks too
            (metrics, teachers): pass the model inside it, or add the callback ConvertToACU to the Trainer.
        kernel_sizes: which to convert; 3 stands for (3, 3).
        target_modules: only modules whose qualified name matches: a str is a regular expression for the whole name,
            a sequence lists names or their endings ("conv1" matches "layer1.0.conv1").
        exclude_modules: modules to leave out, given in the same way.
        filter_fn: only modules for which ``filter_fn(module, qualified_name)`` is true.
        depthwise: convert depthwise convolutions (one input channel for each group).
        grouped: convert other convolutions with more than one group.
        position_groups: sets of positions for each layer, which divide its output channels; or "channels": one set for
            each channel of a depthwise layer. Convolutions that are not depthwise are then unsupported and stay plain;
            a second call with a number converts these too.
        fixed_centre: keep the centre tap of odd kernels in place, as in the paper.
        backend: the backend of the new layers.
        preset: "all", or "C23" (the paper's ACU-C23): all but the first stage, which consists of those 3x3 and 5x5
            (and ``kernel_sizes``) convolutions whose output has the highest resolution. "C23" runs one forward pass in
            eval mode to find the resolutions.
        on_unsupported: what to do with a convolution that is selected but cannot be converted (of an unknown class,
            pruned, parametrized; not depthwise, with ``position_groups="channels"``): "skip" it, with its reason in
            the report, or raise an "error".

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, a LightningModule, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: a model without any 2-D convolution, an invalid argument, such as a pattern that does not compile
            or ``position_groups`` that do not divide the channels of a layer, or an unsupported convolution with
            ``on_unsupported="error"``. Nothing has been converted then.

    Warns:
        NoEffectWarning: nothing matched, one of several patterns matched no convolution, or some of the selected
            convolutions stay plain since they cannot be converted.
    """
    check_model(model)
    if find_wrapper(model) == "LightningModule":
        raise TypeError(
            f"`model` (={type(model).__name__}) is a LightningModule; convert the model inside it (in its __init__: "
            "convert_to_acu(self.model)), or add lightning_acu.callbacks.ConvertToACU to the Trainer's callbacks, or "
            "call ConvertConfig().apply(module) to convert everything in it"
        )
    if not named_conv2ds(model):
        raise ValueError(f"`model` (={type(model).__name__}) has no 2-D convolution; there is nothing to convert")
    config = ConvertConfig(
        kernel_sizes=[kernel_sizes] if isinstance(kernel_sizes, int) else list(kernel_sizes),
        target_modules=target_modules,  # type: ignore[arg-type]
        exclude_modules=exclude_modules,  # type: ignore[arg-type]
        depthwise=depthwise,
        grouped=grouped,
        position_groups=position_groups,
        fixed_centre=fixed_centre,
        backend=backend,
        preset=preset,
        on_unsupported=on_unsupported,
    )
    return _convert(model, config, filter_fn)


def _convert(model: nn.Module, config: ConvertConfig, filter_fn: Callable[[nn.Module, str], bool] | None) -> nn.Module:
    check_backend(config.backend)
    check_preset(config.preset)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"`filter_fn` (={filter_fn!r}) must be a function of a module and its name, or None")
    one_of("on_unsupported", config.on_unsupported, ("skip", "error"))
    names = named_conv2ds(model)
    why_not = _selection(config, filter_fn)
    reasons = {m: why_not(m, aliases) for m, aliases in names.items() if not isinstance(m, ACUConv2d)}
    sizes = {(3, 3), (5, 5)} | _sizes(config)  # a preset looks at all of these, also at those left out
    for module in PRESETS[config.preset](model, [m for m in names if kernel_size_of(m) in sizes]):
        if reasons.get(module, "already active") is None:
            reasons[module] = f"in the first stage, which preset={config.preset!r} leaves plain"
    unsupported = {m: why_not_convertible(m) for m, reason in reasons.items() if reason is None}
    not_depthwise = set()
    if config.position_groups == "channels":
        not_depthwise = {m for m, why in unsupported.items() if why is None and m.groups != m.in_channels}
        unsupported |= dict.fromkeys(not_depthwise, "position_groups='channels' needs a depthwise convolution")
    reasons |= unsupported
    if config.on_unsupported == "error" and any(unsupported.values()):
        listed = "; ".join(f"{names[m][0] or 'the model'}: {why}" for m, why in unsupported.items() if why)
        raise ValueError(
            f"`on_unsupported`='error', and these cannot be converted: {listed}; exclude them or use 'skip'"
        )
    how = Activation(config.position_groups, config.fixed_centre, config.backend)
    activate(model, {module: how for module, reason in reasons.items() if reason is None})
    for module, reason in reasons.items():
        vars(module).pop(SKIP_REASON, None)  # from an earlier conversion
        # (a rule's own reason is asked for when it is needed)
        if reason is not None and (module not in unsupported or module in not_depthwise):
            setattr(module, SKIP_REASON, reason)
    if any(isinstance(module, ACUConv2d) for module in model.modules()):
        patterns = {"target_modules": config.target_modules, "exclude_modules": config.exclude_modules}
        warn_of_idle_patterns(model, 4, **patterns)
        _warn_of_plain_layers(model, [why for why in unsupported.values() if why], len(unsupported))
    else:
        why = "; ".join(sorted({reason for reason in reasons.values() if reason})) or "it has no 2-D convolution"
        warnings.warn(
            f"convert_to_acu converted nothing in {type(model).__name__}: {why}", NoEffectWarning, stacklevel=3
        )
    return model


def _warn_of_plain_layers(model: nn.Module, reasons: list[str], selected: int) -> None:
    """Warn that some of the ``selected`` convolutions could not be converted, each for one of ``reasons``."""
    if reasons:
        counts = "; ".join(f"{count} because: {why}" for why, count in Counter(reasons).most_common())
        warnings.warn(
            f"convert_to_acu: {len(reasons)} of {selected} selected convolutions of {type(model).__name__} stay plain: "
            f"{counts}. exclude_modules leaves them out without this warning",
            NoEffectWarning,
            stacklevel=4,
        )


def _selection(
    config: ConvertConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> Callable[[nn.Module, list[str]], str | None]:
    """A function from a convolution and its names to the reason why the arguments leave it out, or None."""
    kernel_sizes, sizes = config.kernel_sizes or [3, 5], _sizes(config)
    target, exclude = config.target_modules, config.exclude_modules
    targeted, excluded = name_matcher("target_modules", target), name_matcher("exclude_modules", exclude)

    def why_not(module: nn.Module, names: list[str]) -> str | None:
        if target is not None and not any(map(targeted, names)):
            return f"not among target_modules={target!r}"
        if any(map(excluded, names)):
            return f"matches exclude_modules={exclude!r}"
        if filter_fn is not None and not filter_fn(module, names[0]):
            return "filter_fn returned False"
        size = kernel_size_of(module)
        if size not in sizes:
            return f"kernel size {size[0]}x{size[1]} not among kernel_sizes={kernel_sizes}"
        groups = getattr(module, "groups", 1)
        if not config.depthwise and groups > 1 and groups == module.in_channels:
            return "depthwise=False"
        if not config.grouped and 1 < groups < module.in_channels:  # type: ignore[operator]
            return "grouped=False"
        return None

    return why_not


def _sizes(config: ConvertConfig) -> set[tuple[int, int]]:
    sizes = [3, 5] if config.kernel_sizes is None else config.kernel_sizes
    if not isinstance(sizes, Sequence | Set) or not sizes:
        raise ValueError(f"`kernel_sizes` (={sizes!r}) must list at least one size, such as [3, 5]")
    return {kernel_size_pair(size) for size in sizes}
