"""How far the taps of a model have moved, as torchmetrics Metrics over :mod:`lightning_acu.statistics`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from .statistics import LayerStatistics, layer_statistics, model_statistics

__all__ = [
    "Collisions",
    "LayerStatistics",
    "MaxDisplacement",
    "MeanDisplacement",
    "OffLattice",
    "ReceptiveRadius",
    "layer_statistics",
    "model_statistics",
    "position_metrics",
]


class _PositionMetric(Metric):
    """The base of Metrics over the active convolutions given to ``update``; 0 before there were any.

    Every process has the same positions, so nothing is exchanged between processes.
    """

    full_state_update = True  # else `forward` merges states by their reduction, which is one over processes here
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="mean")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="mean")

    def update(self, layers: nn.Module | LayerStatistics) -> None:
        """Take in every active convolution of a model, one layer, or the statistics of one."""
        rows = [layers] if isinstance(layers, LayerStatistics) else model_statistics(layers).values()
        for row in rows:
            self._add(row)

    def _add(self, row: LayerStatistics) -> None:
        raise NotImplementedError

    def _sum(self, value: float, weight: float) -> None:
        # In float32, whatever a module in half precision has made of the states: bfloat16 counts to 256.
        self.total = self.total.float() + value * weight
        self.weight = self.weight.float() + weight

    def compute(self) -> Tensor:
        """The number."""
        return self.total.float() / self.weight.float().clamp(min=1)


class MeanDisplacement(_PositionMetric):
    """Mean distance of the movable taps from where they started, in pixels; all taps count alike."""

    def _add(self, row: LayerStatistics) -> None:
        self._sum(row.mean_displacement, row.taps)


class MaxDisplacement(_PositionMetric):
    """Largest distance of a tap from where it started, in pixels."""

    def _add(self, row: LayerStatistics) -> None:
        self.total = self.total.float().clamp(min=row.max_displacement)


class ReceptiveRadius(_PositionMetric):
    """Distance of a layer's furthest tap from the centre of its kernel, in pixels; the mean over layers."""

    def _add(self, row: LayerStatistics) -> None:
        self._sum(row.receptive_radius, 1)


class OffLattice(_PositionMetric):
    """Share of the movable taps that are not on whole pixels, 0 to 1."""

    def _add(self, row: LayerStatistics) -> None:
        self._sum(row.off_lattice, row.taps)


class Collisions(_PositionMetric):
    """How many taps share their position with an earlier tap of their position group."""

    def _add(self, row: LayerStatistics) -> None:
        self.total = self.total.float() + row.collisions


def position_metrics(prefix: str | None = None) -> MetricCollection:
    """All of the above in one collection: ``metrics.update(model)``, ``metrics.compute()``.

    Keys are ``prefix`` and "mean_displacement", "max_displacement", "receptive_radius", "off_lattice", "collisions".
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "mean_displacement": MeanDisplacement(),
        "max_displacement": MaxDisplacement(),
        "receptive_radius": ReceptiveRadius(),
        "off_lattice": OffLattice(),
        "collisions": Collisions(),
    }
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
