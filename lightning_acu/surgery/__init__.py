"""Surgery on whole models: to active convolutions, and back."""

from .convert import ConvertConfig, NoEffectWarning, convert_to_acu
from .fold import fold_acu, round_acu, was_folded
from .report import ACUReport, ConvRow, report_acu
from .rules import register_rule, why_not_convertible

__all__ = [
    "ACUReport",
    "ConvRow",
    "ConvertConfig",
    "NoEffectWarning",
    "convert_to_acu",
    "fold_acu",
    "register_rule",
    "report_acu",
    "round_acu",
    "was_folded",
    "why_not_convertible",
]
