"""The groups of positions in one optimizer, and what they carry into its ``state_dict``: the steps it has taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..conv import ACUConv2d
from .averages import trained_layers
from .param_groups import add_late_positions, is_position_group, split_off_positions
from .position_rates import PositionRates

__all__ = ["CountedGroups"]

#: Keys of a group: steps taken; whether positions were rounded.
_STEP, _ROUNDED = "acu_step", "acu_rounded"


class CountedGroups:
    """Splits the positions of ``model`` off the groups of ``optimizer``; positions of weights it holds are added.

    Args:
        optimizer: the optimizer.
        model: the model.
        schedulers: its schedulers that exist already.
        rates: of positions.
        steps: in which they learn; inf if not known.
        weight_decay: for positions.

    Raises:
        ValueError: the optimizer holds neither positions nor weights of active convolutions.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        schedulers: Sequence[Any],
        rates: PositionRates,
        steps: float,
        weight_decay: float,
    ) -> None:
        self._optimizer, self._model, self._schedulers = optimizer, model, schedulers
        self._rates, self._steps, self._weight_decay = rates, steps, weight_decay
        self._split()
        if not self.layers:
            raise ValueError(
                f"`optimizer` ({type(optimizer).__name__}) holds neither positions of `model` nor weights of its "
                "active convolutions; make it from model.parameters()"
            )
        for group in self._groups():
            group["weight_decay"] = weight_decay  # also where they were split off before

    @property
    def step(self) -> int:
        """How many steps the optimizer has taken."""
        return int(self._read(_STEP))

    @property
    def rounded(self) -> bool:
        """Whether positions were rounded."""
        return bool(self._read(_ROUNDED))

    def write(self, step: int, rounded: bool) -> None:
        """Set both."""
        for group in self._groups():
            group.update({_STEP: step, _ROUNDED: rounded})

    def tie(self, factor: float) -> None:
        """Set the learning rates of positions; split off those that came with groups that were added since."""
        if len(self._optimizer.param_groups) != self._count:
            self._split()
        self._rates.find(self._optimizer, self._steps)  # also where a state was loaded that has none
        self._rates.tie(self._optimizer, factor)

    def rate(self, layer: ACUConv2d) -> float:
        """The learning rate of the positions of ``layer``."""
        held = (group for group in self._groups() if any(layer.offsets is parameter for parameter in group["params"]))
        return float(next(held)["lr"])

    def _split(self) -> None:
        layers = trained_layers(self._model)
        add_late_positions([self._optimizer], layers)
        offsets = [layer.offsets for _, layer in layers]
        multiplier, decay = self._rates.multiplier, self._weight_decay
        held = split_off_positions(self._optimizer, self._schedulers, offsets, multiplier, decay)
        self._rates.find(self._optimizer, self._steps)
        ids = {id(parameter) for parameter in held}
        #: (name, layer) of those whose positions the optimizer holds.
        self.layers = [(name, layer) for name, layer in layers if id(layer.offsets) in ids]
        self._count = len(self._optimizer.param_groups)
        first = next(self._groups(), {})
        self.write(first.get(_STEP, 0), first.get(_ROUNDED, False))

    def _groups(self) -> Iterator[dict[str, Any]]:
        return filter(is_position_group, self._optimizer.param_groups)

    def _read(self, key: str) -> Any:
        group = next(self._groups())  # load_state_dict of the optimizer replaces it
        if key not in group:
            raise RuntimeError(
                f"the state that was loaded into {type(self._optimizer).__name__} was saved without a PositionTrainer; "
                "call load_state_dict({'step': ..., 'rounded': ...}) of the PositionTrainer after it"
            )
        return group[key]
