"""Lightning callbacks that train positions well."""

from .offset_logger import OffsetLogger
from .position_lr import PositionLRSchedule
from .round_then_finetune import RoundThenFinetune

__all__ = ["OffsetLogger", "PositionLRSchedule", "RoundThenFinetune"]
