"""Global contrast normalisation and ZCA whitening, the preprocessing of the paper's CIFAR experiments.

Both follow pylearn2, with which Goodfellow et al. prepared CIFAR-10 for Maxout Networks (ICML 2013, arXiv 1302.4389):
``pylearn2/expr/preprocessing.py``, ``pylearn2/datasets/preprocessing.py`` (ZCA) and
``pylearn2/scripts/datasets/make_cifar10_gcn_whitened.py``. Scale 55 and bias 0.1 are the values used there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["MAX_FEATURES", "ZCAWhitening", "global_contrast_normalize"]

#: Numbers in an image, above which whitening is refused: 3 x 64 x 64. The covariance of that many takes 1.2 GB in
#: float64 and minutes to decompose; both grow fast, with the second and the third power.
MAX_FEATURES = 3 * 64 * 64

#: Images that are in float64 at a time.
_CHUNK = 2048


def global_contrast_normalize(
    images: Tensor, scale: float = 55.0, *, sqrt_bias: float = 0.0, min_divisor: float = 1e-8
) -> Tensor:
    """Each image less its mean, over its contrast: over all pixels and channels of the image,

        x <- (x - mean(x)) / d,    d = sqrt(sqrt_bias + sum((x - mean(x))^2)) / scale, or 1 where d < min_divisor

    The contrast is the Euclidean norm, not the standard deviation, so that every image ends up with the norm ``scale``
    (where ``sqrt_bias`` is 0), whether pixels count to 1 or to 255. An image of one colour becomes zero.

    Args:
        images: (N, ...), of any floating point or integer type.
        scale: the norm of a normalised image; 55 is about sqrt(3 * 32 * 32), a standard deviation of 1 for CIFAR.
        sqrt_bias: added inside the square root; above 0 it keeps images of little contrast from being amplified.
        min_divisor: divisors below this are treated as rounding errors, and replaced by 1.

    Returns:
        (N, ...), float64 if ``images`` are, else float32.

    Raises:
        ValueError: ``scale`` is not positive, or ``sqrt_bias`` or ``min_divisor`` is negative.
    """
    if not scale > 0:
        raise ValueError(f"`scale` (={scale}) must be positive")
    for name, value in (("sqrt_bias", sqrt_bias), ("min_divisor", min_divisor)):
        if not value >= 0:
            raise ValueError(f"`{name}` (={value}) must not be negative")
    flat = images.to(torch.float64 if images.dtype == torch.float64 else torch.float32).flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    divisor = (sqrt_bias + flat.square().sum(1, keepdim=True)).sqrt() / scale
    return (flat / torch.where(divisor < min_divisor, 1.0, divisor)).reshape(images.shape)


class ZCAWhitening:
    """Whitening by the symmetric matrix, which changes images least: with mean m and covariance V diag(l) V' of the
    images it was fitted on,

        x <- V diag(1 / sqrt(l + bias)) V' (x - m)

    so that a direction of variance l has variance l / (l + bias) afterwards.

    Args:
        mean: (C, H, W), float32; of the images after contrast normalisation.
        matrix: (D, D) with D = C * H * W, float32; symmetric.
        bias: what was added to the eigenvalues.
        contrast_scale: the ``scale`` of :func:`global_contrast_normalize`, which comes first. None: left out.
    """

    def __init__(self, mean: Tensor, matrix: Tensor, bias: float, contrast_scale: float | None = None) -> None:
        self.mean = mean
        self.matrix = matrix
        self.bias = bias
        self.contrast_scale = contrast_scale

    @classmethod
    def fit(
        cls, images: Tensor, indices: Tensor | None = None, *, bias: float = 0.1, contrast_scale: float | None = None
    ) -> ZCAWhitening:
        """The whitening of ``images``, computed in float64. Besides these it needs memory for four D x D matrices.

        Args:
            images: (N, C, H, W), uint8 or floating point.
            indices: (M,), which of them to fit on: not those for validation. None: all.
            bias: added to the eigenvalues of the covariance (over M, as pylearn2 has it), a regulariser; above 0, as
                pixels of natural images are nearly dependent.
            contrast_scale: see the class.

        Raises:
            ValueError: there are fewer than two images, they are too large, or they or ``bias`` do not fit.
        """
        count = len(images) if indices is None else len(indices)
        features = images[0].numel() if len(images) else 0
        if images.ndim != 4 or count < 2:
            raise ValueError(
                f"`images` (shape {tuple(images.shape)}, {count} of them to fit on) must be (N, C, H, W) with at least "
                "2 to fit on: whitening needs their covariance"
            )
        _check_features(features, tuple(images.shape[1:]))
        if not 0 < bias < float("inf"):
            raise ValueError(f"`bias` (={bias}) must be positive and finite: some eigenvalues are zero, or nearly")

        # The mean first, and then the covariance: their sums in one go would lose digits.
        mean = torch.zeros(features, dtype=torch.float64, device="cpu")
        for chunk in _chunks(images, indices, torch.float64, contrast_scale):
            mean += chunk.sum(0) / count
        if not mean.isfinite().all():
            raise ValueError("`images` must be finite, but hold infinity or NaN")
        covariance = torch.zeros(features, features, dtype=torch.float64, device="cpu")
        for chunk in _chunks(images, indices, torch.float64, contrast_scale):
            centred = chunk - mean
            covariance.addmm_(centred.T, centred, alpha=1 / count)
        values, vectors = torch.linalg.eigh(covariance)
        # Rounding makes eigenvalues that are zero slightly negative.
        matrix = (vectors * (values.clamp(min=0) + bias).rsqrt()) @ vectors.T
        return cls(mean.reshape(images.shape[1:]).float(), matrix.float(), bias, contrast_scale)

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (N, C, H, W), uint8 or floating point, whitened: float32, on the CPU.

        Raises:
            ValueError: the images have another shape than those it was fitted on, or are not finite.
        """
        if images.shape[1:] != self.mean.shape:
            raise ValueError(
                f"`images` (shape {tuple(images.shape)}) must be (N, {', '.join(map(str, self.mean.shape))}), like "
                "those that the whitening was fitted on"
            )
        whitened = torch.empty(images.shape, dtype=torch.float32, device="cpu")
        for start, chunk in zip(
            range(0, len(images), _CHUNK), _chunks(images, None, torch.float32, self.contrast_scale), strict=True
        ):
            # The matrix is its own transpose.
            part = (chunk - self.mean.flatten()) @ self.matrix
            if not part.isfinite().all():
                raise ValueError("`images` must be finite, but hold infinity or NaN")
            whitened[start : start + _CHUNK] = part.reshape(-1, *self.mean.shape)
        return whitened


def _check_features(features: int, shape: tuple[int, ...]) -> None:
    if features > MAX_FEATURES:
        raise ValueError(
            f"images of shape {shape} are too large to whiten: their covariance would have {features} x {features} "
            f"entries, and the limit is {MAX_FEATURES} x {MAX_FEATURES} (3 x 64 x 64); make them smaller, or use "
            "preprocessing='normalize'"
        )


def _chunks(
    images: Tensor, indices: Tensor | None, dtype: torch.dtype, contrast_scale: float | None
) -> Iterator[Tensor]:
    """(n, D) in ``dtype``, contrast normalised, a few images at a time so that no second copy of all is made."""
    for part in (images if indices is None else indices).split(_CHUNK):
        chunk = (part if indices is None else images[part]).to(dtype)
        if contrast_scale is not None:
            chunk = global_contrast_normalize(chunk, contrast_scale)
        yield chunk.flatten(1)
