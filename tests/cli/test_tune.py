"""``lightning-acu tune``, with made-up GPUs."""

import pytest
import torch

from lightning_acu.cli import tune
from lightning_acu.tuning import tune_calls


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("estimated", "triton 0."), ("wrong", "wrong"), ("crash", "crashed"), ("memory", "by the rule")],
)
def test_a_dry_run_prints_the_choices_for_a_made_up_gpu(capsys, kind, expected):
    tune.run(["tune", "--model", "acu_plain", "--input_size", "3", "32", "32", "--dry_run", kind])
    out = capsys.readouterr().out
    assert "acu_plain" in out
    assert expected in out
    assert "backward of xwp" in out
    assert "nothing was run or kept" in out
    assert "tiles: would be measured for 3x3, 16->48, 32x32 pixels" in out


def test_a_batch_without_images_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.run(["tune", "--batch", "0"])
    assert "--batch (=0) must be at least 1" in capsys.readouterr().err


def test_tiles_need_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tune.run(["tune", "--device", "cpu", "--only", "tiles"])
    assert "--only tiles: Triton's kernels run on GPUs, and the device is cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "expected"), [(None, "tiles, backends"), ("tiles", "tiles"), ("backends", "backends")]
)
def test_tiles_are_tuned_before_backends_and_kept_beside_their_choices(capsys, monkeypatch, tmp_path, only, expected):
    monkeypatch.setenv("LIGHTNING_ACU_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    order = []
    selector = tune.dry_run_selector("estimated")

    def measured(calls, given, again):
        order.append("backends")
        return tune_calls(calls, given, again)

    def tiles(device, dtypes, path, seconds, layers):
        assert (device.type, dtypes, path, seconds) == ("cuda", [torch.bfloat16], tmp_path / "triton_tiles.json", 7)
        assert ((16, 48), 32, 1) in layers
        order.append("tiles")

    monkeypatch.setattr(tune, "selector_of", lambda device: selector)
    monkeypatch.setattr(tune, "tune_calls", measured)
    monkeypatch.setattr(tune, "tune_tiles", tiles)
    options = ["--dtype", "bfloat16", "--tile_seconds", "7", *(["--only", only] if only else [])]
    tune.run(["tune", "--device", "cuda", "--model", "acu_plain", "--input_size", "3", "32", "32", *options])
    assert ", ".join(order) == expected
    assert ("tiles kept in" in capsys.readouterr().out) == ("tiles" in expected)
