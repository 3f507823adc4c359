"""Guards for models of Hugging Face's transformers, which knows nothing of positions when it saves and loads.

``save_pretrained`` writes the positions, but ``from_pretrained`` builds a plain model, has no place for them, and says
so in a table of its log only. A guard of ``save_pretrained`` records in the folder's ``config.json`` how the layers
were converted. :func:`lightning_acu.from_pretrained` needs that, and ``from_pretrained`` of transformers refuses the
folder.

A class that converts itself in ``__init__`` can be loaded by transformers. If the weights are those of a plain model,
new parameters are memory that was never written, until ``_init_weights`` fills them. A guard of that fills ``offsets``.
"""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import torch
from torch import nn

from ..conv import ACUConv2d, acu_layers
from .recorded import layer_records

__all__ = ["CONFIG_KEY", "InitGuard", "SavingGuard", "guard_transformers"]

#: In config.json: how the layers were converted.
CONFIG_KEY = "lightning_acu"

#: A fusion in transformers replaces modules while a model is loaded. It refuses those that it does not know, by name.
_FUSION = "none, but active convolutions: load this folder with lightning_acu.from_pretrained(folder, builder=TheClass)"


class _Guard:
    """Stands before a method, as an attribute of the instance; it is copied and pickled with it.

    Args:
        module: the model whose method is guarded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __reduce__(self) -> tuple[type[_Guard], tuple[nn.Module | None]]:
        return type(self), (self._module(),)

    def _owner(self) -> Any:
        """The model.

        Raises:
            ReferenceError: it is gone.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(
                "the model of this guarded method does not exist any more; keep it in a variable until the call returns"
            )
        return module


class SavingGuard(_Guard):
    """Stands before ``save_pretrained`` of a model of transformers.

    The method runs as ever, with two more entries in its ``config.json``; none if the class of the model itself
    converts the same layers when it is built.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        module = self._owner()
        cls, config = type(module), module.config
        before = dict(vars(config))
        if not _converts_itself(module):
            builder = f"{cls.__module__}:{cls.__qualname__}"
            record = {"format_version": 2, "builder": builder, "layers": layer_records(module)}
            setattr(config, CONFIG_KEY, record)
            config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), _FUSION: True}
        try:
            return cls.save_pretrained(module, *args, **kwargs)
        finally:
            for key in (CONFIG_KEY, "fusion_config"):
                if key in before:
                    setattr(config, key, before[key])
                elif key in vars(config):
                    delattr(config, key)


class InitGuard(_Guard):
    """Stands before ``_init_weights`` of a model of transformers, and moves taps that have no values yet to the start.

    transformers marks the parameters that it has loaded.
    """

    def __call__(self, module: nn.Module) -> None:
        """Initialise ``module``, a part of the model."""
        owner = self._owner()
        type(owner)._init_weights(owner, module)
        if isinstance(module, ACUConv2d) and not getattr(module.offsets, "_is_hf_initialized", False):
            with torch.no_grad():
                module.offsets.copy_(module.starting_offsets().flatten())


#: The methods of models of transformers that are guarded.
_GUARDS: dict[str, type[_Guard]] = {"save_pretrained": SavingGuard, "_init_weights": InitGuard}


def guard_transformers(model: nn.Module) -> None:
    """Guard the models of transformers in ``model`` that have active layers, and remove the guards of others."""
    transformers = sys.modules.get("transformers.modeling_utils")
    base = getattr(transformers, "PreTrainedModel", ())  # not imported: there is no model of it
    for module in model.modules():
        if not isinstance(module, base):
            continue
        for method, guard in _GUARDS.items():
            if isinstance(vars(module).get(method), guard):
                delattr(module, method)
            if any(acu_layers(module)):
                vars(module)[method] = guard(module)


def _converts_itself(module: nn.Module) -> bool:
    """Whether the class of ``module`` builds the same active layers, so that its ``from_pretrained`` knows them."""
    cls: Any = type(module)
    config: Any = module.config
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            built = cls(copy.deepcopy(config))
    except Exception:  # a class that needs more than a configuration, or real tensors
        return False
    return layer_records(built) == layer_records(module)
