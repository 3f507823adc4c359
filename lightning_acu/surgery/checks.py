"""Checks that a model may be changed by surgery."""

from __future__ import annotations

import torch
from torch import nn

from ..checks import find_wrapper, require_module
from ..functional import acu_conv2d

__all__ = ["check_model", "check_not_traced"]


def check_model(model: nn.Module) -> None:
    """Check that surgery may change ``model``, which may be a LightningModule.

    Raises:
        TypeError: ``model`` is not a module; it contains a wrapper that already refers to the parameters (compiled,
            DDP, FSDP); or torch.fx has traced it from active convolutions.
    """
    require_module(model)
    for module in model.modules():
        wrapper = find_wrapper(module)
        if wrapper is not None and wrapper != "LightningModule":
            raise TypeError(f"`model` contains a {wrapper}; convert the plain model first, then compile or wrap it")
    check_not_traced(model)


def check_not_traced(model: nn.Module) -> None:
    """Check that torch.fx has not traced ``model`` from active convolutions.

    Raises:
        TypeError: it has; the model then contains their calls, but no layers to work on.
    """
    for module in model.modules():
        if isinstance(module, torch.fx.GraphModule) and any(n.target is acu_conv2d for n in module.graph.nodes):
            raise TypeError(
                "`model` contains a GraphModule that torch.fx traced from active convolutions, which are no longer its "
                "layers; round or fold the model before tracing, or trace the plain model and convert that"
            )
