"""Lightning callbacks that convert a model, train its positions, log them and round them.

They decide when something is done to positions; what is done is in :mod:`lightning_acu.training`, which works without
Lightning.
"""

from . import schedules
from .checkpoint_after_rounding import CheckpointAfterRounding
from .convert import ConvertToACU
from .offset_logger import OffsetLogger
from .position_lr import PositionLRSchedule
from .round_then_finetune import RoundThenFinetune
from .stages import evaluate_stages

__all__ = [
    "CheckpointAfterRounding",
    "ConvertToACU",
    "OffsetLogger",
    "PositionLRSchedule",
    "RoundThenFinetune",
    "evaluate_stages",
    "schedules",
]
