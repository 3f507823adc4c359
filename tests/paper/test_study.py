"""paper/study: rows, batches, runs that are stopped and go on, rows that branch off, and the interval of a gain."""

import json

import numpy as np
import pytest
import torch

from lightning_acu import acu_layers


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from paper.study.batches import Images

    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    x = random.integers(0, 255, (40, 12, 12, 3), dtype=np.uint8)
    y = np.arange(40) % 10
    np.savez(path, x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    return Images(path)


def settings(**given):
    from paper.study.training import Settings

    return Settings(**{"width": 1 / 12, "steps": 10, "batch_size": 7, "lr": 0.1, "pixels": 0.1} | given)


def train(folder, images, names, **given):
    from paper.study.rows import ROWS
    from paper.study.training import run

    for name in names:
        assert run(ROWS[name], 1, folder, settings(**given), images, lambda text: None)
    return [json.loads((folder / name / "seed1" / "result.json").read_text()) for name in names]


def test_a_row_comes_after_those_that_it_needs_and_branches_within_their_steps():
    from paper.study.rows import ROWS, find_rows

    names = list(ROWS)
    for row in ROWS.values():
        assert all(names.index(need) < names.index(row.name) for need in row.needs)
        assert (row.source is None) == (row.at == 0)
        assert row.source is None or (row.longer, row.wider) == (ROWS[row.source].longer, ROWS[row.source].wider)
    assert [row.name for row in find_rows(["late"])] == ["plain", "active", "dilations-40", "late"]
    with pytest.raises(ValueError, match="--rows plane: unknown row; there are plain, active"):
        find_rows(["plane"])


def test_a_batch_depends_on_seed_and_step_alone_and_a_pass_shows_every_image(images):
    one, labels = images.batch(3, 5, 7)
    again, same = images.batch(3, 5, 7)
    assert one.shape == (7, 3, 12, 12)
    assert one.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(one, again)
    assert torch.equal(labels, same)
    assert not torch.equal(one, images.batch(3, 6, 7)[0])
    assert not torch.equal(one, images.batch(4, 5, 7)[0])
    seen = torch.cat([images.batch(3, step, 10)[1] for step in range(3)])
    assert sorted(seen.tolist()) == sorted(images.train_labels.tolist())


def test_a_crop_is_a_piece_of_the_bordered_image_or_of_its_mirror_image(images):
    made, labels = images.batch(0, 0, 30)
    pieces = images.train.unfold(2, 12, 1).unfold(3, 12, 1).permute(0, 2, 3, 1, 4, 5)  # (30, 9, 9, 3, 12, 12)
    for image, label in zip(made, labels, strict=True):
        of_class = pieces[images.train_labels == label].reshape(-1, 3, 12, 12)
        equal = [(of_class == turned).flatten(1).all(1).any() for turned in (image, image.flip(2))]
        assert any(equal)


def test_a_run_that_was_stopped_goes_on_exactly(images, tmp_path, monkeypatch):
    from paper.study import training

    train(tmp_path / "whole", images, ["active"])
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)

    def kill_at_step_6(text):
        if text.startswith("step 6"):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        training.run(training.ROWS["active"], 1, tmp_path / "parts", settings(), images, kill_at_step_6)
    assert not training.finished(tmp_path / "parts", "active", 1)
    train(tmp_path / "parts", images, ["active"])
    ours, theirs = (torch.load(tmp_path / kind / "active/seed1/positions.pt") for kind in ("parts", "whole"))
    for name, positions in theirs.items():
        assert torch.equal(ours[name], positions)
        assert positions.abs().max() > 1.0  # they moved


def test_other_settings_are_refused(images, tmp_path, monkeypatch):
    from paper.study import training

    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)

    def stop(text):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        training.run(training.ROWS["plain"], 1, tmp_path, settings(), images, stop)
    with pytest.raises(ValueError, match=r"holds a run with other settings .*0\.1.*0\.2"):
        train(tmp_path, images, ["plain"], lr=0.2)


def test_branches_start_where_their_row_was(images, tmp_path):
    """Before anything is trained: "frozen" is the active network then, "back" the regular grid."""
    from paper.study.rows import ROWS
    from paper.study.training import _Run

    train(tmp_path, images, ["plain", "active"])
    state = torch.load(tmp_path / "active/seed1/branch_4.pt", weights_only=True)
    for name in ("frozen-40", "pixels-40", "dilations-40", "back-40"):
        made = _Run(ROWS[name], 1, tmp_path, settings(), images)
        assert made.step == 4
        for path, layer in acu_layers(made.model):
            assert torch.equal(layer.weight, state["model"][f"{path}.weight"])
            then = state["model"][f"{path}.offsets"]
            expected = {"frozen-40": then, "pixels-40": then.round(), "back-40": torch.zeros_like(then)}
            if name in expected:
                assert torch.equal(layer.offsets, expected[name])
            else:
                assert layer.grid_dilations is not None
    results = train(tmp_path, images, ["dilations-40", "found", "late"])
    assert [result["own_steps"] for result in results] == [6, 10, 6]
    late = _Run(ROWS["late"], 1, tmp_path, settings(), images)
    for name, dilation in results[0]["dilations"].items():
        assert list(late.model.get_submodule(name).dilation) == dilation


def test_frozen_positions_stay_and_those_of_a_walk_move(images, tmp_path):
    train(tmp_path, images, ["active", "frozen-40", "walk"])
    state = torch.load(tmp_path / "active/seed1/branch_4.pt", weights_only=True)
    frozen, walked, learned = (
        torch.load(tmp_path / name / "seed1/positions.pt") for name in ("frozen-40", "walk", "active")
    )
    grid = torch.tensor([(y, x) for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)])
    for name in learned:
        then = grid + state["model"][f"{name}.offsets"].view(1, 9, 2)
        assert torch.allclose(frozen[name], then, rtol=0, atol=1e-6)
        assert (learned[name] - frozen[name]).abs().max() > 0.05
        assert (walked[name] - grid).abs().max() > 0.05
        assert not torch.equal(walked[name], learned[name])


def test_gain_is_the_paired_difference_and_its_interval_covers_it():
    from paper.study.report import gain

    random = np.random.default_rng(1)
    plain = [random.random(2000) < 0.7 for _ in range(3)]
    ours = [right | (random.random(2000) < 0.1) for right in plain]
    middle, low, high = gain(ours, plain)
    assert middle == pytest.approx(100 * np.mean([o.mean() - p.mean() for o, p in zip(ours, plain, strict=True)]))
    # 30 % of images are wrong, a tenth of which become right: 3 points, in each of 6,000 answers with variance 0.03.
    error = 100 * np.sqrt(0.03 / 6000)
    assert 0.5 * 3.92 * error < high - low < 2 * 3.92 * error
    assert low < middle < high
    assert gain(plain, plain) == (0.0, 0.0, 0.0)


@pytest.mark.slow
def test_the_command_trains_and_reports(tmp_path, capsys):
    from paper.study.__main__ import main

    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "images.npz",
        x_train=random.integers(0, 255, (30, 12, 12, 3), dtype=np.uint8),
        y_train=np.arange(30) % 10,
        x_test=random.integers(0, 255, (10, 12, 12, 3), dtype=np.uint8),
        y_test=np.arange(10),
    )
    command = ["--rows", "plain", "active", "--seeds", "2", "--width", "0.0833", "--steps", "4", "--batch-size", "5"]
    main([*command, "--data", str(tmp_path / "images.npz"), "--out", str(tmp_path)])
    assert "| active |" in capsys.readouterr().out
    (folder,) = tmp_path.glob("width*")
    assert {path.name for path in folder.glob("*.*")} >= {"runs.csv", "table.csv", "table.md", "gain.png"}
    with pytest.raises(SystemExit):
        main(["--rows", "active"])
    assert "--data None: not a file" in capsys.readouterr().err
