"""Tools of torch, and weight averages of other libraries, around a training of positions in a plain loop.

Traces, scripts and graphs are in test_scripts_and_traces.py; Lightning's averages in callbacks/test_averages.py.
"""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.census_model import wake
from helpers.oracle import assert_close
from helpers.tiny import TinyModule, loader
from timm import create_model
from timm.utils import ModelEmaV3
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from lightning_acu import acu_layers, convert_to_acu, fold_acu, round_acu
from lightning_acu.training import PositionTrainer


@pytest.fixture
def net():
    net = TinyModule().net
    net.insert(1, torch.nn.BatchNorm2d(4))
    return net.double()


def batches():
    return list(loader(dtype=torch.float64)) * 3


def loss_of(net, batch):
    return F.cross_entropy(net(batch[0]).mean((2, 3)), batch[1])


def offsets(net):
    return torch.cat([layer.offsets.detach() for _, layer in acu_layers(net)])


def train(net, optimizer, after_step=lambda: None):
    for batch in batches():
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        after_step()


def assert_folds(net):
    image = batches()[0][0]
    expected = net.eval()(image)
    assert_close(fold_acu(net, image)(image), expected, 1e-10)


def test_swa_with_its_scheduler_and_batch_norm(net):
    optimizer, swa = SGD(net.parameters(), lr=0.1), AveragedModel(net)
    trainer = PositionTrainer(optimizer, net, multiplier=5.0, round_at=15, copies=[swa])
    scheduler, seen = SWALR(optimizer, swa_lr=0.02, anneal_epochs=2), []

    def after_step():
        scheduler.step()
        if 4 <= trainer.step < 10:
            swa.update_parameters(net)
            seen.append(offsets(net))
            assert_close(offsets(swa), torch.stack(seen).mean(0), 1e-12)

    train(net, optimizer, after_step)
    assert len(seen) == 6
    assert next(iter(trainer.report().values()))["learning_rate"] == pytest.approx(5 * 0.02)
    assert trainer.rounded
    assert torch.equal(offsets(swa), offsets(net))  # whole pixels in both
    assert offsets(net).any()
    update_bn([batch[0] for batch in batches()[:3]], swa)
    assert_folds(swa.module)


class EmaPytorch:
    def __init__(self, net):
        module = pytest.importorskip("ema_pytorch")
        self.average = module.EMA(net, beta=0.5, update_after_step=0, update_every=1, inv_gamma=1e-9)
        self.update, self.model = self.average.update, self.average.ema_model


class UltralyticsEMA:
    def __init__(self, net):
        module = pytest.importorskip("ultralytics.utils.torch_utils")
        self.average = module.ModelEMA(net, decay=0.5, tau=1e-9)
        self.update, self.model = lambda: self.average.update(net), self.average.ema


class TimmEma:
    def __init__(self, net):
        self.average = ModelEmaV3(net, decay=0.5)
        self.update, self.model = lambda: self.average.update(net), self.average.module


class TorchEma:
    def __init__(self, net):
        self.average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        self.average.update_parameters(net)  # the first time it copies
        self.update, self.model = lambda: self.average.update_parameters(net), self.average.module


@pytest.mark.parametrize("kind", [TimmEma, TorchEma, EmaPytorch, UltralyticsEMA])
def test_ema_of_four_libraries(net, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    ema = kind(net)
    optimizer, expected = SGD(net.parameters(), lr=0.1), offsets(net)
    trainer = PositionTrainer(optimizer, net, multiplier=1.0, round_at=15, copies=[ema.average])
    first = True

    def after_step():
        nonlocal expected, first
        ema.update()
        if trainer.rounded:
            trainer.hold_copies()
            return
        if first and kind is EmaPytorch:  # the first time it copies
            expected = offsets(net)
        expected, first = 0.5 * expected + 0.5 * offsets(net), False
        assert_close(offsets(ema.model), expected, 1e-12)

    train(net, optimizer, after_step)
    assert offsets(net).any()
    assert torch.equal(offsets(ema.model), offsets(net))
    assert torch.equal(offsets(net), offsets(net).round())
    assert_folds(ema.model)


def test_an_average_that_is_a_list_without_names_is_no_copy_but_can_be_rounded(net):
    torch_ema = pytest.importorskip("torch_ema")
    optimizer = SGD(net.parameters(), lr=0.1)
    ema = torch_ema.ExponentialMovingAverage(net.parameters(), decay=0.9)
    with pytest.raises(ValueError, match="copies"):
        PositionTrainer(optimizer, net, copies=[ema], round_at=15)
    PositionTrainer(optimizer, net, multiplier=1.0, round_at=15)
    train(net, optimizer, ema.update)
    average = copy.deepcopy(net)
    ema.copy_to(average.parameters())
    assert not torch.equal(offsets(average), offsets(average).round())
    round_acu(average)
    assert torch.equal(offsets(average), offsets(average).round())
    assert_folds(average)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation by two passes, as github.com/davda54/sam, which most people copy, does it."""

    def __init__(self, parameters, base_optimizer, rho=0.05, **arguments):
        super().__init__(parameters, {"rho": rho, **arguments})
        self.base_optimizer = base_optimizer(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    def _held(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm(p=2) for p in self._held()]).norm(p=2)
        for p in self._held():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (self.defaults["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self._held():
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError


def train_by_sam(net, optimizer, after_step=lambda: None):
    for batch in batches():
        loss_of(net, batch).backward()
        optimizer.first_step()
        loss_of(net, batch).backward()
        optimizer.second_step()
        after_step()


def test_sam_in_two_passes_without_a_position_trainer(net):
    """Both passes take the raw gradients of positions, as those of all parameters."""
    start, optimizer = offsets(net), SAM(net.parameters(), SGD, lr=0.1)
    train_by_sam(net, optimizer)
    assert offsets(net).isfinite().all()
    assert not torch.equal(offsets(net), start)


def test_sam_in_two_passes_with_a_position_trainer_of_its_base_optimizer(net):
    """The step down takes unit gradients; the step up, which is undone, the raw ones, as of all parameters."""
    optimizer = SAM(net.parameters(), SGD, lr=0.1)
    trainer = PositionTrainer(optimizer.base_optimizer, net, multiplier=1.0, warmup_steps=2, round_at=15)
    seen = [offsets(net)]
    train_by_sam(net, optimizer, lambda: seen.append(offsets(net)))
    assert trainer.step == len(seen) - 1 == 18
    steps = [(after - before).view(-1, 2).norm(dim=1) for before, after in itertools.pairwise(seen)]
    assert not any(step.any() for step in steps[:2])  # the warm-up
    for step in steps[2:14]:
        movable = step[step > 0]
        assert len(movable) >= 8
        assert_close(movable, torch.full_like(movable, 0.1), 1e-12)
    assert all(torch.equal(each, each.round()) for each in seen[15:])
    assert not any(step.any() for step in steps[15:])


@pytest.mark.slow
def test_a_whole_model_compiles_and_exports_while_active():
    torch._dynamo.reset()
    model = convert_to_acu(create_model("test_resnet", num_classes=5)).eval()
    for _, layer in acu_layers(model):
        torch.nn.init.uniform_(layer.offsets, -0.7, 0.7)
    wake(model)
    image = torch.rand(2, 3, 40, 48)
    positions = [layer.offsets for _, layer in acu_layers(model)]
    expected, output = model(image), torch.compile(model, fullgraph=True, backend="aot_eager")(image)
    assert_close(output, expected, 1e-5)
    eager, compiled = (torch.autograd.grad(each.square().sum(), positions) for each in (expected, output))
    for got, want in zip(compiled, eager, strict=True):
        assert want.any()
        assert_close(got, want, 1e-4)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},))
    other = torch.rand(5, 3, 40, 48)
    assert_close(program.module()(other), model(other), 1e-5)


FSDP2 = """
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, {tests!r})
from helpers.processes import run_forked

from lightning_acu import convert_to_acu
from lightning_acu.training import PositionTrainer


def trained(policy=None, autocast=False, rank=0, count=1):
    torch.manual_seed(0)
    net = convert_to_acu(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1)))
    if policy is not None:
        for part in (net[0], net[2], net):
            fully_shard(part, mp_policy=policy)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    PositionTrainer(optimizer, net, multiplier=1.0, round_at=6 if autocast else None)
    images = torch.rand(6, 4, 3, 9, 11, generator=torch.Generator().manual_seed(1))
    for batch in images:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(batch.chunk(count)[rank])
        output.float().square().mean().backward()
        optimizer.step()
    return torch.cat([getattr(layer.offsets, "full_tensor", lambda: layer.offsets)().detach() for layer in net[::2]])


def process():
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    here = {{"rank": rank, "count": 2}}
    float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    torch.testing.assert_close(trained(float32, **here), alone, rtol=0, atol=1e-4)
    mixed = trained(float32, autocast=True, **here)
    assert mixed.dtype == torch.float32 and mixed.any() and torch.equal(mixed, mixed.round())
    try:
        trained(MixedPrecisionPolicy(param_dtype=torch.bfloat16), **here)
    except TypeError as error:
        assert "leave `param_dtype` out and use torch.autocast" in str(error), error
    else:
        raise AssertionError("positions in bfloat16 were taken")
    dist.destroy_process_group()


def alone_in_a_process():
    torch.save(trained(), sys.argv[1])


if __name__ == "__main__":
    assert run_forked(alone_in_a_process) == 0
    alone = torch.load(sys.argv[1])
    assert alone.any()
    sys.exit(run_forked(process, processes=2))
"""


@pytest.mark.slow
def test_fsdp2_with_mixed_precision_policies_in_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(FSDP2.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(script), str(tmp_path / "alone.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
