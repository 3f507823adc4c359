"""Measuring beforehand which backend each layer of a model takes, so that no training step waits for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .checks import require_module
from .ops.autoselect import Call, Selector, Verdict, planning, recording, selector_of
from .ops.cpu.backend import is_faster_by_rule

__all__ = ["model_calls", "rule_of", "tune_calls", "warm_up"]


def warm_up(model: nn.Module, example_input: Any) -> dict[str, str]:
    """Measure which backend is fastest for each active convolution of ``model``, and keep that for later processes.

    ``backend="auto"`` does the same on a GPU at the first call of each layer; on a CPU it follows a rule until this was
    called. Call it under the autocast that the model will run in, and before it is wrapped (DDP, torch.compile) or
    captured in a CUDA graph. One forward pass in eval mode shows the sizes; the model stays as it is. Nothing is
    measured with ``LIGHTNING_ACU_AUTO=rules`` or ``off``, with deterministic algorithms, or for what is known already.

    Args:
        model: where it will run; layers that have another backend than "auto" are left out.
        example_input: a batch (N, C, H, W) as in training; or a tuple of positional arguments.

    Returns:
        {what was called, such as "forward, float32, 64->64, 3x3, ...": backend}.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` neither a tensor nor a tuple.
        ValueError: the environment variable ``LIGHTNING_ACU_AUTO`` has an unknown value.
    """
    require_module(model)
    if not isinstance(example_input, (Tensor, tuple)):
        kind = type(example_input).__name__
        raise TypeError(f"`example_input` (={example_input!r}) must be a tensor or a tuple of arguments, got {kind}")
    calls = model_calls(model, example_input)
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    by_type = {device.type: device for device in devices}
    found = {}
    for call in calls:
        selector = selector_of(by_type.get(call.device, torch.device(call.device)))
        if selector.mode == "off" or torch.are_deterministic_algorithms_enabled():
            continue
        for one, verdict in tune_calls([call], selector):
            found[one.signature] = verdict.backend or rule_of(one)
    return found


def model_calls(model: nn.Module, example_input: Any) -> list[Call]:
    """The calls of the operator in one pass of ``model`` in eval mode, one of each signature.

    Those of the backward pass are among them where parameters require gradients.
    """
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    with _in_eval_mode(model), planning(), recording() as calls, torch.enable_grad():
        model(*arguments)
    return list({call.signature: call for call in calls}.values())


def rule_of(call: Call) -> str:
    """The backend that takes ``call`` where nothing was measured."""
    if call.device == "cpu":
        faster = is_faster_by_rule(call.weight, call.geometry, call.position_groups, call.needs is not None)
        return "cython" if faster else "dense"
    return "dense"


def tune_calls(calls: Iterable[Call], selector: Selector, again: bool = False) -> Iterator[tuple[Call, Verdict]]:
    """Measure each of ``calls``, unless it is known; ``again``: in any case."""
    for call in calls:
        yield call, selector.measure(call, rule_of(call), again=again)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Not ``model.eval()``, which some models override to merge their weights."""
    training = {module: module.training for module in model.modules()}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
