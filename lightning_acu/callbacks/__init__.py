"""Lightning callbacks that convert a model, train its positions well, show them and round them."""

from . import schedules
from .convert import ConvertToACU
from .offset_logger import OffsetLogger
from .position_lr import PositionLRSchedule
from .round_then_finetune import RoundThenFinetune

__all__ = ["ConvertToACU", "OffsetLogger", "PositionLRSchedule", "RoundThenFinetune", "schedules"]
