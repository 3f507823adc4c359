"""The schedules of :mod:`lightning_acu.training.schedules`, under the name that configuration files use."""

from ..training.schedules import Constant, Cosine, DilationDecay, LatticeDecay, Linear, Schedule, Step, find_schedule

__all__ = ["Constant", "Cosine", "DilationDecay", "LatticeDecay", "Linear", "Schedule", "Step", "find_schedule"]
