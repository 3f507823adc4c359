"""How far the taps of a model have moved, as torchmetrics Metrics; computed from :mod:`lightning_acu.statistics`."""

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
    """The base of Metrics over the active convolutions given to ``update``; 0 before the first update.

    Every process has the same positions, so states are not synchronised between processes.
    """

    full_state_update = True  # otherwise `forward` would merge states by `dist_reduce_fx`, a mean over processes
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("total", torch.zeros((), dtype=torch.float32, device="cpu"), dist_reduce_fx="mean")
        self.add_state("weight", torch.zeros((), dtype=torch.float32, device="cpu"), dist_reduce_fx="mean")

    def update(self, layers: nn.Module | LayerStatistics) -> None:
        """Add every active convolution of a model, one layer, or the statistics of one layer."""
        rows = [layers] if isinstance(layers, LayerStatistics) else model_statistics(layers).values()
        for row in rows:
            self._add(row)

    def _add(self, row: LayerStatistics) -> None:
        raise NotImplementedError

    def _sum(self, value: float, weight: float) -> None:
        # In float32, as a module in half precision casts the states: bfloat16 can count to 256 only.
        self.total = self.total.float() + value * weight
        self.weight = self.weight.float() + weight

    def compute(self) -> Tensor:
        """The value over all layers added so far, a scalar."""
        return self.total.float() / self.weight.float().clamp(min=1)


class MeanDisplacement(_PositionMetric):
    """Mean distance of the movable taps from where they started, in pixels; every tap has the same weight."""

    def _add(self, row: LayerStatistics) -> None:
        self._sum(row.mean_displacement, row.taps)


class MaxDisplacement(_PositionMetric):
    """Largest distance of a tap from where it started, in pixels."""

    def _add(self, row: LayerStatistics) -> None:
        self.total = self.total.float().clamp(min=row.max_displacement)


class ReceptiveRadius(_PositionMetric):
    """Distance of a layer's furthest tap from the centre of the kernel, in pixels; mean over layers."""

    def _add(self, row: LayerStatistics) -> None:
        self._sum(row.receptive_radius, 1)


class OffLattice(_PositionMetric):
    """Fraction of the movable taps that are not on whole pixels, 0 to 1."""

    def _add(self, row: LayerStatistics) -> None:
        self._sum(row.off_lattice, row.taps)


class Collisions(_PositionMetric):
    """Number of taps that share their position with an earlier tap of their position group."""

    def _add(self, row: LayerStatistics) -> None:
        self.total = self.total.float() + row.collisions


def position_metrics(prefix: str | None = None) -> MetricCollection:
    """All metrics of this module in one collection: ``metrics.update(model)``, ``metrics.compute()``.

    Keys are "mean_displacement", "max_displacement", "receptive_radius", "off_lattice" and "collisions", after
    ``prefix``.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "mean_displacement": MeanDisplacement(),
        "max_displacement": MaxDisplacement(),
        "receptive_radius": ReceptiveRadius(),
        "off_lattice": OffLattice(),
        "collisions": Collisions(),
    }
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
