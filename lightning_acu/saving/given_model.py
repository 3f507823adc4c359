"""Load what a file holds into a model of the caller's, or leave that as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..checks import WRAPPERS, few, find_wrapper, qualified_name
from ..conv import acu_layers
from ..sharded import is_sharded
from ..surgery.guards import guard_merging
from ..surgery.transformers_guards import guard_transformers
from .record import Record
from .restore import restore_layers

__all__ = ["check_layers", "load_into", "require_unwrapped"]


def load_into(model: nn.Module, record: Record, state: Mapping[str, Tensor]) -> None:
    """Convert exactly the layers of ``record``, in place, and load ``state``; the model is not changed on failure.

    Args:
        model: plain, or converted as the recorded model was, or partly.
        record: one that has passed :func:`~lightning_acu.saving.record.check_record`.
        state: the tensors of the file, without aliases.

    Raises:
        ValueError: something does not fit; the message names it.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError('it has tensors on the meta device; give them memory first: model.to_empty(device="cpu")')
    state = {**state, **{key: state[first] for key, first in record["aliases"].items()}}
    with _unchanged_on_failure(model):
        try:
            restore_layers(model, record["layers"])
            own: dict[str, Any] = model.state_dict(keep_vars=True)
            for difference in (own.keys() - state.keys(), state.keys() - own.keys()):
                if difference:
                    what = "the file does not have" if difference <= own.keys() else "the model does not have"
                    raise ValueError(f"{what} {few(sorted(difference))}")
            for key, tensor in own.items():
                if tensor.shape != state[key].shape:
                    shapes = f"{tuple(tensor.shape)} in the model and {tuple(state[key].shape)} in the file"
                    raise ValueError(f"the shape of {key} is {shapes}")
            check_layers(model, record, state)
            model.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError) as error:  # of hooks and methods of the model's own
            raise ValueError(str(error)) from error


def check_layers(model: nn.Module, record: Record, state: Mapping[str, Tensor]) -> None:
    """Check what ``record`` and ``state`` say of the active layers of ``model`` against their numbers of taps.

    Raises:
        ValueError: something differs, or the positions of a layer are missing.
    """
    for name, layer in acu_layers(model):
        taps = layer.geometry.taps
        if (key := qualified_name(name, "offsets")) not in state:
            raise ValueError(f"the file has no {key!r}")
        if layer.fixed_tap is not None and layer.fixed_tap >= taps:
            raise ValueError(
                f"`fixed_tap` (={layer.fixed_tap}) of {name} must be less than its number of taps (={taps})"
            )
        if layer.start is not None and len(layer.start) != taps:
            raise ValueError(f"`start` of {name} has {len(layer.start)} positions for {taps} taps")


def require_unwrapped(model: nn.Module, what: str) -> None:
    """Check that ``model`` is not a wrapper, nor sharded, before one does ``what`` to it ("save").

    Raises:
        TypeError: it is.
    """
    if (wrapper := find_wrapper(model)) is not None:
        raise TypeError(f"`model` (={type(model).__name__}) is a {wrapper}; {what} {WRAPPERS[wrapper]}")
    if any(map(is_sharded, model.parameters())):
        raise TypeError(
            f"`model` (={type(model).__name__}) is sharded over processes; load its full state_dict into an "
            f"unsharded copy and {what} that"
        )


@contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Undo what the block did to convolutions and values of ``model`` if it raises."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    before = [(conv, type(conv), {k: dict(v) if isinstance(v, dict) else v for k, v in vars(conv).items()})
              for conv in convs]  # fmt: skip
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for conv, cls, state in before:
            conv.__class__ = cls
            vars(conv).clear()
            vars(conv).update(state)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data.copy_(value)
        guard_merging(model)
        guard_transformers(model)
        raise
