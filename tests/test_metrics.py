"""The numbers that describe positions, on positions made by hand."""

import copy
import math
import pickle

import pytest
import torch
from helpers.tiny import TinyModule, fit
from torch import nn

from lightning_acu import ACUConv2d, convert_to_acu
from lightning_acu.callbacks import PositionLRSchedule
from lightning_acu.metrics import (
    Collisions,
    LayerStatistics,
    MaxDisplacement,
    MeanDisplacement,
    OffLattice,
    ReceptiveRadius,
    layer_statistics,
    model_statistics,
    position_metrics,
)


def placed(offsets, *arguments, **keywords):
    """A layer with (P, K, 2) of these offsets."""
    layer = ACUConv2d(1, 2, *arguments, **keywords)
    layer.offsets.data.copy_(torch.tensor(offsets).flatten())
    return layer


def test_a_fresh_layer_has_not_moved():
    assert layer_statistics(ACUConv2d(4, 4, 3, dilation=(1, 2))) == LayerStatistics(
        0.0, 0.0, pytest.approx(math.sqrt(1 + 4)), 0.0, 0, 8
    )


def test_distances_are_over_the_taps_that_can_move():
    # 1x3, so two taps move: by 5 pixels (to column 3 of row 4 below its place), and by 0.5.
    layer = placed([[[4.0, -3.0], [9.0, 9.0], [0.0, 0.5]]], (1, 3), dilation=2)
    statistics = layer_statistics(layer)
    assert statistics.mean_displacement == pytest.approx((5 + 0.5) / 2)
    assert statistics.max_displacement == 5
    assert statistics.receptive_radius == pytest.approx(math.hypot(4, -2 - 3))
    assert statistics.off_lattice == 0.5
    assert statistics.collisions == 0


def test_without_a_fixed_centre_all_taps_count():
    layer = placed([[[0.0, 0.0], [0.0, 3.0], [0.0, 0.0]]], (1, 3), fixed_centre=False)
    assert layer_statistics(layer) == LayerStatistics(1.0, 3.0, 3.0, 0.0, 0, 3)


@pytest.mark.parametrize(
    ("offsets", "collisions"),
    [
        ([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], 0),
        ([[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]], 1),  # onto the fixed tap
        ([[[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]]], 2),  # all on one place
        ([[[0.25, 2.5], [0.0, 0.0], [0.25, 0.5]]], 1),  # between pixels
        ([[[0.0, 2.0], [0.0, 0.0], [0.0, 0.01]]], 0),  # nearly
        ([[[0.0, 2.0], [0.0, 0.0], [-0.0, 0.0]]], 1),  # minus zero is zero
        ([[[0.0, 2.0], [0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 7.0], [0.0, -2.0]]], 2),  # one in each group
        ([[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]]], 0),  # across groups: none
    ],
)
def test_collisions_are_counted_within_each_position_group(offsets, collisions):
    layer = placed(offsets, (1, 3), position_groups=len(offsets))
    assert layer_statistics(layer).collisions == collisions


def test_displacement_of_any_shape_counts_from_where_it_started():
    layer = ACUConv2d.from_positions(1, 1, [(0.0, 0.0), (1.5, 2.0), (-1.0, 0.0)])
    assert layer_statistics(layer) == LayerStatistics(0.0, 0.0, 2.5, 0.5, 0, 2)
    with torch.no_grad():
        layer.offsets += 1
    assert layer_statistics(layer).mean_displacement == pytest.approx(math.sqrt(2))
    assert layer_statistics(layer).receptive_radius == pytest.approx(math.hypot(2.5, 3))


def test_a_layer_that_cannot_move_has_zeros():
    assert layer_statistics(ACUConv2d(3, 3, 1)) == LayerStatistics(0.0, 0.0, 0.0, 0.0, 0, 0)


def test_a_model_has_one_entry_for_each_active_layer():
    conv = nn.Conv2d(4, 4, 3)
    model = convert_to_acu(nn.ModuleDict({"a": conv, "b": nn.Sequential(nn.Conv2d(4, 4, 1), conv, nn.Conv2d(4, 4, 5))}))
    model["b"][2].offsets.data.fill_(1.0)
    statistics = model_statistics(model)
    assert list(statistics) == ["a", "b.2"]
    assert statistics["b.2"].max_displacement == pytest.approx(math.sqrt(2))
    assert statistics["b.2"] == layer_statistics(model["b"][2])
    assert model_statistics(nn.Linear(1, 1)) == {}


def test_statistics_carry_no_gradient():
    layer = placed([[[0.5, 0.0], [0.0, 0.0], [0.0, 1.0]]], (1, 3))
    assert all(isinstance(value, float | int) for value in vars(layer_statistics(layer)).values())
    assert layer.offsets.grad is None


def two_layers():
    """8 movable taps of which one went (3, -4), and 3 movable ones that went 1, 2 and 0.5."""
    first, second = ACUConv2d(1, 1, (3, 3), dilation=2), ACUConv2d(1, 2, (1, 3), fixed_centre=False)
    with torch.no_grad():
        first.offsets[0:2] = torch.tensor([3.0, -4.0])
        second.offsets.copy_(torch.tensor([0.0, 1.0, 0.0, 2.0, 0.5, 0.0]))
    return nn.Sequential(first, nn.ReLU(), second)


#: Of ``two_layers``: taps at (1, -6) and (0, 0), (0, 2), (0.5, 1) from the centre; all taps count alike.
EXPECTED = {
    MeanDisplacement: (5 + 1 + 2 + 0.5) / 11,
    MaxDisplacement: 5.0,
    ReceptiveRadius: (math.hypot(1, 6) + 2) / 2,
    OffLattice: 1 / 11,
    Collisions: 0.0,
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_metric_over_a_model_its_layers_or_their_statistics(kind):
    model = two_layers()
    metrics = [kind() for _ in range(4)]
    metrics[0].update(model)
    for layer in (model[0], model[2]):
        metrics[1].update(layer)
        metrics[2].update(layer_statistics(layer))
        metrics[3](layer)  # forward
    for metric in metrics:
        assert metric.compute().item() == pytest.approx(EXPECTED[kind], rel=1e-6)
        assert metric.compute().dtype == torch.float32


@pytest.mark.parametrize("kind", EXPECTED)
def test_forward_gives_the_number_of_what_it_was_given(kind):
    metric, model = kind(), two_layers()
    metric(model[0])
    alone = kind()
    alone.update(model[2])
    assert metric(model[2]).item() == pytest.approx(alone.compute().item(), rel=1e-6)


def test_collisions_add_up_over_layers_and_forwards():
    layer = placed([[[0.0, 1.0], [0.0, 0.0], [0.0, -1.0]]], (1, 3))
    metric = Collisions()
    assert metric(layer) == 2
    assert metric(nn.Sequential(layer, placed([[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]], (1, 3)))) == 3
    assert metric.compute() == 5


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update`` method")
@pytest.mark.parametrize("kind", EXPECTED)
def test_a_metric_without_active_layers_is_zero_and_reset_forgets(kind):
    metric = kind()
    assert metric.compute() == 0
    metric.update(nn.Linear(2, 2))
    metric.update(ACUConv2d(1, 1, 1))  # a lone tap that is fixed
    assert metric.compute() == 0
    metric.update(two_layers())
    metric.reset()
    assert metric.compute() == 0


def test_a_collection_has_names_with_a_prefix():
    metrics = position_metrics(prefix="acu/")
    metrics.update(two_layers())
    names = ["mean_displacement", "max_displacement", "receptive_radius", "off_lattice", "collisions"]
    values = metrics.compute()
    assert sorted(values) == sorted(f"acu/{name}" for name in names)
    for name, expected in zip(names, EXPECTED.values(), strict=True):
        assert values[f"acu/{name}"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("copy_of", [lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_copies_go_on_counting_on_their_own(copy_of):
    metric, model = MeanDisplacement(), two_layers()
    metric.update(model[0])
    other = copy_of(metric)
    other.update(model[2])
    assert metric.compute().item() == pytest.approx(5 / 8)
    assert other.compute().item() == pytest.approx(EXPECTED[MeanDisplacement])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_module_that_owns_it_is_no_matter(dtype):
    """Lightning's "16-true" and "bf16-true" call ``.to(dtype)``; in bfloat16 256 taps and 8 are 256."""
    module = nn.ModuleDict({"metrics": position_metrics()})
    module.to(dtype)
    row = LayerStatistics(0.1, 0.3, 2.0, 0.25, 0, 257)
    for _ in range(2):
        for _ in range(300):
            module["metrics"].update(row)
        values = module["metrics"].compute()
        expected = {"mean_displacement": 0.1, "max_displacement": 0.3, "receptive_radius": 2.0, "off_lattice": 0.25}
        for name, value in expected.items():
            assert values[name].item() == pytest.approx(value, rel=1e-5), name
        module["metrics"].reset()


def test_states_are_of_a_type_that_every_device_has():
    """MPS has no float64."""
    assert all(state.dtype == torch.float32 for state in Collisions().metric_state.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_of_a_module_in_half_precision(dtype):
    model = two_layers().to(dtype)
    metrics = position_metrics()
    metrics.update(model)
    assert metrics.compute()["max_displacement"] == 5


def test_logged_by_a_lightning_module(tmp_path):
    class Module(TinyModule):
        def __init__(self):
            super().__init__()
            self.furthest, self.positions = MaxDisplacement(), position_metrics("pos/")

        def training_step(self, batch, batch_idx):
            self.furthest(self.net[0])
            self.log("furthest", self.furthest, on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.positions.update(self.net)
            self.log_dict(self.positions)

    module = Module()
    trainer = fit(module, [PositionLRSchedule(1.0, 0)], tmp_path)
    statistics = model_statistics(module.net)
    assert trainer.callback_metrics["pos/max_displacement"].item() == pytest.approx(
        max(row.max_displacement for row in statistics.values())
    )
    assert trainer.callback_metrics["pos/mean_displacement"].item() == pytest.approx(
        sum(row.mean_displacement for row in statistics.values()) / 2
    )
    assert trainer.callback_metrics["furthest_step"] > 0
    assert trainer.callback_metrics["furthest_epoch"] >= trainer.callback_metrics["furthest_step"]
