"""What the Triton backend chooses: parts of sums, tables of tiles, and when "auto" takes it."""

import copy
import functools
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers.oracle import acu_conv2d_loops
from helpers.triton_cases import DEVICE, exact  # noqa: F401

from lightning_acu import ACUConv2d, acu_conv2d
from lightning_acu.geometry import ConvGeometry
from lightning_acu.ops import backends, dense
from lightning_acu.ops.autoselect import Call
from lightning_acu.ops.triton import backend as triton_backend
from lightning_acu.ops.triton import tiles as triton_tiles
from lightning_acu.ops.triton import tune as triton_tune
from lightning_acu.ops.triton.tiles import Tile, shape_class, tile_for

pytest.importorskip("triton")
split_pixels = pytest.importorskip("lightning_acu.ops.triton.blocks").split_pixels
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]


def test_positions_are_read_anew_at_every_call():
    """Also where they were written past torch's count of versions, as a CUDA graph's replays and some optimizers do."""
    layer = ACUConv2d(3, 4, 3, padding=1).to(DEVICE)
    layer.backend, image = "triton", torch.randn(2, 3, 5, 4, device=DEVICE)
    with torch.no_grad():
        for step in (0.0, 1.0, 0.4):
            layer.offsets.data.add_(step)
            tensors = (t.detach().double().cpu() for t in (image, layer.weight, layer.active_offsets(), layer.bias))
            expected = acu_conv2d_loops(*tensors, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=1)
            torch.testing.assert_close(layer(image).double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_views_of_one_tensor_are_different_positions():
    table = torch.zeros(2, 9, 2, device=DEVICE)
    table[1, :, 0] = 1.0
    image, weight = torch.randn(1, 3, 5, 4, device=DEVICE), torch.randn(2, 3, 3, 3, device=DEVICE)
    rounds = [[acu_conv2d(image, weight, row, padding=1, backend="triton") for row in table] for _ in range(2)]
    assert not torch.equal(*rounds[0])
    for first, again in zip(*rounds, strict=True):
        assert torch.equal(first, again)


def test_empty_images():
    weight, offsets = torch.randn(4, 3, 3, 3, device=DEVICE), torch.zeros(1, 9, 2, device=DEVICE)
    image = torch.randn(2, 3, 0, 4, device=DEVICE, requires_grad=True)
    output = acu_conv2d(image, weight, offsets, padding=2, backend="triton")
    assert output.shape == (2, 4, 2, 6)
    assert not output.any()
    output.sum().backward()


@pytest.mark.parametrize(("pixels", "programs"), [(1, 1), (257, 36), (12_800, 36), (12_801, 36), (10**6, 10**4)])
def test_parts_of_a_sum_cover_every_pixel_once(pixels, programs):
    size, parts = split_pixels(pixels, step=32, programs=programs, wanted=1024)
    assert size % 32 == 0
    assert (parts - 1) * size < pixels <= parts * size
    assert parts == 1 or (size > 4 * 32 and (parts - 1) * programs < 1024)


def forget():
    triton_tiles.table.cache_clear()
    tile_for.cache_clear()


def test_tiles_of_a_users_table_override_the_rule(monkeypatch, tmp_path):
    device = torch.device("cpu")
    forget()
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


DAMAGED = {
    "not JSON": "{",
    "too deep": 50_000 * "[",
    "too long": " " * 2**20 + "{}",
    "not text": b"\xff\xfe{}",
    "a list": "[]",
    "a table that is a list": '{"sm_90": [1]}',
    "tiles that are a list": '{"sm_90": {"tiles": [1]}}',
    "infinity": '{"sm_90": {"tiles": {"x": [Infinity, 64, 32, 4]}}}',
    "not whole": '{"sm_90": {"tiles": {"x": [64.0, 64, 32, 4]}}}',
    "true": '{"sm_90": {"tiles": {"x": [64, 64, 32, true]}}}',
    "too short": '{"sm_90": {"tiles": {"x": [64, 64, 32]}}}',
    "too many numbers": '{"sm_90": {"tiles": {"x": [64, 64, 32, 4, 1, 1]}}}',
    "a mapping": '{"sm_90": {"tiles": {"x": {"m": 64}}}}',
    "no power of 2": '{"sm_90": {"tiles": {"x": [48, 64, 32, 4]}}}',
    "huge": '{"sm_90": {"tiles": {"x": [64, 1048576, 32, 4]}}}',
    "negative": '{"sm_90": {"tiles": {"x": [64, 64, -32, 4]}}}',
    "too small for a product": '{"sm_90": {"tiles": {"x": [64, 64, 0, 4]}}}',
    "warps": '{"sm_90": {"tiles": {"x": [64, 64, 32, 64]}}}',
    "stages": '{"sm_90": {"tiles": {"x": [64, 64, 32, 4, 0]}}}',
    "channelwise with a sum": '{"sm_90": {"tiles": {"channelwise float16 16x16": [8, 16, 16, 4]}}}',
    "text for a number of channels": '{"sm_90": {"gemm_from": {"bfloat16": "x"}}}',
    "channels that are a list": '{"sm_90": {"gemm_from": [256]}}',
    "a number of many digits": '{"sm_90": {"gemm_from": {"bfloat16": ' + 5000 * "1" + "}}}",
    "another kind of GPU": '{"sm_80": {"tiles": {"x": [1]}}}',
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_named(monkeypatch, tmp_path, content):
    monkeypatch.setenv("LIGHTNING_ACU_CACHE", str(tmp_path))
    monkeypatch.setattr(triton_tiles, "arch_of", lambda device: "sm_90")
    path = triton_tiles.tuned_tiles()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    forget()
    message = rf"(?s)^{path} is damaged \(.*\); delete it, or tune again$"
    try:
        with pytest.raises(RuntimeError, match=message):
            tile_for("product", torch.bfloat16, 64, 64, torch.device("cpu"))
        with pytest.raises(RuntimeError, match=message):
            triton_tiles.gemm_from(torch.bfloat16, torch.device("cpu"))
    finally:
        forget()
    with pytest.raises(RuntimeError, match=message):  # before anything is measured
        triton_tune.tune(torch.device("cpu"), [], path)


def test_a_table_is_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / "tiles.json"
    triton_tune._write(path, "sm_80", {"tiles": {}})
    before = path.read_text()

    def fail(self, *_, **__):
        with self.open("w") as file:
            file.write("{")
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", fail)
        with pytest.raises(OSError, match="No space left"):
            triton_tune._write(path, "sm_90", {"tiles": {}})
    assert (path.read_text(), [*tmp_path.iterdir()]) == (before, [path])
    triton_tune._write(path, "sm_90", {"tiles": {}})
    assert set(json.loads(path.read_text())) == {"sm_80", "sm_90"}


def test_a_cache_that_cannot_be_read_has_no_table(monkeypatch, tmp_path):
    monkeypatch.setenv("LIGHTNING_ACU_CACHE", str(tmp_path))
    path = triton_tiles.tuned_tiles()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    os.mkfifo(path)  # opening it would wait
    forget()
    assert triton_tiles.table("sm_100") == {}
    with monkeypatch.context() as patch:
        patch.setattr(triton_tiles, "read_tables", refuse)
        forget()
        assert triton_tiles.table("sm_100") == {}
    monkeypatch.setattr(triton_tiles, "tuned_tiles", lambda: Path("~nobody-has-this-name").expanduser())
    forget()
    assert triton_tiles.table("sm_100") == {}
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
    in_use = {"tiles": {"cells float32 64x64": [64, 64, 32, 4, 1]}, "gemm_from": {"bfloat16": 256}}
    before = copy.deepcopy(in_use)
    monkeypatch.setattr(triton_tiles, "table", lambda arch: in_use)
    monkeypatch.setattr(triton_tune, "_BATCH", 1)
    monkeypatch.setattr(triton_tune, "_SETTLED_AT", 16)
    monkeypatch.setattr(triton_tune, "candidates", lambda *layer: few[layer[0]])
    few = {role: [Tile(16, 16, 16, 4), Tile(16, 16, 32, 4)] for role in ("product", "weight", "cells")}
    few["channelwise"] = [Tile(8, 16, 0, 4)]
    layers = (triton_tune.Layer((8, 8), 3), triton_tune.Layer((16, 16), 3), triton_tune.Layer((4, 4), 3, 4))

    def clock(call):
        if isinstance(call, functools.partial):
            (tile,) = call.args
            return 1 / (1 + tile.k)
        (output,) = call()  # by GEMM
        return 9.0 if output.shape[1] == 8 else 0.0

    out = tmp_path / "new" / "tiles.json"
    tile_for.cache_clear()
    table = triton_tune.tune(torch.device(DEVICE), [torch.float16], out, layers=layers, milliseconds=clock)
    arch = str(triton_tiles.arch_of(torch.device(DEVICE)))
    assert json.loads(out.read_text()) == {arch: table}
    new = {f"{role} float16 16x16" for role in ("product", "weight", "cells", "channelwise")}
    assert set(table["tiles"]) == new | {"cells float32 64x64"}
    assert table["tiles"]["product float16 16x16"] == [16, 16, 32, 4, 1]
    assert table["gemm_from"] == {"float16": 16, "bfloat16": 256}
    assert in_use == before  # what the process launches with stays
    tile_for.cache_clear()


def test_tuning_leaves_out_what_is_wrong():
    right, wrong = torch.ones(3), torch.ones(3) * 1.1
    assert triton_tune._time(lambda: [right], [right], lambda call: 1.0) == 1.0
    assert triton_tune._time(lambda: [wrong], [right], lambda call: 1.0) == float("inf")
    assert triton_tune._time(lambda: [right * torch.nan], [right], lambda call: 1.0) == float("inf")


def test_the_layers_to_tune_are_one_for_each_class():
    def call(c_in, c_out, size, groups=1, needs=None):
        geometry = ConvGeometry((3, 3), padding=(1,) * 4, groups=groups)
        return Call("cuda", needs, "bfloat16", (32, c_in, size, size), (c_out, c_in // groups, 3, 3), 1, geometry, True)

    calls = [
        call(64, 64, 56), call(60, 64, 28), call(64, 64, 56, needs=(True,) * 3), call(64, 128, 28),
        call(144, 144, 28, groups=144), call(128, 128, 28, groups=32),
    ]  # fmt: skip
    expected = (((64, 64), 56, 1), ((64, 128), 28, 1), ((144, 144), 28, 144))
    assert tuple(triton_tune.layers_of(calls)) == expected


def test_stages_are_among_the_candidates():
    found = {tile.stages for tile in triton_tune.candidates("weight", torch.bfloat16, 128, 128)}
    assert found == {1, 3}
