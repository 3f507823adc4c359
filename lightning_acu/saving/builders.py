"""Functions that build a model, by name: "package.module:function" is recorded, and imported only where allowed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

__all__ = [
    "Builder",
    "builder_name",
    "call_builder",
    "find_builder",
    "is_builder_name",
    "is_transformers",
    "own_builder",
    "safe_config",
]

#: Returns a model; or the class of a model.
Builder = Callable[..., nn.Module]

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")

#: Fields of a configuration of transformers with which a file could make its reader fetch weights or code. None of them
#: changes what is built: the weights are in the file, and attention has the same parameters however it is computed.
_FETCHING = re.compile(
    "_?(attn|experts)_implementation.*|auto_map|fusion_config|kernel_config|quantization_config|use_kernels"
    "|use_pretrained_backbone|backbone_checkpoint|transformers_weights|trust_remote_code|_?name_or_path"
)


def is_builder_name(name: str) -> bool:
    """Whether ``name`` has the form "package.module:function"."""
    return _NAME.fullmatch(name) is not None


def builder_name(builder: Builder | str) -> str:
    """The name under which ``builder`` can be imported; a name stays as it is.

    Raises:
        TypeError: ``builder`` is neither a function nor a class nor a str.
        ValueError: it cannot be imported by a name: a lambda, a function inside another, or another one of that name.
    """
    if isinstance(builder, str):
        if not is_builder_name(builder):
            raise ValueError(f'`builder` (={builder!r}) must have the form "package.module:function"')
        return builder
    module, qualname = (getattr(builder, key, None) for key in ("__module__", "__qualname__"))
    if not callable(builder) or not isinstance(module, str) or not isinstance(qualname, str):
        raise TypeError(
            f'`builder` (={builder!r}) must be a function, the class of a model or "package.module:function"; give '
            "arguments as `kwargs`, not in a functools.partial"
        )
    name = f"{module}:{qualname}"
    try:
        found = find_builder(name) if is_builder_name(name) else None
    except ValueError:
        found = None
    if found != builder:
        raise ValueError(
            f"`builder` (={name}) cannot be found by that name, which is what a file has of it: a lambda, a function "
            "inside another one and a bound method cannot. Define it at the top level of a module"
        )
    return name


def find_builder(name: str) -> Builder:
    """Import the function that ``name`` names. This runs the code of its module.

    Raises:
        ValueError: it cannot be imported, or is not callable.
    """
    module, _, qualname = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module can raise anything
        raise ValueError(f"the builder {name!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"the builder {name!r} is not a function but a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def call_builder(builder: Builder, kwargs: dict[str, Any]) -> nn.Module:
    """The model that ``builder`` builds; for a class of Hugging Face's transformers, ``kwargs`` are its configuration.

    Raises:
        TypeError: it returns something other than a module; and whatever it raises.
    """
    model = builder(safe_config(builder, kwargs)) if is_transformers(builder) else builder(**kwargs)
    if not isinstance(model, nn.Module):
        raise TypeError(f"it returned a {type(model).__name__}, not an nn.Module")
    return model


def own_builder(model: nn.Module) -> tuple[Builder, dict[str, Any]] | None:
    """The class and the configuration of a model of Hugging Face's transformers; None for other models."""
    cls: Any = type(model)
    if not is_transformers(cls):
        return None
    config: Any = model.config
    return cls, _without_fetching(config.to_diff_dict())


def safe_config(cls: Any, content: dict[str, Any]) -> Any:
    """The configuration of a class of transformers, without what would fetch weights or code."""
    config = cls.config_class.from_dict(_without_fetching(content))
    if getattr(config, "use_pretrained_backbone", False):  # the default of some
        config.use_pretrained_backbone = False
    return config


def is_transformers(builder: Any) -> bool:
    """Whether ``builder`` is a class of models of transformers, which is imported already if it is."""
    module = sys.modules.get("transformers.modeling_utils")
    base = getattr(module, "PreTrainedModel", None)
    return base is not None and isinstance(builder, type) and issubclass(builder, base)


def _without_fetching(content: Any) -> Any:
    """``content`` without the fields that fetch something, at every depth."""
    if isinstance(content, list | tuple):
        return [_without_fetching(part) for part in content]
    if not isinstance(content, dict):
        return content
    kept = {key: value for key, value in content.items() if not (isinstance(key, str) and _FETCHING.fullmatch(key))}
    return {key: _without_fetching(value) for key, value in kept.items()}
