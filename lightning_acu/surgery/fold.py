"""Fold a whole model back into plain convolutions, or round its positions to whole pixels or to dilations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import require_module
from ..choices import one_of
from ..conv import ACUConv2d, acu_layers, check_finite, check_grids
from ..derived import DerivedACUConv2d, reshaped_class
from ..dilation import RoundTo, check_round_to
from ..folded import GEOMETRY, FoldedConv2d, PadSame2d, ReshapedConv2d
from ..forms import check_form
from ..geometry import pair, resolve_padding
from ..plain import CONFIGURATION
from .checks import check_model, check_not_traced
from .fold_rule import RUNTIMES, cheapest_form
from .fold_times import fastest_form
from .guards import guard_merging, may_be_merged
from .marks import FOLDED, RESHAPED, SKIP_REASON
from .outputs import (
    Arguments,
    difference,
    image_sizes,
    recorded_arguments,
    recorded_outputs,
    run,
    run_at_another_size,
    tolerance,
)
from .transformers_guards import guard_transformers

__all__ = ["fold_acu", "fold_by", "fold_layers", "round_acu"]

#: Gives the form of a layer, by what it is called with.
Choice = Callable[[ACUConv2d, Arguments], str]

#: What an active convolution has and its fold does not.
_OWN_PARAMETERS = frozenset(("weight", "bias", "gain", "offsets"))
_OWN_ATTRIBUTES = frozenset(("position_groups", "backend", "start", "fixed_tap", "plain_dilation"))

#: Where nn.Module keeps hooks; a folded layer keeps those of the active one.
_HOOKS = tuple(
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_is_full_backward_hook"))
)


def fold_acu(
    model: nn.Module, example_input: Any = None, *, form: str = "auto", runtime: str | None = None
) -> nn.Module:
    """Replace every active convolution by plain ones that compute the same function, exactly, at any positions.

    In place: each layer becomes its fold (see :meth:`ACUConv2d.fold`) and keeps its identity, so that hooks, shared
    modules and a convolution that is itself ``model`` survive. It also keeps showing the kernel_size, stride, padding
    and dilation it had, which code around it may read (:class:`lightning_acu.folded.ReshapedConv2d`), except one of a
    free shape, which has no such grid. Parametrizations are folded in. The parameters are new; an existing optimizer
    has the old ones.

    One convolution that holds taps off the grid has a larger kernel than the layer, and is not the cheapest form:
    :mod:`lightning_acu.forms` lists the others, docs/deployment.md says which suits which runtime.

    Args:
        model: any module.
        example_input: what ``model`` takes, a tuple for several arguments. The output for it, and for images of another
            size if ``model`` takes any, is then compared before and after, in eval mode, and methods that merge weights
            can later be tried with inputs of these shapes. The sizes of images in this pass are those that "auto"
            counts with.
        form: one of :data:`lightning_acu.forms.FORMS`. "auto" without ``example_input`` is one ``nn.Conv2d`` for each
            layer unless its taps are far apart. With it, each layer takes the form with the least arithmetic and
            memory traffic (:mod:`lightning_acu.surgery.fold_rule`), except in modules with a method that may merge
            weights (``fuse``, ``reparameterize``, ...), which can only merge an ``nn.Conv2d``.
        runtime: "torch" or "onnxruntime", to measure the forms there instead, on this machine and on images of each
            layer's size, for some seconds a layer; the fastest is taken, in all modules. For "auto" with
            ``example_input``.

    Returns:
        ``model``, now without active convolutions.

    Raises:
        TypeError: ``model`` is not a module, or a compiled, DDP- or FSDP-wrapped one.
        ValueError: an unknown ``form`` or ``runtime``, or a ``runtime`` without ``example_input`` or with another form
            than "auto"; positions that are not finite, or too far apart for ``form``; or the output for
            ``example_input`` has no tensors. The message names the layer. Nothing has been folded.
        RuntimeError: the output for ``example_input``, or at the other size, is another one after the fold, because
            code of the model reads more of a convolution than its output; the message names the first module that
            differs. The fold has been undone.
        ModuleNotFoundError: ``runtime`` is "onnxruntime", and it or what exports to it is not installed.
    """
    check_form(form)
    one_of("runtime", runtime, RUNTIMES, or_none=True)
    if runtime is not None and (form != "auto" or example_input is None):
        raise ValueError(
            f"`runtime` (={runtime!r}) measures which form is fastest: it needs `example_input` and `form`='auto'"
        )
    check_model(model)
    choose: Choice | None = None
    if form == "auto":
        merged = may_be_merged(model) if runtime is None else set()

        def choose(layer: ACUConv2d, arguments: Arguments) -> str:
            if runtime is not None:
                return fastest_form(layer, arguments, runtime)
            return "auto" if layer in merged else cheapest_form(layer, arguments, None)

    return fold_by(model, example_input, form, choose)


def fold_by(model: nn.Module, example_input: Any, form: str, choose: Choice | None) -> nn.Module:
    """:func:`fold_acu` with a form for each layer that ``choose`` gives, where ``example_input`` calls it."""
    if example_input is None:
        fold_layers(model, form, {})
        guard_merging(model)
        guard_transformers(model)
        return model
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    with recorded_arguments(model) as called:
        compared = [(args, run(model, args))]
    if not compared[0][1]:
        raise ValueError(f"`example_input`: the output of {type(model).__name__} for it has no tensors to compare")
    if (other := run_at_another_size(model, args)) is not None:
        compared.append(other)
    layers = [layer for _, layer in acu_layers(model)]
    forms = {layer: choose(layer, called[layer]) for layer in layers if choose is not None and layer in called}
    before = [(layer, type(layer), dict(vars(layer))) for layer in layers]
    try:
        fold_layers(model, form, forms)
        folded: list[list[Tensor]] = []
        for inputs, _ in reversed(compared):  # the given size last: the model may keep something for its size
            with recorded_arguments(model) as arguments:
                folded.insert(0, run(model, inputs))
        for (inputs, expected), got in zip(compared, folded, strict=True):
            if not difference(got, expected) <= tolerance(expected):
                with recorded_outputs(model) as after:
                    run(model, inputs)
                _restore(before)
                size = "" if inputs is args else ", enlarged to " + " and ".join(map(str, image_sizes(inputs)))
                raise RuntimeError(
                    f"the output of {type(model).__name__} for `example_input`{size} would change by "
                    f"{difference(got, expected):.1e} of its largest value (tolerance {tolerance(expected):.1e}), "
                    f"first that of {_first_difference(model, inputs, after)}: its code reads the weight or an "
                    "attribute of a convolution that the fold changes. Nothing has been folded"
                )
    except BaseException:
        _restore(before)
        raise
    guard_merging(model, arguments)
    guard_transformers(model)
    return model


def _restore(before: list[tuple[ACUConv2d, type[ACUConv2d], dict[str, Any]]]) -> None:
    """Turn folds into the active convolutions that they were."""
    for layer, cls, state in before:
        layer.__class__ = cls
        vars(layer).clear()
        vars(layer).update(state)


def _first_difference(model: nn.Module, args: tuple[Any, ...], after: list[tuple[str, list[Tensor]]]) -> str:
    """The first module of ``model``, not folded, that gives something else than ``after``, or is not called there."""
    with recorded_outputs(model) as outputs:
        run(model, args)
    # A fold has modules of its own.
    names = {name for name, _ in outputs}
    folded = iter([(name, tensors) for name, tensors in after if name in names])
    for name, tensors in outputs:
        other, got = next(folded, (None, tensors))
        if other != name or not difference(got, tensors) <= tolerance(tensors):
            return name or "the model itself"
    return "the model itself"


def fold_layers(model: nn.Module, form: str, forms: Mapping[ACUConv2d, str]) -> None:
    """Turn each active convolution of ``model`` into its fold, in the form given for it in ``forms``, or ``form``.

    Raises:
        ValueError: one cannot be folded, or not in this form; nothing has been folded.
    """
    folds: list[tuple[ACUConv2d, nn.Conv2d | FoldedConv2d]] = []
    for name, layer in acu_layers(model):
        try:
            folds.append((layer, layer.fold(forms.get(layer, form))))
        except ValueError as error:
            raise ValueError(f"{name or 'the model'}: {error}") from error
    _replace(folds)


def _replace(folds: list[tuple[ACUConv2d, nn.Conv2d | FoldedConv2d]]) -> None:
    """Turn each layer into its fold, in place."""
    for layer, folded in folds:
        state = vars(folded) | {name: vars(layer)[name] for name in _HOOKS if name in vars(layer)}
        cls, same_pad = type(folded), getattr(layer, "same_pad", False)
        is_sum = issubclass(cls, FoldedConv2d)
        reshaped = is_sum or _reshapes(folded, layer, same_pad)
        if layer.start is None:  # else its kernel_size and dilation are how it is stored, not what it is
            state |= {name: vars(layer)[name] for name in GEOMETRY}
            if reshaped and not is_sum:
                pad = PadSame2d(folded.kernel_size, folded.stride, folded.dilation) if same_pad else None  # type: ignore[arg-type]
                state |= {"own": {name: vars(folded)[name] for name in GEOMETRY}, "plain_class": cls}
                state |= {f"own_{name}": vars(folded)[name] for name in ("padding", "dilation")}
                state["_modules"] = state["_modules"] | {"image_pad": pad}
                cls = ReshapedConv2d
                if isinstance(layer, DerivedACUConv2d):
                    cls = reshaped_class(layer.plain_class)
        elif is_sum:
            state |= {name: vars(layer)[name] for name in ("in_channels", "out_channels", "stride", "groups")}
        _keep_the_rest(layer, state)
        reshaped = reshaped or getattr(layer, RESHAPED, False)  # by an earlier fold
        layer.__class__ = cls  # type: ignore[assignment]
        vars(layer).clear()
        vars(layer).update(state)
        setattr(layer, SKIP_REASON, "folded from an active convolution")
        setattr(layer, FOLDED, True)
        if reshaped:
            setattr(layer, RESHAPED, True)


def _reshapes(folded: nn.Module, layer: ACUConv2d, same_pad: bool) -> bool:
    """Whether ``folded``, one plain convolution, has a kernel or padding that ``layer`` did not have."""

    def geometry(conv: Any) -> Any:
        size, stride, dilation = map(pair, (conv.kernel_size, conv.stride, conv.dilation))
        # "SAME" pads by the size of the image, whatever ``padding`` says.
        padding = None if same_pad else resolve_padding(conv.padding, size, stride, dilation)
        return size, stride, dilation, padding, conv.groups, conv.padding_mode

    return geometry(folded) != geometry(layer)


def _keep_the_rest(layer: ACUConv2d, state: dict[str, Any]) -> None:
    """Add to ``state`` what others have put on ``layer``: buffers, modules and attributes that hooks may use."""
    others = {kind: dict(vars(layer)[kind]) for kind in ("_parameters", "_buffers", "_modules")}
    parametrized = others["_modules"].pop("parametrizations", {}) if parametrize.is_parametrized(layer) else {}
    for name in set(parametrized) - _OWN_PARAMETERS:  # whose parametrization goes with the class
        value = getattr(layer, name).detach().clone()
        others["_parameters"][name] = nn.Parameter(value, any(p.requires_grad for p in parametrized[name].parameters()))
    for kind, own in others.items():
        state[kind] = {name: value for name, value in own.items() if name not in _OWN_PARAMETERS} | state[kind]
    state["_non_persistent_buffers_set"] |= layer._non_persistent_buffers_set - _OWN_PARAMETERS
    taken = {name for kind in others for name in state[kind]}  # an attribute would hide a module of that name
    for name, value in vars(layer).items():
        if name not in CONFIGURATION and name not in _OWN_ATTRIBUTES and name not in taken:
            state.setdefault(name, value)


def round_acu(model: nn.Module, *, to: RoundTo = "pixels", separate: bool = False) -> nn.Module:
    """Move the taps of every active convolution to whole pixels, or to dilated grids, in place; returns ``model``.

    Args:
        model: any module.
        to: "pixels": each tap to its nearest whole pixel. Taps of one layer that end on the same pixel keep their
            weights and act as one. "dilation": each layer, or position group, becomes the nearest plain dilated
            convolution, whose fold has the original kernel size (see :meth:`ACUConv2d.round_`); what was found is in
            ``report_acu(model).dilations``.
        separate: with "pixels", give each tap of a layer a pixel of its own.

    Raises:
        TypeError: ``model`` is not a module, or torch.fx has traced it from active convolutions.
        ModuleNotFoundError: ``separate`` and taps that would meet, and SciPy is not installed.
        ValueError: positions are nan or inf; ``to`` is neither; or it is "dilation" and a layer has a free shape.
            Nothing has been rounded then.
    """
    require_module(model)
    check_not_traced(model)
    check_round_to("to", to)
    layers = list(acu_layers(model))
    check_finite(layers)
    if to == "dilation":
        check_grids(layers)
    for _, layer in layers:
        layer.round_(separate, to=to)
    return model
