"""Surgery on whole models: to active convolutions, and back."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import efficientnet_rules as efficientnet_rules
from . import transformers_rules as transformers_rules
from .activate import Activation, activate
from .convert import ConvertConfig, convert_to_acu
from .convert_like import convert_like
from .dilations import apply_dilations
from .fold import fold_acu, round_acu
from .guards import MergingGuard
from .marks import was_folded
from .patterns import NoEffectWarning
from .report import ACUReport, ConvRow, report_acu
from .rules import register_rule, why_not_convertible

__all__ = [
    "ACUReport",
    "Activation",
    "ConvRow",
    "ConvertConfig",
    "MergingGuard",
    "NoEffectWarning",
    "activate",
    "acu_state_dict",
    "apply_dilations",
    "convert_like",
    "convert_to_acu",
    "fold_acu",
    "load_acu_state_dict",
    "register_rule",
    "report_acu",
    "round_acu",
    "was_folded",
    "why_not_convertible",
]

if find_spec("timm"):  # registers the rules for its classes
    from . import timm_rules as timm_rules


def __getattr__(name: str) -> Any:
    if name in ("acu_state_dict", "load_acu_state_dict"):  # where they were before they moved to `saving`
        return getattr(import_module("lightning_acu.saving"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
