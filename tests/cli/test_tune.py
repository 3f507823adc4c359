"""``lightning-acu tune``, with made-up GPUs."""

import pytest

from lightning_acu.cli import tune


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


def test_a_batch_without_images_is_refused(capsys):
    with pytest.raises(SystemExit):
        tune.run(["tune", "--batch", "0"])
    assert "--batch (=0) must be at least 1" in capsys.readouterr().err
