"""Training towards dilated grids: rounding many layers, the schedule that anneals, PositionTrainer."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.tiny import TinyModule, fit, loader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu, report_acu
from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.sharded import whole
from lightning_acu.training import (
    DilationDecay,
    LayerRounding,
    PositionTrainer,
    compute_as_plain,
    confine_positions_,
    round_layers,
)

TESTS = Path(__file__).parents[1]


def moved(layer, apart, noise=0.0):
    """``layer`` with its taps ``apart`` times as far from the centre."""
    generator = torch.Generator().manual_seed(5)
    offsets = layer.positions * (torch.tensor(apart) - 1) + noise * torch.randn(
        layer.positions.shape, generator=generator
    )
    layer.offsets.data.copy_(offsets.flatten())
    return layer


def test_the_report_says_which_dilations_and_how_far_taps_had_to_move():
    one = moved(ACUConv2d(1, 2, (1, 3), padding=(0, 1)), (1.0, 2.25))
    two = moved(ACUConv2d(1, 2, 3, padding=1), (1.0, 1.25))
    report = round_layers([("one", one), ("two", two)], "separate", to="dilation")
    corner, side = 0.25, 0.25  # of the 3x3: six taps are 0.25 too far to a side
    assert report.layers["one"] == LayerRounding(pytest.approx(0.25), pytest.approx(0.25), (1, 2))
    assert report.layers["two"] == LayerRounding(
        pytest.approx((4 * corner + 2 * side) / 8), pytest.approx(0.25), (1, 1)
    )
    assert report.dilations == {"one": (1, 2), "two": (1, 1)}
    assert (report.taps, report.away, report.collisions, report.separated) == (10, 2, {}, False)
    assert str(report) == (
        "10 taps were moved by 0.20 pixels on average, by at most 0.25; 2 of them are not where they started; "
        "dilations: (1, 2) in 1 layer, (1, 1) in 1 layer"
    )


def test_position_groups_that_differ_are_reported_one_by_one():
    layer = ACUConv2d(1, 2, 3, padding=1, position_groups=2)
    layer.offsets.data[18:] = layer.positions[0].flatten()
    assert round_layers([("one", layer)], to="dilation").dilations == {"one": [(1, 1), (2, 2)]}
    assert round_layers([("one", layer)]).dilations == {}


def test_layers_that_stay_as_they_were_learned_nothing_and_free_shapes_change_nothing():
    still = moved(ACUConv2d(1, 2, 3, padding=1), (1.4, 1.4))
    free = ACUConv2d.from_positions(2, 4, [(0.5, 1.0), (-1.0, 0.0)])
    with pytest.raises(ValueError, match="free: it has a free shape"):
        round_layers([("still", still), ("free", free)], to="dilation")
    assert still.displacement.abs().max() == pytest.approx(0.4)
    with pytest.raises(ValueError, match=r"`to` \(='grid'\)"):
        round_layers([], to="grid")
    report = round_layers([("still", still)], to="dilation")
    assert report.nothing_learned
    assert report.why_nothing == "because each layer is nearest to the dilation that it had"


def several():
    return [
        moved(ACUConv2d(2, 4, 3, padding=1, position_groups=2), (1.7, 1.2), 0.2),
        moved(ACUConv2d(4, 4, 3, 2, 1, groups=2), (2.4, 1.7), 0.2),  # of the same grid as the one before
        moved(ACUConv2d(2, 2, (4, 5), padding="same", dilation=2).double(), (0.6, 1.4), 0.1),
        ACUConv2d(2, 2, 1),
    ]


@pytest.mark.parametrize("pull", [0.0, 0.25, 1.0])
def test_taps_are_pulled_a_share_of_the_way_to_the_nearest_grid(pull):
    mine = several()
    rounded = [copy.deepcopy(layer).round_(to="dilation") for layer in mine]
    before = [layer.offsets.detach().clone() for layer in mine]
    confine_positions_(mine, pull, pull_to="dilation")
    for layer, start, end in zip(mine, before, rounded, strict=True):
        torch.testing.assert_close(layer.offsets.detach(), start + (end.offsets - start) * pull)
    assert pull < 1 or all(layer.grid_dilations is not None for layer in mine)


def test_a_limit_comes_first():
    layer = moved(ACUConv2d(1, 1, 3, padding=1), (3.0, 3.0))
    confine_positions_([layer], 0.0, 1.0, "dilation")
    assert layer.displacement.norm(dim=-1).max() == pytest.approx(1.0)


def train(net, optimizer, steps, start=0):
    for images, labels in (list(loader(dtype=torch.float64)) * 3)[start : start + steps]:
        optimizer.zero_grad()
        F.cross_entropy(net(images).mean((2, 3)), labels).backward()
        optimizer.step()


def trained(seed=0, **arguments):
    torch.manual_seed(seed)
    net = TinyModule().net.double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    return net, optimizer, PositionTrainer(optimizer, net, multiplier=3.0, warmup_steps=2, **arguments)


def test_the_schedule_brings_taps_onto_a_grid_by_itself():
    net, optimizer, _ = trained(schedule=DilationDecay(start=0.5), total_steps=12)
    train(net, optimizer, 7)  # the last step in which taps move freely
    layers = list(acu_layers(net))
    assert round_layers(copy.deepcopy(layers), to="dilation").max_distance > 0.3
    train(net, optimizer, 5, start=7)
    report = round_layers(layers, to="dilation")
    assert report.max_distance == 0
    assert report.away > 0


@pytest.mark.parametrize("stop", [1, 4, 7, 9], ids=["warm-up", "learning", "rounding", "after"])
def test_model_and_optimizer_alone_resume_exactly(stop):
    arguments = {"schedule": "dilation", "round_at": 7, "round_to": "dilation"}
    net, optimizer, _ = trained(**arguments)
    train(net, optimizer, stop)
    states = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, 11 - stop, start=stop)
    again, optimizer, _ = trained(1, **arguments)
    again.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    train(again, optimizer, 11 - stop, start=stop)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), net.parameters(), strict=True))
    dilations = report_acu(net).dilations
    assert set(dilations) == {"0", "2"}
    x = torch.randn(1, 2, 7, 6, dtype=torch.float64)
    expected = net(x)
    fold_acu(net)
    assert [net[0].weight.shape, net[2].weight.shape] == [(4, 2, 3, 3), (3, 4, 3, 3)]
    torch.testing.assert_close(net(x), expected, rtol=0, atol=1e-12)


def test_it_is_the_callbacks_to_the_last_bit(tmp_path):
    def make(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    torch.manual_seed(0)
    expected = TinyModule(make)
    rounding = RoundThenFinetune(at_fraction=0.6, keep=False, to="dilation")
    fit(expected, [PositionLRSchedule(4.0, 3, schedule="dilation"), rounding], tmp_path, max_epochs=3)

    torch.manual_seed(0)
    module = TinyModule()
    optimizer = make(module.parameters())
    PositionTrainer(
        optimizer, module, multiplier=4.0, warmup_steps=3, schedule="dilation", total_steps=18, round_at=0.6,
        round_to="dilation",
    )  # fmt: skip
    for images, labels in list(loader()) * 3:
        optimizer.zero_grad()
        F.cross_entropy(module.net(images).mean((2, 3)), labels).backward()
        optimizer.step()
    assert torch.equal(module.offsets, expected.offsets)
    assert torch.equal(module.weights, expected.weights)
    assert rounding.report.dilations == report_acu(expected).dilations
    assert rounding.report.away > 0


@pytest.mark.parametrize("optimizer_first", [False, True])
@pytest.mark.parametrize("stop", [4, 9], ids=["learning", "after"])
def test_a_training_that_goes_on_as_plain_convolutions_resumes_exactly(monkeypatch, stop, optimizer_first):
    arguments = {"round_at": 7, "round_to": "dilation", "fold_after_rounding": True}
    net, optimizer, positions = trained(**arguments)
    train(net, optimizer, stop)
    states = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, 11 - stop, start=stop)
    again, optimizer, positions = trained(1, **arguments)
    for load in [0, 1] if not optimizer_first else [1, 0]:
        (again, optimizer)[load].load_state_dict(states[load])
    if stop > 7:
        monkeypatch.setattr("lightning_acu.conv.acu_conv2d", None)  # it is not needed any more
    train(again, optimizer, 11 - stop, start=stop)
    assert positions.rounded
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again.parameters(), net.parameters(), strict=True))
    assert [layer.plain_dilation for _, layer in acu_layers(net)] == [*report_acu(net).dilations.values()]
    assert set(report_acu(net).dilations.values()) != {(1, 1)}


def test_it_goes_on_with_the_weights_and_momentum_it_had():
    ours, optimizer, _ = trained(round_at=7, round_to="dilation", fold_after_rounding=True)
    train(ours, optimizer, 11)
    theirs, optimizer, _ = trained(round_at=7, round_to="dilation")
    train(theirs, optimizer, 11)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


SCRIPT = """
import os, sys
import torch.distributed as dist
from helpers.processes import run_forked

def run():
    from training.test_dilations import half_of_each_batch
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for strategy in ("ddp", "fsdp2"):
        half_of_each_batch(rank, strategy, f"{sys.argv[1]}/{strategy}{rank}.pt")
    dist.destroy_process_group()

sys.exit(run_forked(run, processes=2))
"""

SEARCH = {"round_at": 5, "round_to": "dilation", "fold_after_rounding": True}


def half_of_each_batch(rank, strategy, path):
    """What one of two processes does: a search of 9 steps."""
    torch.manual_seed(0)
    net = TinyModule().net.double()
    if strategy == "ddp":
        model = nn.parallel.DistributedDataParallel(net)
    else:
        model = fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    PositionTrainer(optimizer, model, multiplier=5.0, warmup_steps=1, **SEARCH)
    for images, labels in (list(loader(dtype=torch.float64)) * 2)[:9]:
        own = slice(2 * rank, 2 * rank + 2)
        optimizer.zero_grad()
        F.cross_entropy(model(images[own]).mean((2, 3)), labels[own]).backward()
        optimizer.step()
    plain = [layer.plain_dilation for _, layer in acu_layers(net)]
    torch.save((plain, [whole(parameter.detach()) for parameter in net.parameters()]), path)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "LOCAL_"))}
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=True, timeout=300)
    torch.manual_seed(0)
    net = TinyModule().net.double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    PositionTrainer(optimizer, net, multiplier=5.0, warmup_steps=1, **SEARCH)
    train(net, optimizer, 9)
    plain = [layer.plain_dilation for _, layer in acu_layers(net)]
    assert plain != [(1, 1), (1, 1)]
    for name in ("ddp0", "ddp1", "fsdp20", "fsdp21"):
        found, parameters = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found == plain
        for ours, theirs in zip(parameters, net.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_plain_computation_ends_when_positions_change():
    layer = moved(ACUConv2d(2, 4, 3, padding=1), (2.0, 1.0))
    twin, x = copy.deepcopy(layer), torch.randn(1, 2, 6, 7)
    assert layer.compute_as_plain()
    assert layer.plain_dilation == (2, 1)
    torch.testing.assert_close(layer(x), twin(x))
    layer.load_state_dict(moved(ACUConv2d(2, 4, 3, padding=1), (1.0, 3.0)).state_dict())
    assert layer.plain_dilation == (1, 3)
    twin = moved(ACUConv2d(2, 4, 3, padding=1), (1.5, 1.0))
    layer.load_state_dict(twin.state_dict())
    assert layer.plain_dilation is None
    torch.testing.assert_close(layer(x), twin(x))
    layer.round_()
    assert not moved(ACUConv2d(2, 4, 3), (1.5, 1.0)).compute_as_plain()
    assert layer.compute_as_plain() == (layer.grid_dilations is not None)
    layer.reset_parameters()
    assert layer.plain_dilation is None
    groups = ACUConv2d(2, 4, 3, padding=1, position_groups=2)
    groups.offsets.data[18:] = groups.positions[0].flatten()
    assert compute_as_plain([("groups", groups), ("reset", layer)]) == ["groups"]
    assert "plain_dilation" not in vars(fold_acu(nn.Sequential(layer))[0])


@pytest.mark.parametrize("make", [
    lambda: ACUConv2d(2, 4, (4, 3), padding="same", dtype=torch.float64),
    lambda: ACUConv2d(2, 4, 3, 2, 1, groups=2, padding_mode="reflect", dtype=torch.float64),
    lambda: ACUConv2d(2, 4, 3, dilation=3, dtype=torch.float64),
    lambda: convert_to_acu(nn.Sequential(timm.layers.StdConv2dSame(2, 4, 3, 2, dtype=torch.float64)))[0],
])  # fmt: skip
def test_any_layer_computes_as_plain_with_gradients_of_zero_for_positions(make):
    layer, x = make(), torch.randn(1, 2, 12, 11, dtype=torch.float64, requires_grad=True)
    layer.offsets.data.copy_((layer.positions[0] * (2 / torch.tensor(layer.dilation) - 1)).flatten())
    layer.round_(to="dilation")
    assert layer.grid_dilations == [(2, 2)]
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    assert layer.compute_as_plain()
    *gradients, of_positions = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight, layer.offsets])
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert torch.equal(traced(x), layer(x))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert not of_positions.any()


def test_a_fold_after_rounding_to_pixels_is_refused():
    net = TinyModule().net
    with pytest.raises(ValueError, match="`fold_after_rounding` needs `round_to`='dilation'"):
        PositionTrainer(torch.optim.SGD(net.parameters(), lr=0.1), net, fold_after_rounding=True)
    with pytest.raises(ValueError, match="`fold_after_rounding` needs `to`='dilation'"):
        RoundThenFinetune(at_step=3, fold_after_rounding=True)


@pytest.mark.parametrize("arguments", [{"schedule": "dilation", "total_steps": 9}, {"round_to": "dilation"}])
def test_free_shapes_are_refused_at_the_start(arguments):
    net = nn.Sequential(ACUConv2d(2, 2, 3), ACUConv2d.from_positions(2, 3, [(0.5, 1.0), (-1.0, 0.0)]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="1: it has a free shape"):
        PositionTrainer(optimizer, net, **arguments)
    with pytest.raises(ValueError, match=r"`round_to` \(='grid'\) must be 'pixels' or 'dilation'"):
        PositionTrainer(optimizer, net, round_to="grid")
