"""The schedules of :mod:`lightning_acu.training.schedules`, under the name that configuration files use."""

from ..training.schedules import Constant, Cosine, LatticeDecay, Linear, Schedule, Step, find_schedule

__all__ = ["Constant", "Cosine", "LatticeDecay", "Linear", "Schedule", "Step", "find_schedule"]
