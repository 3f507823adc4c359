import pickle
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_acu.data import ZCAWhitening
from lightning_acu.data.whitening_cache import _checksum, cached_whitening

IMAGES = torch.randint(0, 256, (30, 3, 4, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
TRAIN = torch.arange(20)


@pytest.fixture
def no_fit(monkeypatch):
    """Call it when everything has to come from files."""
    return lambda: monkeypatch.setattr(ZCAWhitening, "fit", lambda *_, **__: pytest.fail("fitted again"))


def same(one, other):
    tensors = torch.equal(one.mean, other.mean) and torch.equal(one.matrix, other.matrix)
    return tensors and (one.bias, one.contrast_scale) == (other.bias, other.contrast_scale)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fitted_once(tmp_path, no_fit):
    folder = tmp_path / "new" / "folder"
    fitted = cached_whitening(IMAGES, TRAIN, folder)
    assert same(fitted, ZCAWhitening.fit(IMAGES, TRAIN, bias=0.1, contrast_scale=55.0))
    (name,) = files(folder)
    assert name.startswith("whitening-")
    assert name.endswith(".safetensors")
    no_fit()
    assert same(cached_whitening(IMAGES.clone(), TRAIN, folder), fitted)
    # Neither the order of the images nor those that it was not fitted on matter.
    others = IMAGES.clone()
    others[20:] = 7
    assert same(cached_whitening(others, TRAIN.flip(0), folder), fitted)


def test_everything_that_matters_is_in_the_name(tmp_path):
    touched = IMAGES.clone()
    touched[19, 2, 3, 1] += 1
    cached_whitening(IMAGES, TRAIN, tmp_path)
    cached_whitening(touched, TRAIN, tmp_path)
    cached_whitening(IMAGES, TRAIN[:-1], tmp_path)
    cached_whitening(IMAGES, TRAIN + 1, tmp_path)
    cached_whitening(IMAGES, TRAIN, tmp_path, bias=0.2)
    cached_whitening(IMAGES, TRAIN, tmp_path, contrast_scale=54.0)
    cached_whitening(IMAGES, TRAIN, tmp_path, contrast_scale=None)
    cached_whitening(IMAGES.float(), TRAIN, tmp_path)
    cached_whitening(IMAGES.reshape(30, 3, 2, 4), TRAIN, tmp_path)
    assert len(files(tmp_path)) == 9


def flip_a_bit(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        flip_a_bit,
        lambda content: pickle.dumps({"mean": 0, "matrix": 0}),
        lambda content: content.replace(b'"key":"', b'"key":"0', 1),
        lambda content: content.replace(b'"mean"', b'"meen"', 1),
    ],
    ids=["half", "empty", "one bit", "a pickle", "another header", "another name"],
)
def test_damaged_file(tmp_path, no_fit, damage):
    fitted = cached_whitening(IMAGES, TRAIN, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=rf"^{path} is damaged \(.*\); the whitening is fitted again$"):
        again = cached_whitening(IMAGES, TRAIN, tmp_path)
    assert same(again, fitted)
    no_fit()
    assert same(cached_whitening(IMAGES, TRAIN, tmp_path), fitted)


def symmetric(change):
    def changed(mean, matrix):
        matrix = change(matrix)
        return mean, (matrix + matrix.T) / 2

    return changed


def set_to(value, *index):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda mean, matrix: (mean, matrix[:-1]), r"`matrix` is F32 \(23, 24\), not F32 \(24, 24\)"),
        (lambda mean, matrix: (mean, matrix.reshape(12, 48)), r"`matrix` is F32 \(12, 48\), not"),
        (lambda mean, matrix: (mean, matrix.flatten()), r"`matrix` is F32 \(576,\), not"),
        (lambda mean, matrix: (mean, matrix.double()), r"`matrix` is F64 \(24, 24\), not F32"),
        (lambda mean, matrix: (mean, matrix.half()), r"`matrix` is F16"),
        (lambda mean, matrix: (mean, matrix > 0), r"`matrix` is BOOL"),
        (lambda mean, matrix: (mean.flatten(), matrix), r"`mean` is F32 \(24,\), not F32 \(3, 4, 2\)"),
        (lambda mean, matrix: (mean.reshape(3, 2, 4), matrix), r"`mean` is F32 \(3, 2, 4\), not"),
        (lambda mean, matrix: (mean.long(), matrix), r"`mean` is I64"),
        (lambda mean, matrix: (set_to(float("nan"), 0, 1, 1)(mean), matrix), r"`mean` is not finite"),
        (lambda mean, matrix: (set_to(float("inf"), 0, 1, 1)(mean), matrix), r"`mean` is not finite"),
        (symmetric(set_to(float("nan"), 3, 5)), r"`matrix` has numbers above .*, or NaN"),
        (symmetric(set_to(float("-inf"), 3, 5)), r"`matrix` has numbers above"),
        (symmetric(lambda matrix: 1e4 * matrix), r"`matrix` has numbers above"),
        (symmetric(lambda matrix: -matrix), r"`matrix` is not positive definite"),
        (symmetric(torch.zeros_like), r"`matrix` is not positive definite"),
        (symmetric(set_to(float("nan"), 5, 5)), r"`matrix` is not positive definite"),
        (lambda mean, matrix: (mean, matrix.roll(1, 0).abs()), r"`matrix` is not symmetric"),
        (lambda mean, matrix: (mean, set_to(0.1, 3, 5)(matrix)), r"`matrix` is not symmetric"),
    ],
)
def test_another_matrix_with_the_right_checksum(tmp_path, change, complaint):
    fitted = cached_whitening(IMAGES, TRAIN, tmp_path)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    mean, matrix = (tensor.contiguous() for tensor in change(fitted.mean, fitted.matrix))
    tensors = {"mean": mean, "matrix": matrix}
    save_file(tensors, path, metadata | {"checksum": _checksum(tensors)})
    with pytest.warns(UserWarning, match=rf"^{path} is damaged \({complaint}.*\); the whitening is fitted again$"):
        again = cached_whitening(IMAGES, TRAIN, tmp_path)
    assert same(again, fitted)


@pytest.mark.parametrize("bias", [1e-6, 0.1, 1e4])
@pytest.mark.parametrize("contrast_scale", [None, 55.0])
def test_every_whitening_that_is_fitted_is_read_again(tmp_path, no_fit, bias, contrast_scale):
    """More images than numbers in one, fewer, and some that are all the same."""
    arguments = {"bias": bias, "contrast_scale": contrast_scale}
    cases = [(IMAGES, TRAIN), (IMAGES, TRAIN[:2]), (torch.zeros_like(IMAGES), TRAIN)]
    cases += [(torch.rand(100, 1, 3, 3, generator=torch.Generator().manual_seed(1)) * 1e3, torch.arange(100))]
    fitted = [cached_whitening(*case, tmp_path, **arguments) for case in cases]
    no_fit()
    for case, whitening in zip(cases, fitted, strict=True):
        assert same(cached_whitening(*case, tmp_path, **arguments), whitening)


def test_file_of_other_images(tmp_path):
    cached_whitening(IMAGES, TRAIN + 1, tmp_path)
    (other,) = tmp_path.iterdir()
    fitted = cached_whitening(IMAGES, TRAIN, tmp_path / "b")
    (path,) = (tmp_path / "b").iterdir()
    other.replace(path)
    with pytest.warns(UserWarning, match="it belongs to other images or parameters"):
        assert same(cached_whitening(IMAGES, TRAIN, path.parent), fitted)


def test_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=rf"^the whitening could not be saved in {tmp_path}/file .*`whitening_cache`"):
        fitted = cached_whitening(IMAGES, TRAIN, tmp_path / "file")
    assert same(fitted, ZCAWhitening.fit(IMAGES, TRAIN, contrast_scale=55.0))


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path):
    images = torch.rand(40, 3, 9, 9)  # the matrix has 236 kB
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))  # as a full disk, to whoever writes
    try:
        with pytest.warns(UserWarning, match=r"could not be saved in .* \(.*File too large.*\)"):
            fitted = cached_whitening(images, torch.arange(40), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == []
    assert same(fitted, cached_whitening(images, torch.arange(40), tmp_path))
