"""Positions stay in float32: in half-precision models, and where FSDP2 would cast them."""

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import Spy, TinyModule, fit
from torch import nn

from lightning_acu import convert_to_acu
from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune
from lightning_acu.callbacks._trainer import require_full_precision


@pytest.fixture(scope="module")
def mesh():
    """FSDP2 with one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh, dtype=None, by="layer", model_dtype=torch.float32):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module = TinyModule().to(model_dtype)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    if by == "layer":
        fully_shard(module.net[0], mesh=mesh)
        fully_shard(module.net[2], mesh=mesh, mp_policy=policy)
    fully_shard(module.net, mesh=mesh, mp_policy=policy)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("by", "name"), [("layer", "net.2"), ("network", "net.0")])
def test_a_policy_that_casts_positions_is_an_error_that_says_what_does(mesh, dtype, by, name):
    module = sharded(mesh, dtype, by)
    with pytest.raises(RuntimeError, match=rf"param_dtype={dtype}\) .* positions of {name}, .*precision='bf16-mixed'"):
        require_full_precision(OffsetLogger(), module)


@pytest.mark.parametrize("by", ["layer", "network"])
def test_half_precision_weights_cannot_be_sharded_with_positions(mesh, by):
    module = sharded(mesh, None, by, torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"OffsetLogger: FSDP2 cannot shard the torch.bfloat16 weights of net.0 toge"
    ):
        require_full_precision(OffsetLogger(), module)


def test_full_precision_and_policies_for_other_layers_are_fine(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    require_full_precision(OffsetLogger(), sharded(mesh))
    require_full_precision(OffsetLogger(), sharded(mesh, torch.float32, "network"))
    net = nn.Sequential(convert_to_acu(nn.Sequential(nn.Conv2d(2, 2, 3))), nn.Linear(2, 2))
    fully_shard(net[1], mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(net[0], mesh=mesh)
    require_full_precision(OffsetLogger(), fully_shard(net, mesh=mesh))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_a_half_precision_model_learns_positions_in_float32(tmp_path, precision):
    model, spy = TinyModule(), Spy()
    ours = [PositionLRSchedule(0.02, warmup_steps=1), RoundThenFinetune(at_step=9, keep=False)]
    with pytest.warns(UserWarning, match="all taps are where they started"):
        fit(model, [*ours, spy], tmp_path, precision=precision)
    moved = spy.offsets[8]
    assert moved.dtype == torch.float32
    assert (moved != moved.bfloat16()).any()
    assert 0 < moved.abs().max() < 0.2
    assert model.net[0].weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
