"""The effective receptive field: which pixels of an image the middle of a feature map depends on, and how much."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .checks import few

__all__ = ["receptive_energy", "spread"]


def receptive_energy(
    model: nn.Module, images: Tensor, *, layer: str | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """How strongly the middle of a feature map depends on each pixel: the energy of its gradient.

    For each image the derivative of ``sum_c v_c F[c, h//2, w//2]`` by the image, with v_c = +1 or -1 at random, squared
    and summed over the image's channels. Over random signs its mean is the sum over channels c of the squared
    derivatives of ``F[c, h//2, w//2]``. (After Luo et al., "Understanding the Effective Receptive Field in Deep
    Convolutional Neural Networks", NIPS 2016, who take the derivative of one channel.)

    The model runs in eval mode and is not changed; its parameters get no gradients.

    Args:
        model: any module that takes a batch of images.
        images: (N, C, H, W), float.
        layer: name of the module whose output F is; its output is (N, channels, h, w). None: the last module that has
            such an output of more than one pixel.
        generator: of the signs; None: torch's.

    Returns:
        (H, W), the mean over the images. Float64, on the CPU.

    Raises:
        TypeError: ``images`` is not a float tensor (N, C, H, W).
        ValueError: ``model`` has no module ``layer``, or none has an output (N, channels, h, w).
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a float tensor (N, C, H, W), got {found}")
    images = images.detach().clone().requires_grad_(True)
    with _in_eval_mode(model), torch.enable_grad():
        features = _features(model, images, layer)
        coins = torch.randint(0, 2, features.shape[:2], generator=generator, dtype=torch.int64, device="cpu")
        signs = coins.to(features) * 2 - 1
        middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad((signs * middle).sum(), images)
    return gradient.double().square().sum(1).mean(0).cpu()


def spread(energy: Tensor) -> tuple[Tensor, Tensor]:
    """The centre (y, x) of ``energy`` (H, W) and its standard deviation along y and x, in pixels, each (2,).

    For a chain of linear convolutions with random weights of mean zero, the variances of its layers add: a layer with
    taps at positions p (in pixels of its input) adds var(p) times the square of the product of the strides before it.
    """
    energy = energy.double() / energy.double().sum()
    places = [torch.arange(size, dtype=torch.float64, device="cpu") for size in energy.shape]
    sums = [energy.sum(1), energy.sum(0)]
    centre = torch.stack([(each * place).sum() for each, place in zip(sums, places, strict=True)])
    variance = [(each * (place - mean) ** 2).sum() for each, place, mean in zip(sums, places, centre, strict=True)]
    return centre, torch.stack(variance).sqrt()


def _features(model: nn.Module, images: Tensor, layer: str | None) -> Tensor:
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: object) -> None:
        if not (isinstance(output, Tensor) and output.ndim == 4 and output.requires_grad):
            return
        if layer is not None or output.shape[2] * output.shape[3] > 1:
            found[:] = [output]

    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise ValueError(f"`layer` (={layer!r}): the model has no such module; there are {few(list(modules)[1:])}")
    chosen = list(modules.values()) if layer is None else [modules[layer]]
    handles = [module.register_forward_hook(keep) for module in chosen]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        which = "no module" if layer is None else f"`layer` (={layer!r})"
        raise ValueError(f"{which} has an output (N, channels, h, w) that depends on the images")
    return found[0]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
