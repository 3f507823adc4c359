"""Lightning callbacks that convert a model, train its positions well, show them and round them.

They say when; what is done then stands in :mod:`lightning_acu.training`, which needs no Lightning.
"""

from . import schedules
from ._stages import evaluate_stages
from .convert import ConvertToACU
from .offset_logger import OffsetLogger
from .position_lr import PositionLRSchedule
from .round_then_finetune import RoundThenFinetune

__all__ = [
    "ConvertToACU",
    "OffsetLogger",
    "PositionLRSchedule",
    "RoundThenFinetune",
    "evaluate_stages",
    "schedules",
]
