"""ACUConv2d in a training script: copies, state, precision, compilation, export, weight averages."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import RING, asymmetric, perturbed
from helpers.oracle import assert_close
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_acu import ACUConv2d, acu_layers

pytestmark = pytest.mark.slow


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [lambda: asymmetric()[0], lambda: ACUConv2d.from_positions(4, 6, RING, (2, 1))])
def test_copies_compute_the_same_and_learn_on_their_own(clone, make):
    layer, x = make(), torch.randn(1, 4, 7, 9)
    twin = clone(layer)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.displacement, layer.displacement)
    perturbed(twin)
    assert not torch.equal(twin.offsets, layer.offsets)


def test_a_state_dict_holds_three_tensors_and_loads_with_weights_only():
    (layer, x), (other, _), file = asymmetric(), asymmetric(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "weight": (6, 2, 3, 2), "bias": (6,), "offsets": (36,),
    }  # fmt: skip
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_a_baselines_state_dict_lacks_only_the_offsets():
    layer = perturbed(ACUConv2d(2, 4, 3))
    with pytest.warns(UserWarning, match="whose taps have moved"):
        result = layer.load_state_dict(nn.Conv2d(2, 4, 3).state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["offsets"], [])


@pytest.mark.parametrize(
    ("move", "weight", "offsets"),
    [
        (lambda layer: layer.half(), torch.float16, torch.float32),
        (lambda layer: layer.to(torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda layer: layer.double(), torch.float64, torch.float64),
        (lambda layer: layer.double().half(), torch.float16, torch.float64),
        (lambda layer: layer.to("meta", torch.bfloat16), torch.bfloat16, torch.float32),
        (lambda layer: layer.to(memory_format=torch.channels_last), torch.float32, torch.float32),
        (lambda layer: nn.Sequential(layer).bfloat16()[0], torch.bfloat16, torch.float32),
    ],
    ids=["half", "bfloat16", "double", "double then half", "meta", "channels_last", "in a model"],
)
def test_offsets_and_their_gradient_keep_float32_in_low_precision(move, weight, offsets):
    layer, x = asymmetric()
    layer(x).sum().backward()
    stored, before = layer.offsets.detach().clone(), layer.offsets.grad.clone()
    moved = move(layer)
    assert moved.weight.dtype == moved.weight.grad.dtype == weight
    assert moved.offsets.dtype == moved.offsets.grad.dtype == offsets
    if not moved.offsets.is_meta:
        assert torch.equal(moved.offsets.float(), stored)
        assert torch.equal(moved.offsets.grad.float(), before)
    y = moved(x.to(moved.weight))
    assert (y.dtype, y.device, tuple(y.shape)) == (weight, moved.weight.device, (2, 6, 3, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_made_in_low_precision_has_float32_offsets_and_trains(dtype):
    layer = ACUConv2d(2, 4, 3, dtype=dtype)
    layer(torch.randn(1, 2, 6, 7, dtype=dtype)).sum().backward()
    assert layer.offsets.dtype == layer.offsets.grad.dtype == torch.float32
    assert layer.offsets.grad.any()


def test_autocast_trains_float32_offsets_through_a_bfloat16_convolution():
    layer, x = asymmetric()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    low, layer.offsets.grad = layer.offsets.grad, None
    layer(x).sum().backward()
    assert low.dtype == torch.float32
    assert F.cosine_similarity(low, layer.offsets.grad, dim=0) > 0.999


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: asymmetric()[0], lambda: ACUConv2d.from_positions(4, 6, RING, (2, 1))])
def test_compiles_into_one_graph_with_the_same_values_and_gradients(make):
    torch._dynamo.reset()
    layer, x = make(), torch.randn(2, 4, 7, 9)
    expected = layer(x)
    gradient = torch.autograd.grad(expected.square().sum(), layer.offsets)[0]
    actual = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert_close(actual, expected, 1e-6)
    assert_close(torch.autograd.grad(actual.square().sum(), layer.offsets)[0], gradient, 1e-5)


def test_exports_with_a_dynamic_batch():
    layer, x = asymmetric()
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 5):
        x = torch.randn(batch, 4, 7, 9)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("average", "method"),
    [(lambda model: ModelEmaV3(model, decay=0.5), "update"), (AveragedModel, "update_parameters")],
    ids=["timm's EMA", "torch's average"],
)
def test_weight_averages_follow_the_offsets(average, method):
    model = nn.Sequential(ACUConv2d(2, 4, 3, fixed_centre=False))
    averaged, optimizer = average(model), torch.optim.SGD(model.parameters(), lr=1)
    update = getattr(averaged, method)
    update(model)  # the first of two that torch averages
    model[0].offsets.grad = torch.full((18,), -1.0)
    optimizer.step()
    update(model)
    [(_, twin)] = acu_layers(averaged.module)
    assert torch.equal(twin.offsets, torch.full((18,), 0.5))  # halfway between 0 and 1
    assert torch.equal(model[0].offsets, torch.ones(18))
