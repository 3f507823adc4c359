"""Training of positions in any loop: plain functions on torch's modules, optimizers and schedulers, without a trainer.

In the order in which a training needs them:

* :mod:`.param_groups`: a parameter group for positions, with a learning rate tied to that of the weights;
* :mod:`.position_rates`: that learning rate at each step, and one found from how far taps should move;
* :mod:`.schedules`: factors on that learning rate over the steps in which positions learn;
* :mod:`.gradients`: unit gradients and a guard against nan before a step; after it, a limit on displacement and a pull
  towards whole pixels or dilated grids;
* :mod:`.position_gradients`: all that is done to gradients around a step, with a choice of how they are normalised;
* :mod:`.rounding`: rounding of all positions to whole pixels or to dilated grids, before fine-tuning;
* :mod:`.averages`: averaged copies of the model, which have to get the same rounded positions;
* :mod:`.copies`: copies of its positions of any other kind.

:class:`PositionTrainer` does all of it from the hooks of any torch optimizer.

The callbacks in :mod:`lightning_acu.callbacks` call these functions from Lightning's hooks.
"""

from .averages import averaged_layers, averaged_models, is_average, keep_rounded_, trained_layers
from .copies import PositionCopy, copied_positions, hold_copies_, hold_copies_in_, on_whole_pixels
from .early_word import early_word, time_for_a_word
from .gradients import (
    NonFiniteGuard,
    apply_to_pairs_,
    confine_positions_,
    drop_gradients_,
    normalize_gradients_,
    unit_vectors,
)
from .param_groups import (
    GROUP_NAME,
    add_late_positions,
    is_position_group,
    parameter_ids,
    rate_ratios,
    restart_rates,
    set_learning_rate,
    source_group,
    split_off_positions,
    tie_learning_rates,
)
from .position_gradients import Normalize, PositionGradients, find_normalize, unused_positions
from .position_plan import LearningPhase, PositionPlan
from .position_rates import Multiplier, PositionRates
from .position_trainer import PositionTrainer
from .rounding import (
    Collision,
    LayerRounding,
    RoundingReport,
    check_collision,
    check_finite,
    check_fold_after_rounding,
    compute_as_plain,
    round_and_freeze,
    round_layers,
)
from .schedules import Constant, Cosine, DilationDecay, LatticeDecay, Linear, Schedule, Step, find_schedule

__all__ = [
    "GROUP_NAME",
    "Collision",
    "Constant",
    "Cosine",
    "DilationDecay",
    "LatticeDecay",
    "LayerRounding",
    "LearningPhase",
    "Linear",
    "Multiplier",
    "NonFiniteGuard",
    "Normalize",
    "PositionCopy",
    "PositionGradients",
    "PositionPlan",
    "PositionRates",
    "PositionTrainer",
    "RoundingReport",
    "Schedule",
    "Step",
    "add_late_positions",
    "apply_to_pairs_",
    "averaged_layers",
    "averaged_models",
    "check_collision",
    "check_finite",
    "check_fold_after_rounding",
    "compute_as_plain",
    "confine_positions_",
    "copied_positions",
    "drop_gradients_",
    "early_word",
    "find_normalize",
    "find_schedule",
    "hold_copies_",
    "hold_copies_in_",
    "is_average",
    "is_position_group",
    "keep_rounded_",
    "normalize_gradients_",
    "on_whole_pixels",
    "parameter_ids",
    "rate_ratios",
    "restart_rates",
    "round_and_freeze",
    "round_layers",
    "set_learning_rate",
    "source_group",
    "split_off_positions",
    "tie_learning_rates",
    "time_for_a_word",
    "trained_layers",
    "unit_vectors",
    "unused_positions",
]
