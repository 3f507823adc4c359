"""Models of timm and torchvision, whole: conversion keeps the output, every tap can learn, the fold is exact."""

import copy
import functools
import json
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from helpers.oracle import assert_close
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from lightning_acu import acu_layers, convert_to_acu, create_model, fold_acu, round_acu
from lightning_acu.folded import ReshapedConv2d

pytestmark = pytest.mark.slow

# Name, image size (the deepest features are at least as large as the kernels there), dtype, kernel sizes.
MODELS = {
    "resnet18": (96, torch.float64, [3, 7]),
    "resnet50": (96, torch.float32, [3]),
    "mobilenetv3_small_100": (160, torch.float32, [3, 5]),
    "efficientnet_b0": (160, torch.float32, [3, 5]),
    "convnext_atto_ols": (224, torch.float32, [3, 7]),
    "torchvision/vgg11_bn": (96, torch.float32, [3]),
    "torchvision/inception_v3": (299, torch.float32, [3, 5, (1, 7), (7, 1), (1, 3), (3, 1)]),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Two threads that wait for each other take ten times as long where something else runs beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def built(name):
    """Random weights, in which no path is closed: gains are 1 (where they start at 0 or 1e-6), dropout is off."""
    torch.manual_seed(0)
    arguments = {"init_weights": False} if "inception" in name else {}
    model = create_model(name, num_classes=10, **arguments).to(MODELS[name][1])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for gain in (getattr(module, "weight", None), getattr(module, "gamma", None)):
            if gain is not None and gain.ndim == 1 and gain.abs().max() < 1e-3:
                nn.init.ones_(gain)
    return model


def prepared(name):
    """A copy of the model, images for it, and its kernel sizes."""
    size, dtype, kernel_sizes = MODELS[name]
    return copy.deepcopy(built(name)), torch.randn(2, 3, size, size + 3, dtype=dtype), kernel_sizes


def logits(output):
    """One tensor; inception_v3 has a second head in training."""
    return output if isinstance(output, torch.Tensor) else torch.cat(list(output), -1)


def assert_relatively_close(actual, expected):
    assert_close(actual / expected.abs().max(), expected / expected.abs().max(), TOLERANCE[expected.dtype])


@models
def test_conversion_keeps_the_output_and_every_tap_can_learn(name):
    model, x, kernel_sizes = prepared(name)
    with torch.no_grad():
        expected = logits(model.train()(x))
    wanted = {size if isinstance(size, tuple) else (size, size) for size in kernel_sizes}
    count = sum(isinstance(module, nn.Conv2d) and module.kernel_size in wanted for module in model.modules())
    actual = logits(convert_to_acu(model, kernel_sizes=kernel_sizes)(x))
    assert_relatively_close(actual.detach(), expected)
    actual.square().sum().backward()
    layers = dict(acu_layers(model))
    assert len(layers) == count > 7
    for layer in layers.values():
        gradient = layer.offsets.grad.view(-1, 2)
        assert gradient[layer.movable].ne(0).all()
        assert not gradient[~layer.movable].any()


@models
def test_moved_taps_fold_into_plain_convolutions_that_compute_the_same(name, move):
    model, x, kernel_sizes = prepared(name)
    move(convert_to_acu(model.train(), kernel_sizes=kernel_sizes))
    with torch.no_grad():
        expected = logits(model(x))
        actual = logits(fold_acu(model)(x))
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Conv2d)}
    assert ReshapedConv2d in kinds <= {nn.Conv2d, ReshapedConv2d}
    assert_relatively_close(actual, expected)
    assert not torch.allclose(expected[0], expected[1], rtol=0.1)  # the model tells images apart


DEEPLAB = """
import json, re, torch
from lightning_acu import acu_layers, convert_to_acu, create_model, fold_acu

torch.manual_seed(0)
torch.set_num_threads(1)
model, x = create_model("torchvision/deeplabv3_resnet50", num_classes=4).eval(), torch.randn(1, 3, 289, 297)
with torch.no_grad():
    plain = model(x)["out"]
active = convert_to_acu(model)(x)["out"]
active.square().sum().backward()
silent = [n for n, l in acu_layers(model) if not l.offsets.grad.view(-1, 2)[l.movable].any(-1).all()]
dilations = sorted({l.dilation[0] for _, l in acu_layers(model)})
with torch.no_grad():
    for _, layer in acu_layers(model):
        torch.nn.init.uniform_(layer.offsets, -1, 1)
    moved = model(x)["out"]
    folded = fold_acu(model)(x)["out"]
scale = plain.abs().max(), moved.abs().max()
print(json.dumps({
    "converted": ((active - plain).abs().max() / scale[0]).item(),
    "folded": ((folded - moved).abs().max() / scale[1]).item(),
    "silent": silent,
    "dilations": dilations,
    # (not ru_maxrss, which counts the process that started this one too)
    "peak": 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]),
}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory in Linux's unit")
def test_deeplab_with_its_large_dilations_stays_within_4_gb():
    done = subprocess.run([sys.executable, "-c", DEEPLAB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["dilations"] == [1, 2, 4, 12, 24, 36]
    assert result["silent"] == []
    assert max(result["converted"], result["folded"]) < 1e-4
    assert result["peak"] < 4e9


REPARAMETERIZABLE = ["repvgg_a0", "repvit_m0_9"]


@pytest.mark.parametrize("name", REPARAMETERIZABLE)
def test_merging_weights_never_loses_positions_silently(name):
    model = convert_to_acu(timm.create_model(name))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="fold_acu"):
            timm.utils.reparameterize_model(each, inplace=True)


@pytest.mark.parametrize("name", REPARAMETERIZABLE)
def test_rounded_back_and_folded_models_can_merge_their_weights(name, move):
    model, x = timm.create_model(name, num_classes=10).eval(), torch.randn(1, 3, 64, 64)
    fold_acu(round_acu(move(convert_to_acu(model), 0.4)))
    expected = model(x)
    assert_relatively_close(timm.utils.reparameterize_model(model)(x), expected)


@pytest.mark.parametrize(
    ("name", "node"),
    [("torchvision/resnet18", "layer3"), ("tf_efficientnet_lite0", "blocks.4"), ("nf_regnet_b0", "stages.1")],
)
def test_torch_fx_traces_converted_models(name, node):
    model = convert_to_acu(create_model(name, num_classes=10)).eval()
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.7, 0.7)
    seen = []
    model.get_submodule(node).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    extract = create_feature_extractor(model, {node: "features"})
    image = torch.randn(1, 3, 65, 80)
    features = extract(image)["features"]
    model(image)
    assert torch.equal(features, seen[-1])
    features.square().mean().backward()
    assert any(layer.offsets.grad is not None for _, layer in acu_layers(model))
