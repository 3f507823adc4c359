"""PositionTrainer: the callbacks to the last bit, a loop written by hand, and the traps of plain loops."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint.state_dict
import torch.nn.functional as F
from helpers.schedulers import SCHEDULERS
from helpers.tiny import STEPS_PER_EPOCH, TinyModule, fit, loader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam, AdamW

from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.sharded import whole
from lightning_acu.training import Cosine, LatticeDecay, PositionTrainer, is_position_group

TESTS = Path(__file__).parents[1]


@pytest.fixture
def net():
    return TinyModule().net.double()


def sgd(net, **arguments):
    return SGD(net.parameters(), **({"lr": 0.1, "momentum": 0.9} | arguments))


def batches(dtype=torch.float64):
    return list(loader(dtype=dtype)) * 3


def loss_of(net, batch):
    return F.cross_entropy(net(batch[0]).mean((2, 3)), batch[1])


def train(net, optimizer, steps=3, start=0):
    for batch in batches()[start : start + steps]:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()


def offsets(net):
    return torch.cat([whole(layer.offsets.detach()) for _, layer in acu_layers(net)])


def position_rate(optimizer):
    (group,) = filter(is_position_group, optimizer.param_groups)
    return float(group["lr"])


OPTIMIZERS = {
    "SGD": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda parameters: AdamW(parameters, lr=0.1),
}


@pytest.mark.parametrize("schedule", ["cosine", "lattice"])
@pytest.mark.parametrize("normalize", ["gradient", "momentum", None])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_is_the_callbacks_to_the_last_bit(tmp_path, make, normalize, schedule):
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 36)

    torch.manual_seed(0)
    expected = TinyModule(make, scheduler)
    multiplier = 500.0 if normalize is None and "SGD" in str(make(expected.parameters())) else 2.0
    positions = PositionLRSchedule(multiplier, 3, normalize, schedule=schedule, max_displacement=0.9)
    fit(expected, [positions, RoundThenFinetune(at_fraction=0.6, keep=False)], tmp_path, max_epochs=3)

    torch.manual_seed(0)
    module = TinyModule()
    optimizer = make(module.parameters())
    arguments = {"multiplier": multiplier, "warmup_steps": 3, "total_steps": 18, "round_at": 0.6}
    trainer = PositionTrainer(
        optimizer, module, normalize=normalize, schedule=schedule, max_displacement=0.9, **arguments
    )
    schedule_of_weights = scheduler(optimizer)
    for batch in batches(torch.float32):
        optimizer.zero_grad()
        loss_of(module.net, batch).backward()
        optimizer.step()
        schedule_of_weights.step()
    assert trainer.step == 18
    assert trainer.rounded
    assert expected.offsets.abs().max() == 1
    assert torch.equal(module.offsets, expected.offsets)
    assert torch.equal(module.weights, expected.weights)


def test_a_loop_by_hand(net):
    """SGD with momentum and weight decay in numbers: warm-up 2, cosine to step 9, lattice pull, limit, rounding."""

    class Pulled(Cosine):
        def slack(self, step, total):
            return 1 - step / (2 * total)

    by_hand = copy.deepcopy(net)
    optimizer = sgd(net, weight_decay=0.01)
    PositionTrainer(
        optimizer, net, multiplier=3.0, warmup_steps=2, schedule=Pulled(), round_at=9, max_displacement=0.6,
        weight_decay=0.02,
    )  # fmt: skip
    seen = []
    for batch in batches()[:12]:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        seen.append(offsets(net))

    momentum = {}
    for step, batch in enumerate(batches()[:12]):
        names, parameters = zip(*by_hand.named_parameters(), strict=True)
        for name, p, g in zip(names, parameters, torch.autograd.grad(loss_of(by_hand, batch), parameters), strict=True):
            with torch.no_grad():
                if "offsets" not in name:
                    g = g + 0.01 * p
                    momentum[name] = g if name not in momentum else 0.9 * momentum[name] + g
                    p -= 0.1 * momentum[name]
                elif 2 <= step < 9:
                    for i in range(0, len(g), 2):
                        length = math.hypot(g[i], g[i + 1])
                        g[i : i + 2] /= length if length else 1
                    g = g + 0.02 * p
                    momentum[name] = g if name not in momentum else 0.9 * momentum[name] + g
                    p -= 0.1 * 3 * (1 + math.cos(math.pi * (step - 2) / 7)) / 2 * momentum[name]
                    pull = 1 - (1 - (step - 1) / 14) / (1 - (step - 2) / 14)
                    for i in range(0, len(p), 2):
                        length = math.hypot(p[i], p[i + 1])
                        p[i : i + 2] *= min(1, 0.6 / length) if length else 1
                    p += pull * (p.round() - p)
                    if step == 8:
                        p.copy_(p.round())
        torch.testing.assert_close(seen[step], offsets(by_hand), rtol=0, atol=1e-12)
    assert seen[-1].abs().max() == 1


@pytest.mark.parametrize("existing", [False, True], ids=["made later", "made before"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_follows_every_scheduler(net, name, existing):
    optimizer = sgd(net)
    scheduler = SCHEDULERS[name](optimizer) if existing else None
    PositionTrainer(optimizer, net, multiplier=0.5, schedule="linear", total_steps=12,
                    schedulers=[scheduler] if existing else None)  # fmt: skip
    scheduler = scheduler or SCHEDULERS[name](optimizer)
    for step in range(10):
        rate = optimizer.param_groups[0]["lr"]
        train(net, optimizer, 1)
        assert position_rate(optimizer) == pytest.approx(rate * 0.5 * (1 - step / 12), rel=1e-12, abs=0)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))


def test_a_rate_that_is_written_into_every_group_is_that_of_the_weights(net):
    """As searches for a learning rate do, and loops that compute it themselves."""
    optimizer = sgd(net)
    PositionTrainer(optimizer, net, multiplier=0.5)
    for rate in (0.3, 0.02):
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(net, optimizer, 1)
        assert position_rate(optimizer) == rate / 2


def test_timms_scheduler_and_a_group_for_each_layer(net):
    timm_scheduler = pytest.importorskip("timm.scheduler")
    groups = [{"params": net[0].parameters(), "lr": 0.3, "lr_scale": 0.5}, {"params": net[2].parameters()}]
    optimizer = SGD(groups, lr=0.1)
    trainer = PositionTrainer(optimizer, net, multiplier=0.5)
    scheduler = timm_scheduler.CosineLRScheduler(optimizer, 10, lr_min=0.05, warmup_t=2, warmup_lr_init=0.01)
    for step in range(6):
        scheduler.step(step)
        train(net, optimizer, 1)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[2:] == [0.5 * rate for rate in rates[:2]]
    assert [row["learning_rate"] for row in trainer.report().values()] == rates[2:]


def test_positions_are_still_in_the_warm_up_to_the_last_bit(net):
    start = torch.rand_like(offsets(net))
    net[0].offsets.data.copy_(start[:18])
    optimizer = AdamW(net.parameters(), lr=0.1)
    trainer = PositionTrainer(optimizer, net, warmup_steps=2, weight_decay=0.5)
    train(net, optimizer, 2)
    assert torch.equal(net[0].offsets.data, start[:18])
    assert net[0].offsets not in optimizer.state
    assert {row["why_not"] for row in trainer.report().values()} == {""}
    train(net, optimizer, 1)
    assert not torch.equal(net[0].offsets.data, start[:18])


def test_gradients_are_of_length_1_once_they_are_accumulated_and_clipped(net):
    optimizer = sgd(net, momentum=0)
    trainer = PositionTrainer(optimizer, net, multiplier=0.25)
    half = 2
    images, labels = batches()[0]
    whole = copy.deepcopy(net)
    loss_of(whole, (images, labels)).backward()
    gradient = whole[0].offsets.grad.view(-1, 2)
    for part in (slice(half), slice(half, None)):
        (loss_of(net, (images[part], labels[part])) / 2).backward()
    nn.utils.clip_grad_norm_(trainer.weights(), 1e-3)
    weights = torch.cat([parameter.grad.flatten() for parameter in trainer.weights()])
    assert weights.norm().item() == pytest.approx(1e-3, rel=1e-4)
    optimizer.step()
    moved = net[0].offsets.data.view(-1, 2)
    length = gradient.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moved, -0.025 * torch.where(length > 0, gradient / length, 0), rtol=0, atol=1e-12)


def test_weights_are_all_parameters_but_positions(net):
    trainer = PositionTrainer(sgd(net), net)
    assert {id(p) for p in trainer.weights()} == {id(p) for n, p in net.named_parameters() if "offsets" not in n}


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "unit"])
def test_mixed_precision_changes_nothing_and_skipped_steps_do_not_count(net, fused, unscale, normalize):
    plain = copy.deepcopy(net)
    arguments = {"multiplier": 5.0 if normalize else 2000.0, "normalize": normalize, "warmup_steps": 1, "round_at": 4}
    optimizer = sgd(plain)
    PositionTrainer(optimizer, plain, **arguments)
    train(plain, optimizer, 3)
    before_rounding = offsets(plain)
    train(plain, optimizer, 2, start=3)

    optimizer = sgd(net, fused=fused)
    trainer = PositionTrainer(optimizer, net, **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    given = batches()
    for index, batch in enumerate([given[0], None, given[1], None, given[2], given[3], given[4]]):
        optimizer.zero_grad()
        if batch is None:
            scaler.scale(loss_of(net, given[0]) * math.inf).backward()
        else:
            scaler.scale(loss_of(net, batch)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if index == 4:
            torch.testing.assert_close(offsets(net), before_rounding, rtol=0, atol=1e-12)
    assert trainer.step == 5
    assert trainer.not_finite == 0
    assert torch.equal(offsets(net), offsets(plain))
    torch.testing.assert_close(net[0].weight, plain[0].weight, rtol=0, atol=1e-12)


def test_a_tap_whose_gradient_is_not_finite_stays(net):
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, multiplier=1.0)
    train(net, optimizer, 2)
    before = net[0].offsets.detach().clone()
    optimizer.zero_grad()
    loss_of(net, batches()[2]).backward()
    net[0].offsets.grad[5] = math.nan  # tap 2
    optimizer.step()
    still = (net[0].offsets.data == before).view(-1, 2).all(-1)
    assert still.nonzero().flatten().tolist() == [2, 4]  # 4 is the centre
    assert trainer.not_finite == 1


@pytest.mark.parametrize("by_hand", [False, True], ids=["round_at", "round_and_freeze"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_rounded_positions_stay_whatever_gradient_and_momentum_remain(net, make, by_hand):
    optimizer = make(net.parameters())
    trainer = PositionTrainer(optimizer, net, multiplier=5.0, round_at=None if by_hand else 3)
    train(net, optimizer)
    if by_hand:
        assert "taps were moved" in str(trainer.round_and_freeze())
    rounded = offsets(net)
    assert rounded.abs().max() >= 1
    assert torch.equal(rounded, rounded.round())
    assert not {net[0].offsets, net[2].offsets} & optimizer.state.keys()
    optimizer.step()  # with the gradients of the weights that remain, and without those of positions
    loss_of(net, batches()[0]).backward()
    optimizer.step()
    assert torch.equal(offsets(net), rounded)
    assert {row["why_not"] for row in trainer.report().values()} == {"rounded"}


def test_positions_frozen_by_requires_grad_stay_although_a_gradient_and_momentum_remain(net):
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, multiplier=5.0, max_displacement=0.01)
    train(net, optimizer)
    net[0].offsets.data += 1
    frozen = net[0].offsets.detach().clone()
    net[0].offsets.requires_grad_(False)
    assert net[0].offsets.grad is not None
    optimizer.step()
    train(net, optimizer, 2)
    assert torch.equal(net[0].offsets.data, frozen)
    assert [row["why_not"] for row in trainer.report().values()] == ["requires_grad is False", ""]


def test_rounding_that_moves_all_taps_back_says_so(net):
    optimizer = sgd(net)
    PositionTrainer(optimizer, net, multiplier=1e-3, round_at=2)
    train(net, optimizer, 1)
    with pytest.warns(UserWarning, match=r"no position was learned; raise `multiplier` \(=0.001\)"):
        train(net, optimizer, 1)


def test_copies_get_the_rounded_positions(net):
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    teacher, shadow = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, multiplier=5.0, round_at=4, copies=[average, teacher, shadow])
    for step in range(4):
        train(net, optimizer, 1, start=step)
        if step < 3:
            average.update_parameters(net)
    for held in (offsets(average), offsets(teacher), torch.cat([shadow["0.offsets"], shadow["2.offsets"]])):
        assert torch.equal(held, offsets(net))
    teacher[0].offsets.data += 1e-3  # as averaging does that is not exact
    trainer.hold_copies()
    assert torch.equal(offsets(teacher), offsets(net))


def saved(*objects):
    file = io.BytesIO()
    torch.save([value.state_dict() for value in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [1, 4, 7, 9], ids=["warm-up", "learning", "rounding", "after"])
def test_model_and_optimizer_alone_resume_exactly(stop):
    def make(seed):
        torch.manual_seed(seed)
        net = TinyModule().net.double()
        optimizer = AdamW(net.parameters(), lr=0.1)
        return net, optimizer, PositionTrainer(
            optimizer, net, multiplier=3.0, warmup_steps=2, schedule="lattice", round_at=7
        )  # fmt: skip

    net, optimizer, trainer = make(0)
    train(net, optimizer, stop)
    states = saved(net, optimizer, trainer)
    train(net, optimizer, 11 - stop, start=stop)

    again, optimizer, trainer = make(1)
    again.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert trainer.state_dict() == states[2] == {"step": stop, "rounded": stop >= 7}
    train(again, optimizer, 11 - stop, start=stop)
    assert torch.equal(offsets(again), offsets(net))
    assert torch.equal(again[0].weight, net[0].weight)


@pytest.mark.parametrize("normalize", ["gradient", "momentum"])
@pytest.mark.parametrize("stop", [1, 4, 8], ids=["warm-up", "learning", "after"])
def test_a_distributed_checkpoint_resumes_exactly(stop, normalize):
    """It makes an optimizer's state by a step of its own, with gradients and rates of zero, before it loads."""
    states = torch.distributed.checkpoint.state_dict

    def make():
        torch.manual_seed(0)
        net = TinyModule().net.double()
        optimizer = AdamW(net.parameters(), lr=0.1)
        arguments = {"multiplier": 2.0, "warmup_steps": 2, "round_at": 7, "normalize": normalize}
        return net, optimizer, PositionTrainer(optimizer, net, **arguments)

    net, optimizer, _ = make()
    train(net, optimizer, stop)
    of_model = copy.deepcopy(net.state_dict())
    of_optimizer = copy.deepcopy(states.get_optimizer_state_dict(net, optimizer))
    train(net, optimizer, 11 - stop, start=stop)
    again, optimizer, trainer = make()
    again.load_state_dict(of_model)
    options = states.StateDictOptions(strict=False)  # positions that are still have no state
    states.set_optimizer_state_dict(again, optimizer, of_optimizer, options=options)
    assert trainer.state_dict() == {"step": stop, "rounded": stop >= 7}
    train(again, optimizer, 11 - stop, start=stop)
    assert torch.equal(offsets(again), offsets(net))
    assert torch.equal(again[0].weight, net[0].weight)


def test_an_optimizers_state_without_steps_is_an_error_until_they_are_given(net):
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, warmup_steps=2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.pop("acu_step", None)
    optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="saved without a PositionTrainer; call load_state_dict"):
        train(net, optimizer, 1)
    trainer.load_state_dict({"step": 7, "rounded": False})
    train(net, optimizer, 1)
    assert trainer.step == 8


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_computes_what_a_plain_step_does(net, keyword):
    plain = copy.deepcopy(net)
    arguments = {"multiplier": 3.0, "warmup_steps": 1, "round_at": 5}
    optimizer = sgd(plain)
    PositionTrainer(optimizer, plain, **arguments)
    train(plain, optimizer, 6)

    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, **arguments)
    for batch in batches()[:6]:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert loss > 0
    assert trainer.step == 6
    assert torch.equal(offsets(net), offsets(plain))
    assert torch.equal(net[0].weight, plain[0].weight)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is widely copied (Foret et al., 2021)."""

    def __init__(self, parameters, rho=0.05, **arguments):
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = SGD(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        old = [p.clone() for p in held]
        for p in held:
            p.add_(p.grad * 0.05 / norm)
        with torch.enable_grad():
            closure()
        for p, value in zip(held, old, strict=True):
            p.copy_(value)
        self.base_optimizer.step()


@pytest.mark.parametrize("inner", [False, True], ids=["SAM", "its base_optimizer"])
def test_sam_is_an_error_and_the_optimizer_inside_it_works(net, inner):
    optimizer = SAM(net.parameters(), lr=0.1, momentum=0.9)
    trainer = PositionTrainer(optimizer.base_optimizer if inner else optimizer, net, multiplier=1.0, warmup_steps=2)

    def closure():
        optimizer.zero_grad()
        loss_of(net, batches()[0]).backward()

    closure()
    if not inner:
        with pytest.raises(RuntimeError, match=r"SAM.step moves parameters .* give PositionTrainer the optimizer in"):
            optimizer.step(closure)
        return
    for step in range(4):
        optimizer.step(closure)
        assert bool(offsets(net).any()) == (step >= 2)
        closure()
    assert trainer.step == 4
    length = net[0].offsets.data.view(-1, 2).norm(dim=1)
    assert length.max() <= 0.1 + 0.19 + 1e-9  # two unit steps at a rate of 0.1 with momentum 0.9


def test_a_closure_that_is_called_twice_or_never_is_an_error(net):
    class Odd(SGD):
        calls = 2

        def step(self, closure=None):
            for _ in range(self.calls):
                closure()

    optimizer = Odd(net.parameters(), lr=0.1)
    PositionTrainer(optimizer, net)
    for calls, error in [(2, "calls it twice"), (0, "did not call its closure")]:
        optimizer.calls = calls
        with pytest.raises(RuntimeError, match=error):
            optimizer.step(lambda: loss_of(net, batches()[0]).backward())


def test_several_optimizers_have_a_trainer_each(net):
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[2].parameters(), lr=0.1)
    one = PositionTrainer(first, net, multiplier=10.0, round_at=3)
    other = PositionTrainer(second, net, multiplier=1.0, warmup_steps=1)
    for batch in batches()[:3]:
        for optimizer in (first, second):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            if other.step < 1 or optimizer is first:
                optimizer.step()
    assert (one.step, one.rounded, other.step, other.rounded) == (3, True, 1, False)
    assert list(one.report()) == ["0"]
    assert list(other.report()) == ["2"]
    assert not net[2].offsets.any()


@pytest.mark.filterwarnings("ignore:after rounding all taps")
@pytest.mark.parametrize("arguments", [{"foreach": True}, {"fused": True}, {"lr": torch.tensor(0.1), "fused": True}])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_foreach_fused_and_rates_that_are_tensors(net, kind, arguments):
    results = []
    for options in ({"foreach": False}, arguments):
        model = copy.deepcopy(net)
        optimizer = kind(model.parameters(), **({"lr": 0.1} | options))
        PositionTrainer(optimizer, model, multiplier=2.0, warmup_steps=1, schedule="cosine", total_steps=9)
        train(model, optimizer, 5)
        results.append(offsets(model))
    assert results[0].abs().max() > 0.1
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)  # the rate is a float32


@pytest.mark.slow
def test_a_compiled_model_and_a_compiled_step_learn_the_same(net):
    results = []
    for compiled in ([], ["model"], ["step"]):
        model = copy.deepcopy(net)
        optimizer = sgd(model)
        wrapped = torch.compile(model, backend="eager") if "model" in compiled else model
        trainer = PositionTrainer(optimizer, wrapped, multiplier=2.0, warmup_steps=1, round_at=4)
        if "step" in compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")
        train(wrapped, optimizer, 5)
        assert trainer.step == 5
        results.append((offsets(model), model[0].weight))
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])


#: Multipliers that let taps move by some pixels in a few steps.
RATES = {"gradient": 3.0, "momentum": 6.0}

SCRIPT = """
import os, sys
import torch.distributed as dist
from helpers.processes import run_forked

def run():
    from training.test_position_trainer import half_of_each_batch
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for strategy in ("ddp", "ddp_find_unused", "fsdp2"):
        for normalize in ("gradient", "momentum"):
            half_of_each_batch(rank, strategy, normalize, f"{sys.argv[1]}/{strategy}_{normalize}{rank}.pt")
    dist.destroy_process_group()

sys.exit(run_forked(run, processes=2))
"""


def half_of_each_batch(rank, strategy, normalize, path):
    """What one of two processes does."""
    torch.manual_seed(0)
    net = TinyModule().net.double()
    if strategy != "fsdp2":
        unused = strategy == "ddp_find_unused"  # it asks which parameters get gradients; those of positions still do
        model = nn.parallel.DistributedDataParallel(net, find_unused_parameters=unused)
    else:
        model = fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = sgd(model)
    PositionTrainer(optimizer, model, multiplier=RATES[normalize], warmup_steps=2, round_at=7, normalize=normalize)
    seen = []
    for images, labels in batches()[:9]:
        optimizer.zero_grad()
        loss_of(model, (images[2 * rank : 2 * rank + 2], labels[2 * rank : 2 * rank + 2])).backward()
        optimizer.step()
        seen.append(offsets(net))
    torch.save(torch.stack(seen), path)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "LOCAL_"))}
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=True, timeout=300)
    for normalize, multiplier in RATES.items():
        torch.manual_seed(0)
        net = TinyModule().net.double()
        optimizer = sgd(net)
        PositionTrainer(optimizer, net, multiplier=multiplier, warmup_steps=2, round_at=7, normalize=normalize)
        seen = []
        for step in range(9):
            train(net, optimizer, 1, start=step)
            seen.append(offsets(net))
        assert offsets(net).abs().max() >= 2
        for strategy in ("ddp", "ddp_find_unused", "fsdp2"):
            paths = [tmp_path / f"{strategy}_{normalize}{rank}.pt" for rank in (0, 1)]
            first, second = (torch.load(path, weights_only=True) for path in paths)
            assert torch.equal(first, second)
            torch.testing.assert_close(first, torch.stack(seen), rtol=0, atol=1e-10)


def test_a_group_that_is_added_later_is_split_too(net):
    optimizer = SGD(net[2].parameters(), lr=0.1)
    trainer = PositionTrainer(optimizer, net, multiplier=0.5)
    train(net, optimizer, 1)
    optimizer.add_param_group({"params": net[0].parameters(), "lr": 0.2})
    train(net, optimizer, 1)
    rows = trainer.report()
    assert {name: row["learning_rate"] for name, row in rows.items()} == {"0": 0.1, "2": 0.05}
    assert {row["step"] for row in rows.values()} == {2}


def test_an_optimizer_made_before_the_conversion_gets_the_positions():
    net = TinyModule(convert=False).net.double()
    optimizer = sgd(net)
    convert_to_acu(net)
    PositionTrainer(optimizer, net, multiplier=1.0)
    train(net, optimizer)
    assert offsets(net).any()


def test_layers_without_a_gradient_are_named_once(net):
    class ReadsTheWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            return self.net[2](F.conv2d(images, self.net[0].weight, padding=1))

    model = ReadsTheWeight()
    optimizer = sgd(model)
    trainer = PositionTrainer(optimizer, model, warmup_steps=1)
    train(model, optimizer, 1)
    with pytest.warns(UserWarning, match=r"positions of net.0 got no gradient in the first step") as caught:
        train(model, optimizer, 1)
    assert len(caught) == 1
    train(model, optimizer, 1)
    assert [row["learns"] for row in trainer.report().values()] == [False, True]


def test_a_layer_that_rests_is_no_fault_but_shows_in_the_report(net):
    net.unused = convert_to_acu(nn.Sequential(nn.Conv2d(2, 2, 3))).double()
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net)
    for batch in batches()[:2]:
        loss_of(net[:3], batch).backward()
        optimizer.step()
    assert [row["why_not"] for row in trainer.report().values()] == ["", "", "no gradient in the first step"]


def test_report_says_how_far_and_why_not(net):
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, multiplier=0.5, warmup_steps=2, schedule="linear", total_steps=12)
    train(net, optimizer, 1)
    assert trainer.report()["0"] == {
        "mean_displacement": 0.0, "max_displacement": 0.0, "learning_rate": 0.05, "step": 1, "learns": False,
        "why_not": "warm-up until step 2",
    }  # fmt: skip
    train(net, optimizer, 3)
    row = trainer.report()["2"]
    distance = net[2].displacement.norm(dim=-1)[:, net[2].movable]
    assert row["mean_displacement"] == pytest.approx(distance.mean().item())
    assert row["max_displacement"] == pytest.approx(distance.max().item())
    assert (row["step"], row["learns"], row["why_not"]) == (4, True, "")
    assert row["learning_rate"] == pytest.approx(0.05 * 0.8)


def test_removed_it_does_nothing_and_rounded_positions_stay(net):
    optimizer = sgd(net)
    with PositionTrainer(optimizer, net, multiplier=5.0, warmup_steps=1) as trainer:
        train(net, optimizer, 3)
    train(net, optimizer, 1)
    assert trainer.step == 3
    with PositionTrainer(optimizer, net, multiplier=5.0, weight_decay=0.5) as trainer:  # goes on
        assert trainer.step == 3
        assert optimizer.param_groups[1]["weight_decay"] == 0.5
        trainer.round_and_freeze()
    rounded = offsets(net)
    train(net, optimizer, 2)
    assert torch.equal(offsets(net), rounded)


def test_errors_name_the_argument_and_its_value(net):
    def fails(error, match, optimizer=None, model=net, **arguments):
        optimizer = sgd(net) if optimizer is None else optimizer
        groups = [len(group["params"]) for group in getattr(optimizer, "param_groups", [])]
        with pytest.raises(error, match=match):
            PositionTrainer(optimizer, model, **arguments)
        assert [len(group["params"]) for group in getattr(optimizer, "param_groups", [])] == groups

    fails(TypeError, r"`optimizer` \(=Sequential(.|\n)*\) must be a torch.optim.Optimizer", net)
    fails(TypeError, r"`optimizer` \(=LBFGS\) takes one parameter group only", torch.optim.LBFGS(net.parameters()))
    fails(ValueError, "`optimizer` .SGD. holds neither positions", SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    fails(TypeError, "`model` must be an nn.Module", model=net.parameters())
    fails(ValueError, r"`model` \(Linear\) has no active convolutions; call", model=nn.Linear(2, 2))
    fails(ValueError, r"`multiplier` \(=nan\) must be finite", multiplier=math.nan)
    fails(ValueError, r"`multiplier` \(=inf\) must be finite", multiplier=math.inf)
    fails(ValueError, r"`warmup_steps` \(=inf\) must be finite", warmup_steps=math.inf)
    fails(TypeError, r"`warmup_steps` \(=1.5\) must be a whole number", warmup_steps=1.5)
    fails(ValueError, r"`weight_decay` \(=-1\) must not be negative", weight_decay=-1)
    fails(ValueError, r"`max_displacement` \(=inf\) must be finite", max_displacement=math.inf)
    fails(ValueError, r"`schedule` \(='sine'\) must be a Schedule or one of 'constant'", schedule="sine")
    fails(ValueError, r"`schedule` \(=LatticeDecay.* needs a training with a known end", schedule=LatticeDecay())
    fails(ValueError, r"`total_steps` \(=5\) is not more than `warmup_steps` \(=5\)", total_steps=5, warmup_steps=5)
    fails(ValueError, r"`round_at` \(=5\) is step 5, not after the warm-up", round_at=5, warmup_steps=5)
    fails(ValueError, r"`round_at` \(=0.2\) is step 2, not after", round_at=0.2, total_steps=10, warmup_steps=5)
    fails(ValueError, r"`round_at` \(=0.5\) is a fraction of `total_steps`; give that", round_at=0.5)
    fails(ValueError, r"`round_at` \(=9\) is after the training ends, `total_steps` \(=8\)", round_at=9, total_steps=8)
    fails(ValueError, r"`round_at` \(=5.0\) must be a step \(an int\) or a fraction", round_at=5.0, total_steps=10)
    fails(TypeError, r"`round_at` \(=True\) must be a number", round_at=True)
    fails(ValueError, r"`collision` \(='merge'\) must be", collision="merge")
    fails(TypeError, r"`copies` must be a list of models or dicts, got Sequential", copies=copy.deepcopy(net))
    fails(ValueError, r"`copies`: Linear has no positions of `model`", copies=[nn.Linear(2, 2)])
    scheduled, other = sgd(net), sgd(net)
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, 2)
    fails(RuntimeError, r"`optimizer` \(SGD\) has a scheduler already.* make it after", scheduled)
    fails(ValueError, "`schedulers`: StepLR is not a scheduler of `optimizer`", other, schedulers=[scheduler])
    PositionTrainer(other, net)
    fails(RuntimeError, r"`optimizer` \(=SGD\) has a PositionTrainer already; call remove", other)
    net.requires_grad_(False)
    fails(ValueError, "the positions of all layers of `model` have requires_grad=False", SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize("library", ["accelerate", "lightning.fabric.wrappers"])
def test_the_error_for_a_wrapped_optimizer_names_the_one_that_works(net, library):
    module, inner = pytest.importorskip(library), sgd(net)
    if library == "accelerate":
        wrapped = module.Accelerator(cpu=True).prepare(inner)
    else:
        wrapped = module._FabricOptimizer(inner, strategy=None)
    with pytest.raises(RuntimeError, match=r"give the optimizer that it wraps \(optimizer\.optimizer\)"):
        PositionTrainer(wrapped, net)
    PositionTrainer(wrapped.optimizer, net)


def test_an_optimizer_that_does_not_run_torchs_hooks_is_an_error(net):
    lookahead = pytest.importorskip("timm.optim").Lookahead(sgd(net))
    with pytest.raises(RuntimeError, match=r"`optimizer` \(=Lookahead\) does not run torch's hooks"):
        PositionTrainer(lookahead, net)
    trainer = PositionTrainer(lookahead._base_optimizer, net, multiplier=5.0, round_at=5)
    train(net, lookahead, STEPS_PER_EPOCH + 2)
    assert trainer.rounded
    assert torch.equal(offsets(net), offsets(net).round())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_trains_the_positions_of_its_own_model(net, copied):
    """Torch copies no hooks with an optimizer, so that positions would be stepped along their raw gradients."""
    optimizer = sgd(net)
    trainer = PositionTrainer(optimizer, net, multiplier=10.0, warmup_steps=4, round_at=7)
    train(net, optimizer, steps=2)
    other, other_optimizer, other_trainer = copied((net, optimizer, trainer))
    train(other, other_optimizer, steps=6, start=2)
    assert (trainer.step, other_trainer.step, other_trainer.rounded) == (2, 8, True)
    train(net, optimizer, steps=6, start=2)
    assert trainer.rounded
    assert torch.equal(offsets(net), offsets(other))
    trainer.remove()
    assert not copied(trainer).optimizer._optimizer_step_pre_hooks  # removed ones stay removed


def test_schedulers_that_are_no_list_are_an_error(net):
    with pytest.raises(TypeError, match=r"`schedulers` must be a list of schedulers, got int; write \[scheduler\]"):
        PositionTrainer(sgd(net), net, schedulers=3)


def test_a_second_one_after_rounding_says_that_positions_stay_rounded(net):
    optimizer = SGD(net.parameters(), lr=0.1)
    with PositionTrainer(optimizer, net, multiplier=50.0, round_at=2):
        train(net, optimizer, steps=2)
    for _, layer in acu_layers(net):
        layer.offsets.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"rounded by an earlier PositionTrainer.*'rounded': False"):
        positions = PositionTrainer(optimizer, net, multiplier=50.0)
    positions.load_state_dict({"step": 0, "rounded": False})
    before = net[0].offsets.detach().clone()
    train(net, optimizer, steps=1)
    assert not torch.equal(net[0].offsets, before)
