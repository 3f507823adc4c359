"""Choices of the Triton backend: whole positions as a plain convolution, tables of tiles, and when "auto" takes it."""

import json
import warnings

import pytest
import torch
from helpers.oracle import acu_conv2d_loops
from helpers.triton_cases import DEVICE, exact  # noqa: F401

from lightning_acu import ACUConv2d, acu_conv2d
from lightning_acu.ops import backends, dense
from lightning_acu.ops.triton import backend as triton_backend
from lightning_acu.ops.triton import tiles as triton_tiles
from lightning_acu.ops.triton import tune as triton_tune
from lightning_acu.ops.triton import whole as triton_whole
from lightning_acu.ops.triton.tiles import Tile, shape_class, tile_for

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture
def asked(monkeypatch):
    """How often the values of positions were asked for."""
    calls, plan_windows = [], triton_whole.plan_windows
    monkeypatch.setattr(triton_whole, "plan_windows", lambda *args: calls.append(args) or plan_windows(*args))
    return calls


@pytest.fixture
def plain(monkeypatch):
    """How often a plain convolution ran in place of the kernels."""
    calls, convolve = [], dense.convolve
    monkeypatch.setattr(dense, "convolve", lambda *args: calls.append(args) or convolve(*args))
    return calls


def make_layer(**kwargs):
    layer = ACUConv2d(3, 4, 3, padding=1, **kwargs).to(DEVICE)
    layer.backend = "triton"
    with torch.no_grad():
        layer.offsets.view(-1, 9, 2)[:, 1] = torch.tensor([0.0, 1.0])  # onto the next tap: still a plain 3x3
    return layer


def expected(layer, image):
    tensors = (t.detach().double().cpu() for t in (image, layer.weight, layer.active_offsets(), layer.bias))
    return acu_conv2d_loops(*tensors, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=1)


def test_whole_positions_become_a_plain_convolution_when_they_come_unchanged(asked, plain):
    layer, image = make_layer(), torch.randn(2, 3, 5, 4, device=DEVICE)
    with torch.no_grad():
        for call in range(5):
            torch.testing.assert_close(layer(image).double().cpu(), expected(layer, image), rtol=1e-5, atol=1e-5)
            assert (len(asked), len(plain)) == (int(call >= 2), max(0, call - 1))
        layer.offsets[-1] = 0.5  # another version, and out of the 3x3
        for _ in range(5):
            torch.testing.assert_close(layer(image).double().cpu(), expected(layer, image), rtol=1e-5, atol=1e-5)
        assert (len(asked), len(plain)) == (2, 3)


def test_learning_positions_are_never_asked_about(asked, plain):
    layer, image = make_layer(), torch.randn(2, 3, 5, 4, device=DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(4):
        optimizer.zero_grad()
        layer(image).square().sum().backward()
        optimizer.step()
    assert (asked, plain) == ([], [])


def test_a_gradient_makes_it_forget(asked, plain):
    """Optimizers that write past torch's versions train all the same, and are evaluated as they are."""
    layer, image = make_layer(), torch.randn(2, 3, 5, 4, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            layer(image)
    layer(image).sum().backward()
    layer.offsets.data[0] = 0.5
    with torch.no_grad():
        torch.testing.assert_close(layer(image).double().cpu(), expected(layer, image), rtol=1e-5, atol=1e-5)
    assert len(plain) == 1


def test_positions_written_behind_its_back_are_never_silently_stale(plain):
    layer, image = make_layer(), torch.randn(2, 3, 5, 4, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            layer(image)
        layer.offsets.data.add_(0.4)
        assert layer(image).isnan().all()
    assert len(plain) == 2


def test_positions_that_learn_inside_a_cuda_graph_are_never_asked(plain, monkeypatch):
    """Its replays move them, and no version tells."""
    layer, image = make_layer(), torch.randn(2, 3, 5, 4, device=DEVICE)
    with monkeypatch.context() as capture:
        capture.setattr(triton_whole, "_capturing", lambda offsets: True)
        layer(image)
    with torch.no_grad():
        for _ in range(4):
            layer(image)
        layer.offsets.data.add_(0.4)  # as a replay does
        torch.testing.assert_close(layer(image).double().cpu(), expected(layer, image), rtol=1e-5, atol=1e-5)
    assert not plain


def test_views_of_one_tensor_are_different_positions():
    table = torch.zeros(2, 9, 2, device=DEVICE)
    table[1, :, 0] = 1.0
    image, weight = torch.randn(1, 3, 5, 4, device=DEVICE), torch.randn(2, 3, 3, 3, device=DEVICE)
    rounds = [[acu_conv2d(image, weight, row, padding=1, backend="triton") for row in table] for _ in range(4)]
    for later in rounds[1:]:
        for first, again in zip(rounds[0], later, strict=True):
            torch.testing.assert_close(first, again, rtol=1e-5, atol=1e-5)


def test_layers_without_a_fixed_tap_too(plain):
    layer, image = make_layer(fixed_centre=False), torch.randn(2, 3, 5, 4, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):
            layer(image)
    assert len(plain) == 1
    assert layer(image).requires_grad


def test_empty_images():
    layer = make_layer().requires_grad_(False)
    for _ in range(4):
        image = torch.randn(2, 3, 0, 4, device=DEVICE, requires_grad=True)
        output = acu_conv2d(image, layer.weight, layer.active_offsets(), padding=2, backend="triton")
        assert output.shape == (2, 4, 2, 6)
        assert not output.any()
        output.sum().backward()


def test_frozen_whole_positions_train_the_weights_by_a_plain_convolution(plain):
    layer, image = make_layer(position_groups=2), torch.randn(2, 3, 5, 4, device=DEVICE, requires_grad=True)
    layer.offsets.requires_grad_(False)
    runs = []
    for _ in range(3):
        output = layer(image)
        runs.append((output, *torch.autograd.grad(output, (image, layer.weight, layer.bias), output.detach())))
    assert len(plain) == 2  # the third time they come is the second forward pass
    for fused, other in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(fused, other, rtol=1e-5, atol=1e-5)


def test_scattered_whole_positions_stay_with_the_kernels(asked, plain):
    layer, image = make_layer(), torch.randn(2, 3, 5, 4, device=DEVICE)
    with torch.no_grad():
        layer.offsets.view(9, 2)[0] = -2.0
        for _ in range(4):
            layer(image)
    assert (len(asked), plain) == (1, [])


def forget():
    triton_tiles.table.cache_clear()
    tile_for.cache_clear()


def test_tiles_of_a_users_table_override_the_rule(monkeypatch, tmp_path):
    device = torch.device("cpu")
    rule = tile_for("product", torch.bfloat16, 48, 64, device)
    assert rule == Tile(64, 64, 64, 4)
    monkeypatch.setenv("LIGHTNING_ACU_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_tiles, "arch_of", lambda device: "sm_90")
    forget()
    tiles = {shape_class("product", torch.bfloat16, 48, 64): [128, 64, 64, 4, 2]}
    triton_tiles.tuned_tiles().write_text(json.dumps({"sm_90": {"tiles": tiles, "gemm_from": {"bfloat16": 256}}}))
    try:
        assert tile_for("product", torch.bfloat16, 64, 64, device) == Tile(128, 64, 64, 4, 2)  # the same class
        assert tile_for("product", torch.bfloat16, 100, 64, device) == rule
        assert triton_tiles.gemm_from(torch.bfloat16, device) == 256
        forget()
        triton_tiles.tuned_tiles().write_text('{"sm_90": {"tiles": {"x": [1, "a"]}}}')
        with pytest.raises(RuntimeError, match=r"triton_tiles\.json is damaged .*; delete it, or tune again"):
            tile_for("product", torch.bfloat16, 64, 64, device)
    finally:
        forget()


def test_auto_takes_it_on_gpus_that_have_measured_it_and_says_once_what_is_missing(monkeypatch):
    tensors = [torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.zeros(9, 2)]
    monkeypatch.setattr(triton_backend, "prefers", lambda *args: True)
    monkeypatch.setattr(triton_backend, "_missing", lambda: "Triton is not installed")
    monkeypatch.setitem(backends.BACKENDS, "cython", dense)
    monkeypatch.setattr(dense, "prefers", lambda *args: False)
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"backend='auto' uses 'dense', .* 'triton' would be: Triton is not installed"):
        acu_conv2d(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acu_conv2d(*tensors)


def test_tuning_keeps_the_fastest_tile_of_each_class(monkeypatch, tmp_path):
    """With a clock that likes large steps, and the GEMM route only from 16 channels on."""
    tuned = {}
    monkeypatch.setattr(triton_tiles, "table", lambda arch: tuned)
    monkeypatch.setattr(triton_tune, "_BATCH", 1)
    monkeypatch.setattr(triton_tune, "_MANY", 16)
    monkeypatch.setattr(triton_tune, "candidates", lambda *layer: few[layer[0]])
    few = {role: [Tile(16, 16, 16, 4), Tile(16, 16, 32, 4)] for role in ("product", "weight", "cells")}
    few["channelwise"] = [Tile(8, 16, 0, 4)]
    layers = (triton_tune.Layer((8, 8), 3), triton_tune.Layer((16, 16), 3), triton_tune.Layer((4, 4), 3, 4))

    def clock(call):
        if tuned["gemm_from"].get("float16") == 1:
            return 0.0 if len(tuned["tiles"]) > 2 else 9.0  # slow for the first layer
        *_, tile = tuned["tiles"].values()
        return 1 / (1 + tile[2])

    out = tmp_path / "new" / "tiles.json"
    tile_for.cache_clear()
    triton_tune.tune(torch.device(DEVICE), [torch.float16], out, layers=layers, milliseconds=clock)
    arch = str(triton_tiles.arch_of(torch.device(DEVICE)))
    assert json.loads(out.read_text()) == {arch: tuned}
    assert set(tuned["tiles"]) == {f"{role} float16 16x16" for role in ("product", "weight", "cells", "channelwise")}
    assert tuned["tiles"]["product float16 16x16"] == [16, 16, 32, 4, 1]
    assert tuned["gemm_from"] == {"float16": 16}
    tile_for.cache_clear()


def test_tuning_leaves_out_what_is_wrong():
    right, wrong = torch.ones(3), torch.ones(3) * 1.1
    assert triton_tune._time(lambda: [right], [right], lambda call: 1.0) == 1.0
    assert triton_tune._time(lambda: [wrong], [right], lambda call: 1.0) == float("inf")
    assert triton_tune._time(lambda: [right * torch.nan], [right], lambda call: 1.0) == float("inf")


def test_tuning_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        triton_tune.main([])
    assert "torch finds no GPU here" in capsys.readouterr().err
