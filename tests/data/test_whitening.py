import numpy as np
import pytest
import torch

from lightning_acu.data import ZCAWhitening, global_contrast_normalize, whitening

#: 3 channels of 5 x 7 pixels: swapped axes cannot hide.
SHAPE = (3, 5, 7)


def correlated(count, seed=0):
    """Images (count, 3, 5, 7), float64, whose pixels have unlike means and variances and depend on each other."""
    rng = np.random.default_rng(seed)
    features = int(np.prod(SHAPE))
    mixing = rng.normal(size=(features, features)) * np.geomspace(0.01, 2, features)
    return torch.from_numpy(
        (rng.normal(size=(count, features)) @ mixing + rng.normal(size=features)).reshape(-1, *SHAPE)
    )


def bytes_(count, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8))


def contrast_oracle(images, scale):
    """One image and one sum at a time, in float64."""
    results = []
    for image in np.asarray(images, dtype=np.float64):
        values = image.ravel().tolist()
        mean = sum(values) / len(values)
        norm = sum((value - mean) ** 2 for value in values) ** 0.5
        results.append((image - mean) * (scale / norm if norm > 1e-6 else 1))
    return np.stack(results)


def zca_oracle(fitted, bias):
    """(mean, matrix) by NumPy's own decomposition, in float64."""
    flat = np.asarray(fitted, dtype=np.float64).reshape(len(fitted), -1)
    values, vectors = np.linalg.eigh(np.cov(flat, rowvar=False, ddof=0))
    return flat.mean(0), vectors @ np.diag(1 / np.sqrt(values + bias)) @ vectors.T


@pytest.mark.parametrize("scale", [55.0, 1.0])
def test_contrast_against_loops(scale):
    images = bytes_(4)
    normalized = global_contrast_normalize(images, scale)
    assert normalized.dtype == torch.float32
    expected = torch.from_numpy(contrast_oracle(images, scale))
    torch.testing.assert_close(normalized.double(), expected, atol=1e-6 * scale, rtol=0)
    exact = global_contrast_normalize(images.double(), scale)
    torch.testing.assert_close(exact, expected, atol=1e-13 * scale, rtol=0)


def test_contrast_is_the_norm_and_not_the_standard_deviation():
    flat = global_contrast_normalize(bytes_(6).double()).flatten(1)
    torch.testing.assert_close(flat.norm(dim=1), torch.full((6,), 55.0, dtype=torch.float64))
    torch.testing.assert_close(flat.mean(1), torch.zeros(6, dtype=torch.float64), atol=1e-13, rtol=0)


def test_contrast_does_not_depend_on_the_range_of_pixels():
    images = bytes_(6).double()
    torch.testing.assert_close(global_contrast_normalize(images), global_contrast_normalize(images / 255 - 0.5))


def test_images_of_one_colour_become_zero_and_are_not_divided_by_rounding_errors():
    images = torch.full((2, *SHAPE), 0.1)
    images[1] = 200
    assert global_contrast_normalize(images).abs().max() < 1e-5
    assert global_contrast_normalize(images.to(torch.uint8)).abs().max() == 0
    # Contrast 3e-5 over scale 1: normalised unless divisors have to be larger than that.
    images[0, 0, 0, 0] += 3e-5
    assert global_contrast_normalize(images.double(), 1.0)[0].norm() == pytest.approx(1, rel=1e-6)
    assert global_contrast_normalize(images.double(), 1.0, min_divisor=1e-4)[0].norm() < 1e-4


def test_bias_below_the_root():
    images = bytes_(3).double()
    centred = images - images.mean((1, 2, 3), keepdim=True)
    expected = centred * 2 / (10 + centred.square().sum((1, 2, 3), keepdim=True)).sqrt()
    torch.testing.assert_close(global_contrast_normalize(images, 2.0, sqrt_bias=10), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, r"^`scale` \(=0\) must be positive$"),
        ({"scale": float("nan")}, r"^`scale` \(=nan\) must be positive$"),
        ({"sqrt_bias": -1}, r"^`sqrt_bias` \(=-1\) must not be negative$"),
        ({"min_divisor": -1e-8}, r"^`min_divisor` \(=-1e-08\) must not be negative$"),
    ],
)
def test_bad_contrast(arguments, message):
    with pytest.raises(ValueError, match=message):
        global_contrast_normalize(bytes_(2), **arguments)


@pytest.mark.parametrize(
    "count", [40, 400]
)  # fewer images than the 105 pixels leave eigenvalues of zero, and more none
@pytest.mark.parametrize("bias", [0.1, 2.0])
def test_against_a_decomposition_by_numpy(count, bias):
    images, others = correlated(count), correlated(5, seed=1)
    mean, matrix = zca_oracle(images, bias)
    fitted = ZCAWhitening.fit(images, bias=bias)
    assert (fitted.mean.shape, fitted.matrix.shape, fitted.matrix.dtype) == (SHAPE, (105, 105), torch.float32)
    torch.testing.assert_close(
        fitted.matrix.double(), torch.from_numpy(matrix), atol=1e-6 * np.abs(matrix).max(), rtol=0
    )
    expected = torch.from_numpy(((others.flatten(1).numpy() - mean) @ matrix).reshape(-1, *SHAPE))
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(fitted(others).double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_after_contrast_normalisation():
    images, others = bytes_(200), bytes_(5, seed=1)
    mean, matrix = zca_oracle(contrast_oracle(images, 55), 0.1)
    expected = (contrast_oracle(others, 55).reshape(5, -1) - mean) @ matrix
    whitened = ZCAWhitening.fit(images, contrast_scale=55.0)(others)
    torch.testing.assert_close(whitened.flatten(1).double(), torch.from_numpy(expected), atol=2e-5, rtol=0)


def test_a_direction_of_variance_l_has_l_over_l_plus_bias():
    images, bias = correlated(400), 0.1
    before = torch.cov(images.flatten(1).T, correction=0)
    whitened = ZCAWhitening.fit(images, bias=bias)(images).double().flatten(1)
    values, vectors = torch.linalg.eigh(before)
    assert values.min() < bias < 10 * bias < values.max()  # some much smaller than the bias, and some much larger
    # Not only as many eigenvalues as should be, but each for its own eigenvector: no direction is rotated.
    expected = vectors @ torch.diag(values / (values + bias)) @ vectors.T
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(105, dtype=torch.float64), atol=1e-5, rtol=0)


def test_fitted_on_the_images_named():
    images = bytes_(60)
    chosen = torch.randperm(60)[:45]
    some, others = ZCAWhitening.fit(images, chosen), ZCAWhitening.fit(images[chosen])
    torch.testing.assert_close(some.matrix, others.matrix)
    torch.testing.assert_close(some.mean, others.mean)
    assert not torch.allclose(some.mean, ZCAWhitening.fit(images).mean)


def test_a_few_images_at_a_time(monkeypatch):
    images = bytes_(50)
    whole = ZCAWhitening.fit(images, contrast_scale=55.0)
    expected = whole(images)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    parts = ZCAWhitening.fit(images, torch.arange(50), contrast_scale=55.0)
    torch.testing.assert_close(parts.matrix, whole.matrix, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(parts(images), expected, atol=1e-5, rtol=0)


def test_images_given_are_left_as_they_are():
    images = correlated(20).float()
    copy = images.clone()
    ZCAWhitening.fit(images, contrast_scale=1.0)(images)
    assert torch.equal(images, copy)


@pytest.mark.parametrize(
    ("images", "arguments", "message"),
    [
        (bytes_(1), {}, r"^`images` \(shape \(1, 3, 5, 7\), 1 of them to fit on\) must be .* at least 2 to fit on"),
        (bytes_(0), {}, r"^`images` \(shape \(0, 3, 5, 7\), 0 of them to fit on\)"),
        (bytes_(9), {"indices": torch.tensor([3])}, r"^`images` \(shape \(9, 3, 5, 7\), 1 of them to fit on\)"),
        (bytes_(9)[0], {}, r"^`images` \(shape \(3, 5, 7\), 3 of them to fit on\) must be \(N, C, H, W\)"),
        (bytes_(9), {"bias": 0}, r"^`bias` \(=0\) must be positive and finite: some eigenvalues are zero"),
        (bytes_(9), {"bias": float("inf")}, r"^`bias` \(=inf\) must be positive"),
        (torch.full((3, *SHAPE), torch.nan), {}, r"^`images` must be finite, but hold infinity or NaN$"),
        (
            torch.zeros(1).expand(9, 3, 65, 64),
            {},
            r"^images of shape \(3, 65, 64\) are too large to whiten: their covariance would have 12480 x 12480 "
            r"entries, and the limit is 12288 x 12288 \(3 x 64 x 64\); make them smaller, or use "
            r"preprocessing='normalize'$",
        ),
    ],
)
def test_bad_images(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        ZCAWhitening.fit(images, **arguments)


def test_whitening_other_images():
    fitted = ZCAWhitening.fit(bytes_(9))
    with pytest.raises(ValueError, match=r"^`images` \(shape \(9, 3, 7, 5\)\) must be \(N, 3, 5, 7\), like those that"):
        fitted(bytes_(9).transpose(2, 3))
    with pytest.raises(ValueError, match=r"^`images` must be finite"):
        fitted(torch.full((3, *SHAPE), torch.inf))
