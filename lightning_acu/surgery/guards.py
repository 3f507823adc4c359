"""Methods that read ``conv.weight`` and would lose the positions: they raise until the model is folded.

RepVGG, RepViT, MobileOne, LeViT and others merge branches and norms into one kernel (timm's ``reparameterize_model``
calls them all). They see an active convolution as the nn.Conv2d it derives from, and would silently drop its shape.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn

from ..conv import ACUConv2d

__all__ = ["guard_merging", "unguard_merging"]

#: The methods that timm's ``reparameterize_model`` and the models' own recipes call.
_MERGING = ("fuse", "reparameterize", "switch_to_deploy")


def guard_merging(model: nn.Module) -> None:
    """Let those methods raise, in every module of ``model`` that holds an active convolution."""
    for module in model.modules():
        names = [name for name in _MERGING if callable(getattr(type(module), name, None))]  # methods, no layers
        if names and any(isinstance(inner, ACUConv2d) for inner in module.modules()):
            # In the instance, over the method of its class; a partial can be copied and pickled with the model.
            vars(module).update({name: functools.partial(_refuse, type(module).__name__, name) for name in names})


def unguard_merging(model: nn.Module) -> None:
    """Give ``model`` its own methods back."""
    for module in model.modules():
        for name in _MERGING:
            if getattr(vars(module).get(name), "func", None) is _refuse:
                del vars(module)[name]


def _refuse(owner: str, method: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"{owner}.{method}() merges the weights of active convolutions without their positions, which would be lost; "
        "call lightning_acu.fold_acu(model) first"
    )
