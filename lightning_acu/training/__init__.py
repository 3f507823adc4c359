"""How positions are trained, in any loop: plain functions on torch's modules, optimizers and schedulers, no trainer.

The parts, in the order in which a training meets them:

* :mod:`.param_groups`: positions in a parameter group of their own, at a share of the weights' learning rate;
* :mod:`.schedules`: how that share runs over the steps in which positions learn;
* :mod:`.gradients`: gradients of unit length before a step, taps kept near or drawn to whole pixels after it;
* :mod:`.rounding`: all positions to whole pixels, for fine-tuning;
* :mod:`.averages`: averaged copies of the model, which are to get the same whole positions.

The callbacks (:mod:`lightning_acu.callbacks`) are its shell for Lightning.
"""

from .averages import averaged_layers, averaged_models, is_average, keep_rounded_, trained_layers
from .gradients import apply_to_pairs_, confine_positions_, normalize_gradients_, unit_vectors
from .param_groups import (
    GROUP_NAME,
    add_late_positions,
    is_position_group,
    parameter_ids,
    rate_ratios,
    restart_rates,
    set_learning_rate,
    split_off_positions,
    tie_learning_rates,
)
from .rounding import Collision, RoundingReport, check_collision, round_layers
from .schedules import Constant, Cosine, LatticeDecay, Linear, Schedule, Step, find_schedule

__all__ = [
    "GROUP_NAME",
    "Collision",
    "Constant",
    "Cosine",
    "LatticeDecay",
    "Linear",
    "RoundingReport",
    "Schedule",
    "Step",
    "add_late_positions",
    "apply_to_pairs_",
    "averaged_layers",
    "averaged_models",
    "check_collision",
    "confine_positions_",
    "find_schedule",
    "is_average",
    "is_position_group",
    "keep_rounded_",
    "normalize_gradients_",
    "parameter_ids",
    "rate_ratios",
    "restart_rates",
    "round_layers",
    "set_learning_rate",
    "split_off_positions",
    "tie_learning_rates",
    "trained_layers",
    "unit_vectors",
]
