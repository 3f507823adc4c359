"""Guards for methods that read ``conv.weight`` and would lose the positions.

RepVGG, RepViT, MobileOne, LeViT, ultralytics' models and others merge branches and norms into one kernel. Their
methods treat an active convolution as the nn.Conv2d it derives from and would silently drop its positions.

What a method is called only decides whether it is looked at. It is refused for what it does: if it reads parameters of
active convolutions, other than by calling the layers. After a fold whose kernel has another shape than the method may
expect, it is tried on a copy first, and refused if that changes the output. For a few classes that add kernels of fixed
sizes, :mod:`merges` does it for any size.

The guards are attributes of the instance, because the guarded methods belong to other people's classes.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..checks import few, qualified_name
from ..conv import ACUConv2d
from ..folded import ReshapedConv2d
from .marks import RESHAPED
from .merges import known_merge
from .outputs import Arguments, difference, map_tensors, random_devices, run, tensors_in, tolerance
from .watch import ParameterRead, WatchParameters, in_forward, modules_in_call

__all__ = ["MergingGuard", "guard_merging", "may_be_merged"]

#: Methods of such a name that can be called without arguments are looked at; most merge nothing.
_MAY_MERGE = re.compile("_*(fuse|merge|.*reparam|(switch|convert)_to_deploy)")

#: Image sizes to try a module with if its inputs are not known; some modules take one size only.
_TRIAL_SIZES = ((15, 18), (16, 16), (14, 14), (7, 7), (28, 28), (56, 56), (224, 224))

_UNCHANGED = "Nothing was changed. The folded model consists of plain convolutions: run or export it as it is"

#: Whether a guarded method of an outer module is running, which answers for the guards inside it.
_inside: ContextVar[bool] = ContextVar("inside", default=False)


class MergingGuard:
    """Stands before a method that may merge weights, as an attribute of the instance.

    It lets the method pass if that reads no parameter of the active convolutions in the module, and raises if it
    does: positions would be lost. Where convolutions were folded into kernels of another shape, a method that reads
    them is tried on a copy first, and called if the output stays the same. It is copied and pickled with its module,
    and does not keep it alive.

    Args:
        module: the module whose method is guarded.
        method: the name of the method.
        name: the qualified name of ``module``, for messages.
        arguments: with what the module is called, tensors on the meta device; None: images, of sizes to be guessed.

    Raises:
        RuntimeError: when called, as above; the module is not changed.
        ReferenceError: when called after ``module`` is gone.
    """

    def __init__(self, module: nn.Module, method: str, name: str = "", arguments: Arguments | None = None) -> None:
        self._module = weakref.ref(module)
        self.method = method
        self.name = name
        self.arguments = arguments

    def __reduce__(self) -> tuple[type[MergingGuard], tuple[nn.Module | None, str, str, Arguments | None]]:
        return type(self), (self._module(), self.method, self.name, self.arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, if that keeps positions and output."""
        module = self._owner()
        if module is None:
            raise ReferenceError(
                f"the module of this guarded {self.method}() does not exist any more; keep it in a variable until the "
                "call returns"
            )

        def call(module: nn.Module) -> Any:
            merge = known_merge(type(module), self.method)
            if merge is not None and _layers_to_guard(module)[1]:
                return merge(module)
            return getattr(type(module), self.method)(module, *args, **kwargs)

        # What takes tensors is a step of a forward pass, and nothing is merged while a model is traced.
        if torch.compiler.is_compiling() or _inside.get() or next(tensors_in([args, kwargs]), None) is not None:
            return call(module)
        active, reshaped = _layers_to_guard(module)
        merges = False
        with _answering_for_inner_guards():
            # In a forward pass the method is a step of it, too often called to be tried each time.
            if not in_forward():
                if active:
                    self._check_positions(module, call, few(self._names(active)))
                merges = bool(reshaped) and self._is_right(module, call, few(self._names(reshaped)))
            if merges:
                with _own_geometry(module):
                    result = call(module)
                # Where the method made something new of them, the layers here stay as they are for the next call.
                if not any(isinstance(layer, ReshapedConv2d) for layer in module.modules()):
                    vars(module).pop(self.method, None)
                return result
            watch = WatchParameters([*active.values(), *reshaped.values()], stop=True)
            result = None
            with suppress(ParameterRead), watch:
                result = call(module)
        if watch.seen and active:
            _refuse(type(module).__name__, self.method, few(self._names(active)))
        if watch.seen:
            why = "in a forward pass" if in_forward() else "on a copy, because there is none"
            self._not_tried(module, few(self._names(reshaped)), why)
        return result

    def _owner(self) -> nn.Module | None:
        """The module whose method is called: of those in a forward pass the one that has this guard, if any has.

        A shallow copy (copy.copy, a replica of nn.DataParallel) has the guard of the module it was copied from.
        """
        if not torch.compiler.is_compiling():
            for module in modules_in_call():
                if vars(module).get(self.method) is self:
                    return module
        return self._module()

    def _check_positions(self, module: nn.Module, call: Callable[[nn.Module], Any], layers: str) -> None:
        """Check on a copy that the method reads no parameter of an active layer, and does not fail because of one."""
        try:
            trial = copy.deepcopy(module)
        except Exception:  # such as tensors of a forward pass; the method is then stopped at the first read
            return
        watch = WatchParameters(_layers_to_guard(trial)[0].values(), stop=True)
        error = None
        try:
            with torch.random.fork_rng(random_devices(trial)), _own_geometry(trial), watch:
                call(trial)
        except Exception as failure:
            error = failure
        if watch.seen:
            _refuse(type(module).__name__, self.method, layers)
        if error is not None:
            raise RuntimeError(
                f"{type(module).__name__}.{self.method}() fails ({type(error).__name__}: {error}); if because of the "
                f"active convolutions ({layers}), call lightning_acu.fold_acu(model) first. Nothing was changed"
            ) from error

    def _is_right(self, module: nn.Module, call: Callable[[nn.Module], Any], layers: str) -> bool:
        """Whether the method merges something and keeps the output; tried on a copy.

        Raises:
            RuntimeError: it changes the output or fails, or it reads folded layers and the module could not be run.
        """
        try:
            trial, inputs, expected, why_not = _run_copy(module, self.arguments)
        except _NoCopyError:
            return False
        owner, why = type(module).__name__, f"because the fold of {layers} has another shape"
        watch = WatchParameters(trial.modules(), stop=False)
        in_double = bool(expected) and expected[0].dtype == torch.float64
        message = error = None
        try:
            with (
                torch.random.fork_rng(random_devices(trial)),
                _NewInFloat64() if in_double else nullcontext(),
                _own_geometry(trial),
                watch,
            ):
                merged = call(trial)
            if expected and watch.seen:
                got = run(merged if isinstance(merged, nn.Module) else trial, *inputs)
                worst = difference(got, _still_given(got, expected))
                if not worst <= tolerance(expected):
                    message = f"would change the output by {worst:.1e} of its largest value"
        except Exception as failure:  # whatever it is, the method itself would have raised it
            error, message = failure, f"fails ({type(failure).__name__}: {failure})"
        if not expected and any(getattr(layer, RESHAPED, False) for layer in watch.seen):
            self._not_tried(module, layers, f"on a copy ({why_not})")
        if message is not None:
            raise RuntimeError(
                f"{owner}.{self.method}() expects kernels of the original shape and {message}, {why} (its taps are not "
                f"on the regular grid). {_UNCHANGED}"
            ) from error
        return bool(watch.seen)

    def _not_tried(self, module: nn.Module, layers: str, why: str) -> NoReturn:
        raise RuntimeError(
            f"{type(module).__name__}.{self.method}() merges folded convolutions ({layers}) whose kernels have another "
            f"shape than before, and could not be tried {why}. Call fold_acu(model, example_input=...), which notes "
            f"what each module takes, or merge the whole model instead of a part. {_UNCHANGED}"
        )

    def _names(self, layers: Mapping[str, nn.Module]) -> list[str]:
        return [qualified_name(self.name, name) or "(the model)" for name in layers]


def guard_merging(model: nn.Module, arguments: Mapping[nn.Module, Arguments] | None = None) -> None:
    """Guard the methods of all modules in ``model`` that need it now, and remove the guards of those that do not.

    Args:
        model: any module.
        arguments: with what modules of it are called, tensors on the meta device.
    """
    candidates: dict[type[nn.Module], list[str]] = {}
    for name, module in model.named_modules():
        known = None
        for method, guard in list(vars(module).items()):
            if isinstance(guard, MergingGuard) or getattr(guard, "func", None) in (_refuse, _merge_if_equal):
                known = known or getattr(guard, "arguments", None)
                delattr(module, method)
        if type(module) not in candidates:
            candidates[type(module)] = _candidates(type(module))
        if candidates[type(module)] and any(_layers_to_guard(module)):
            for method in candidates[type(module)]:
                setattr(module, method, MergingGuard(module, method, name, (arguments or {}).get(module, known)))


def may_be_merged(model: nn.Module) -> set[nn.Module]:
    """The active convolutions of ``model`` inside modules with a method that may merge their weights."""
    owners = [module for module in model.modules() if _candidates(type(module))]
    return {layer for owner in owners for layer in owner.modules() if isinstance(layer, ACUConv2d)}


def _candidates(cls: type[nn.Module]) -> list[str]:
    """Methods of ``cls`` that may merge weights, by their names, and can be called without arguments."""
    found = []
    for name in dict.fromkeys(name for base in cls.__mro__ if base is not nn.Module for name in vars(base)):
        method = inspect.getattr_static(cls, name)
        if not _MAY_MERGE.match(name) or not isinstance(method, types.FunctionType):
            continue
        _, *parameters = inspect.signature(method).parameters.values()
        if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            found.append(name)
    return found


def _layers_to_guard(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers in ``module`` that are active, and those whose fold has another shape, by their names."""
    inside = dict(module.named_modules())
    active: dict[str, nn.Module] = {name: layer for name, layer in inside.items() if isinstance(layer, ACUConv2d)}
    return active, {name: layer for name, layer in inside.items() if getattr(layer, RESHAPED, False)}


@contextmanager
def _answering_for_inner_guards() -> Iterator[None]:
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


@contextmanager
def _own_geometry(module: nn.Module) -> Iterator[None]:
    """Let folded layers show the geometry they compute with, which a method that merges them has to know."""
    layers = [layer for layer in module.modules() if isinstance(layer, ReshapedConv2d)]
    for layer in layers:
        layer.show_own_geometry()
    try:
        yield
    finally:
        for layer in layers:
            ReshapedConv2d.show_former_geometry(layer)


def _refuse(owner: str, method: str, layers: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{owner}.{method}() merges weights of active convolutions ({layers}) and would lose their positions; call "
        "lightning_acu.fold_acu(model) first"
    )


# Whole models pickled by version 0.1 have partials of `_refuse` and of this in place of a MergingGuard.
def _merge_if_equal(module: nn.Module, method: str, layers: str, *args: Any, **kwargs: Any) -> Any:
    guard = MergingGuard(module, method)
    guard._names = lambda _: [layers]  # type: ignore[method-assign,assignment]
    return guard(*args, **kwargs)


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


def _still_given(got: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """Those of ``expected`` that ``got`` has, in order, if it has fewer; all of them if it has others.

    A method may drop a branch and what that gives, as fuse() of YOLOv10 and YOLO26 does, but not the first output.
    """
    if not 0 < len(got) < len(expected):
        return expected
    kept, others, limit = expected[:1], iter(expected[1:]), tolerance(expected)
    for tensor in got[1:]:
        same = next((other for other in others if difference([tensor], [other]) <= limit), None)
        if same is None:
            return expected
        kept.append(same)
    return kept


class _NoCopyError(Exception):
    """The module cannot be copied."""


def _run_copy(
    module: nn.Module, arguments: Arguments | None
) -> tuple[nn.Module, Arguments, list[Tensor], Exception | None]:
    """A copy of ``module``, arguments it accepts and its output; without output, why it could not be run.

    In float64 if it runs in that, so that right and wrong are far apart.
    """
    why: Exception | None = None
    for dtype in (torch.float64, None):
        try:
            trial = copy.deepcopy(module)
        except Exception as error:
            raise _NoCopyError from error
        trial = trial if dtype is None else trial.to(dtype)
        for inputs in _images(trial) if arguments is None else [_random(arguments, trial)]:
            try:
                if expected := run(trial, *inputs):
                    return trial, inputs, expected, None
            except Exception as error:  # a size, a layout or a precision that this module does not take
                why = error
    return trial, ((), {}), [], why


def _images(module: nn.Module) -> Iterator[Arguments]:
    """Two images of several sizes, with as many channels as one of the first convolutions takes."""
    convs = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    for channels in list(dict.fromkeys(conv.in_channels for conv in convs))[:4]:
        for size in _TRIAL_SIZES:
            yield _random(((torch.empty(2, channels, *size, dtype=torch.float32, device="meta"),), {}), module)


def _random(arguments: Any, module: nn.Module) -> Any:
    """``arguments`` with random tensors in place of those on the meta device, in the precision of ``module``."""
    like = next(parameter for parameter in module.parameters() if parameter.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def real(meta: Tensor) -> Tensor:
        if not meta.is_floating_point():
            return torch.zeros(meta.shape, dtype=meta.dtype, device=like.device)
        return torch.randn(meta.shape, generator=generator, dtype=torch.float64, device="cpu").to(like)

    return map_tensors(real, arguments)
