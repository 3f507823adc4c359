"""A guard for ``save_pretrained`` of Hugging Face's transformers, whose ``from_pretrained`` would drop the positions.

``save_pretrained`` writes the positions, but ``from_pretrained`` builds a plain model, has no place for them, and says
so in a table of its log only. The guard records in the folder's ``config.json`` how the layers were converted.
:func:`lightning_acu.from_pretrained` needs that, and ``from_pretrained`` of transformers refuses the folder.
"""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import torch
from torch import nn

from ..conv import acu_layers
from .recorded import layer_records

__all__ = ["CONFIG_KEY", "SavingGuard", "guard_saving"]

#: In config.json: how the layers were converted.
CONFIG_KEY = "lightning_acu"

#: A fusion in transformers replaces modules while a model is loaded. It refuses those that it does not know, by name.
_FUSION = "none, but active convolutions: load this folder with lightning_acu.from_pretrained(folder, builder=TheClass)"


class SavingGuard:
    """Stands before ``save_pretrained`` of a model of transformers, as an attribute of the instance.

    The method runs as ever, with two more entries in its ``config.json``; none if the class of the model itself
    converts the same layers when it is built. It is copied and pickled with its model, and does not keep it alive.

    Args:
        module: the model.

    Raises:
        ReferenceError: when called after ``module`` is gone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __reduce__(self) -> tuple[type[SavingGuard], tuple[nn.Module | None]]:
        return type(self), (self._module(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        module = self._module()
        if module is None:
            raise ReferenceError(
                "the model of this save_pretrained() does not exist any more; keep it in a variable until the call "
                "returns"
            )
        cls: Any = type(module)
        config: Any = module.config
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


def guard_saving(model: nn.Module) -> None:
    """Guard the models of transformers in ``model`` that have active layers, and remove the guards of others."""
    transformers = sys.modules.get("transformers.modeling_utils")
    base = getattr(transformers, "PreTrainedModel", ())  # not imported: there is no model of it
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), SavingGuard):
            del module.save_pretrained
        if isinstance(module, base) and any(acu_layers(module)):
            vars(module)["save_pretrained"] = SavingGuard(module)


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
