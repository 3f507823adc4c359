"""paper/authors.py, on a network of random numbers and as random images."""

import numpy as np
import pytest
from helpers.caffe_file import encoded, layers

pytest.importorskip("google.protobuf")


def test_it_prints_the_error_of_each_variant_and_draws_the_shapes(tmp_path, capsys, monkeypatch):
    from paper import authors

    def whitening(images, **settings):  # that of 3,072 pixels takes seconds
        assert settings == {"bias": 0.1, "contrast_scale": 55.0}
        return lambda others: others.float() / 64 - 2

    monkeypatch.setattr(authors.ZCAWhitening, "fit", whitening)
    (tmp_path / "plain.caffemodel").write_bytes(encoded(layers()))
    random = np.random.default_rng(0)
    x, y = random.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "exact.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    files = [str(tmp_path / name) for name in ("plain.caffemodel", "exact.npz", "shapes.png")]
    authors.main([files[0], "--data", files[1], "--shapes", files[2]])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "10 test images; whitening from 30"
    errors = {name: line.removeprefix(f"{name:21} error ") for name, line in zip(authors.VARIANTS, lines, strict=True)}
    assert errors["folded"] == errors["as released"]
    assert (tmp_path / "shapes.png").stat().st_size > 10_000
