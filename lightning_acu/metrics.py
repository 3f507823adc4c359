"""How far the taps of a model have moved, and how far the model sees, as torchmetrics Metrics.

Computed from :mod:`lightning_acu.statistics` and :mod:`lightning_acu.receptive_field`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from .receptive_field import receptive_energy, spread
from .statistics import LayerStatistics, layer_statistics, model_statistics

__all__ = [
    "Collisions",
    "EffectiveReceptiveField",
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


class EffectiveReceptiveField(Metric):
    """How far from it the pixels are that the middle of a feature map depends on, in pixels of the image.

    ``compute()`` is sqrt((variance along y + variance along x) / 2) of the energy of the gradient over all images so
    far, see :func:`lightning_acu.receptive_field.receptive_energy` for the formula and its source. For a chain of
    linear convolutions with random weights it is sqrt of the sum over layers of (product of the strides before)^2 times
    the variance of the taps' positions: a 3x3 at dilation d has 2/3 d^2.

    Args:
        layer: name of the module of whose output the middle is taken; None: the last with more than one pixel.

    Attributes:
        map: (H, W), the energy by pixel; its sum is 1 after the first update.

    Raises:
        ValueError: ``update`` gets images of another size than before, or such that nothing depends on them.

    Example::

        field = EffectiveReceptiveField()
        field.update(model, torch.randn(8, 3, 64, 64))
        field.compute()  # pixels
    """

    full_state_update = True
    higher_is_better = None
    energy: Tensor
    images: Tensor

    def __init__(self, layer: str | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.add_state("energy", torch.zeros(1, 1, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")

    def update(self, model: nn.Module, images: Tensor) -> None:
        """Add what ``images`` (N, C, H, W), float, say of ``model``, which runs in eval mode and is not changed."""
        energy = receptive_energy(model, images, layer=self.layer).to(self.energy.device)
        if self.images and energy.shape != self.energy.shape:
            raise ValueError(f"`images` are {tuple(energy.shape)} pixels, those before {tuple(self.energy.shape)}")
        if not (energy.sum() > 0 and energy.isfinite().all()):
            raise ValueError(
                "the middle of the feature map does not depend on these `images`, or is not finite for them"
            )
        self.energy = self.energy.double() + len(images) * energy
        self.images = self.images.double() + len(images)

    @property
    def map(self) -> Tensor:
        """(H, W), float64: the share of the energy that each pixel has."""
        return self.energy.double() / self.energy.double().sum().clamp(min=torch.finfo(torch.float64).tiny)

    def compute(self) -> Tensor:
        """The radius in pixels, a scalar; nan before the first update."""
        _, deviations = spread(self.energy)
        return deviations.square().mean().sqrt().float()
