"""Any timm or torchvision model by its name.

If timm is installed, importing this module also registers the networks of the paper's CIFAR experiments with it
(:mod:`lightning_acu.models.cifar`); ``import lightning_acu`` alone does not.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
import torchvision
from torch import nn

from ..checks import require_package, whole_number
from ..choices import did_you_mean

_HAS_TIMM = find_spec("timm") is not None
if _HAS_TIMM:
    import timm

    from . import cifar as cifar  # registers its networks

__all__ = ["create_model"]

_TORCHVISION = "torchvision/"


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int = 1000,
    in_chans: int = 3,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name: "resnet18" is timm's, "torchvision/resnet18" is torchvision's.

    Args:
        name: a timm name (also "name.tag" and "hf-hub:..."), or "torchvision/" and a torchvision name.
        pretrained: load published weights (downloads them on first use). Of the layers whose shape
            ``num_classes`` or ``in_chans`` changes, the head keeps its random initialisation, and the first convolution
            is adapted as timm does.
        num_classes: classes of the head; 0: no head, where timm has such models.
        in_chans: channels of the image.
        **kwargs: passed on to the model.

    Raises:
        ModuleNotFoundError: timm is needed to build the model or to adapt its weights, and is not installed.
        TypeError: ``name`` is not a str, or a number is not a whole one.
        RuntimeError: published weights could not be downloaded.
        ValueError: an unknown name, with the nearest known ones; or a number is too small.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"`model` (={name!r}) must be the name of a model, such as 'resnet18' or 'torchvision/resnet18'"
        )
    num_classes, in_chans = whole_number("num_classes", num_classes), whole_number("in_chans", in_chans, 1)
    if name.startswith(_TORCHVISION):
        return _torchvision_model(name.removeprefix(_TORCHVISION), pretrained, num_classes, in_chans, kwargs)
    require_package("timm", f"`name` (={name!r}, a name of timm's; those of torchvision begin with {_TORCHVISION!r})")
    if ":" not in name:
        architecture, _, tag = name.partition(".")
        if not timm.is_model(architecture):
            raise ValueError(_unknown(name))
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise ValueError(
                f"`model` (={name!r}): {architecture} has no weights called {tag!r}; it has {', '.join(tags) or 'none'}"
            )
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **kwargs
        )
    except OSError as error:
        raise _not_fetched(name, error) if pretrained else error from error
    return model


def _not_fetched(name: str, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"`pretrained` (=True): the weights of {name!r} could not be downloaded, nor found in the cache "
        f"({type(error).__name__}); try again with a network, or `pretrained`=False"
    )


def _unknown(name: str) -> str:
    torchvision_names = torchvision.models.list_models()
    if name in torchvision_names:
        return f"`model` (={name!r}) is a torchvision model, not a timm model; write {_TORCHVISION + name!r}"
    known = [*(timm.list_models() if _HAS_TIMM else ()), *(_TORCHVISION + known for known in torchvision_names)]
    hint = did_you_mean(name, known, most=3) or "; timm.list_models() lists timm's"
    return f"`model` (={name!r}) is neither a timm model nor {_TORCHVISION!r} and a torchvision model{hint}"


def _torchvision_model(
    name: str, pretrained: bool, num_classes: int, in_chans: int, kwargs: dict[str, Any]
) -> nn.Module:
    if name not in torchvision.models.list_models():
        raise ValueError(_unknown(_TORCHVISION + name))
    kwargs = {"weights": None, "num_classes": num_classes} | kwargs
    if name.startswith("raft") and num_classes == 1000:
        del kwargs["num_classes"]  # optical flow has no classes
    if "weights_backbone" in torchvision.models.get_model_builder(name).__annotations__:
        kwargs.setdefault("weights_backbone", None)  # segmentation models would download one
    if name in ("inception_v3", "googlenet"):  # as torchvision's own loading of weights does
        kwargs.setdefault("init_weights", not pretrained)
        if pretrained:
            kwargs.setdefault("transform_input", in_chans == 3)  # it normalises the three colours again
    model: nn.Module = torchvision.models.get_model(name, **kwargs)
    state: dict[str, torch.Tensor] = {}
    if pretrained:
        try:
            state = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise _not_fetched(_TORCHVISION + name, error) from error
    first_name, first = next(((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)), ("", None))
    if in_chans != (3 if first is None else first.in_channels):
        if first is None:
            raise ValueError(f"`in_chans` (={in_chans}): {name} has no 2-D convolution to change")
        if first.groups != 1:
            raise ValueError(
                f"`in_chans` (={in_chans}): the first convolution of {name} is grouped and cannot be changed"
            )
        _change_input(first, in_chans)
        if pretrained:
            require_package("timm", f"`in_chans` (={in_chans}): adapting published weights to the image's channels")
            key = f"{first_name}.weight"
            state[key] = timm.models.adapt_input_conv(in_chans, state[key])
    if pretrained:
        _load_what_fits(model, state, name)
    return model


def _change_input(conv: nn.Conv2d, in_chans: int) -> None:
    """Give ``conv`` another number of input channels, in place, so that names and hooks survive; newly initialised."""
    conv.in_channels = in_chans
    conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_chans, *conv.kernel_size))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def _load_what_fits(model: nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Load all published weights except those whose shape ``num_classes`` changes; log which those are."""
    own = model.state_dict()
    fitting = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(fitting, strict=False)
    new = sorted(own.keys() - fitting.keys())
    if new:
        _inform(
            f"{name}: these keep their random initialisation, because the published weights have other shapes: {new}"
        )


def _inform(message: str) -> None:
    """Log once for all processes if Lightning is installed; else by Python's logging."""
    if find_spec("lightning"):
        from lightning.pytorch.utilities import rank_zero_info

        rank_zero_info(message)
    else:
        logging.getLogger(__name__).info(message)
