"""How much arithmetic the convolutions of a model do, in multiply-accumulates (MACs), now and folded.

A convolution costs the same at every output pixel, so its MACs are those of one pixel times the pixels of all its
calls. The former follow from its shape (:func:`macs_per_pixel` and the folds), the latter from a forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conv import ACUConv2d
from ..expansion import plan_windows
from ..folded import kernel_size_of
from ..geometry import ConvGeometry, integers
from .rules import named_conv2ds

__all__ = [
    "Call",
    "convolution_calls",
    "default_input_size",
    "folded_macs_per_pixel",
    "fractional_fold_macs_per_pixel",
    "macs_per_pixel",
    "output_sizes",
]


#: More channels are not those of an image: satellite images have 13 bands, TResNet's stem makes 48 channels of 3.
_MOST_IMAGE_CHANNELS = 16


@dataclass(frozen=True)
class Call:
    """One call of a convolution in a forward pass of one image.

    Attributes:
        size: (height, width) of the output.
        pixels: how often the kernel was applied: output pixels (input pixels of a transposed convolution), over the
            whole batch, which is larger than one image if the model cuts it into patches or regions.
        shape: that of the input, ((N,) C, H, W).
    """

    size: tuple[int, int]
    pixels: int
    shape: tuple[int, ...]


def output_sizes(model: nn.Module, input_size: tuple[int, int, int]) -> dict[nn.Module, list[tuple[int, int]]]:
    """(height, width) of the output of every 2-D convolution of ``model``, at each of its calls, in order.

    One forward pass of zeros in eval mode; training flags, statistics and hooks are restored afterwards.

    Args:
        model: takes a batch of images (or a list of images, as torchvision's detection models do).
        input_size: (channels, height, width) of the image, in pixels.

    Returns:
        A list for each convolution: empty if the forward pass does not call it, longer if it is shared.

    Raises:
        TypeError: ``input_size`` does not consist of ints.
        ValueError: it is not three numbers >= 1, or the forward pass fails.
    """
    calls = convolution_calls(model, input_size, named_conv2ds(model))
    return {module: [call.size for call in own] for module, own in calls.items()}


def convolution_calls(
    model: nn.Module, input_size: tuple[int, int, int], modules: Iterable[nn.Module]
) -> dict[nn.Module, list[Call]]:
    """All calls of each of ``modules``, convolutions in ``model``, for one image; see :func:`output_sizes`."""
    image = _zeros(model, input_size)
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        image = args[0] if args else kwargs["input"]
        # The kernel of a transposed convolution is spread around each pixel of the input.
        applied_at = image if isinstance(module, nn.ConvTranspose2d) else output
        pixels = applied_at.numel() // applied_at.shape[-3]
        calls[module].append(Call((output.shape[-2], output.shape[-1]), pixels, tuple(image.shape)))

    training = {module: module.training for module in model.modules()}
    public = [(name, value) for module in training for name, value in vars(module).items() if not name.startswith("_")]
    caches = [(value, dict(value)) for _, value in public if type(value) is dict]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in calls]
    try:
        for module in training:  # not model.eval(), which some models override to merge their weights
            module.training = False
        with torch.no_grad():
            try:
                model(image)
            except Exception as error:
                for own in calls.values():
                    own.clear()
                try:
                    model(list(image))
                except Exception:
                    raise ValueError(
                        f"`input_size` (={tuple(input_size)}): the forward pass failed: {type(error).__name__}: "
                        f"{error}; give the size the model expects"
                    ) from error
    finally:
        for handle in handles:
            handle.remove()
        for cache, before in caches:  # LeViT caches its biases in eval mode, and loading others would not update them
            cache.clear()
            cache.update(before)
        for module, flag in training.items():
            module.training = flag
    return calls


def _zeros(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """A black image (1, channels, height, width) on the model's device and in its precision."""
    size = integers("input_size", input_size)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"`input_size` (={input_size}) must be (channels, height, width), each >= 1")
    tensors = [*model.parameters(), *model.buffers()]
    if any(nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise ValueError(
            f"`model` (={type(model).__name__}) has lazy parameters that are not initialised yet; run one batch first"
        )
    like = next(
        (tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0, dtype=torch.float32, device="cpu")
    )
    return torch.zeros(1, *size, device=like.device, dtype=like.dtype)


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that ``model`` is made for: as timm states, else 224x224 pixels.

    The channels are those of the model's first ``nn.Conv2d``, since timm states 3 whatever ``in_chans`` is; but timm's
    number, or 3, if these are too many for an image, as in stems that turn pixels into channels.
    """
    size = next((found for module in model.modules() if (found := _timm_input_size(module))), (3, 224, 224))
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), size[0])
    return channels if channels <= _MOST_IMAGE_CHANNELS else size[0], size[1], size[2]


def _timm_input_size(module: nn.Module) -> tuple[int, int, int] | None:
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(module, name, None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if size is not None and len(size) == 3:
            channels, height, width = map(int, size)
            return channels, height, width
    return None


def macs_per_pixel(conv: nn.Module) -> int:
    """MACs of a plain 2-D convolution for one output pixel: C_out * C_in/groups * kh * kw.

    For one input pixel if it is a transposed one. 0 if it is lazy and its channels are not known yet.
    """
    height, width = kernel_size_of(conv)
    return _dense_macs(conv) * height * width


def folded_macs_per_pixel(layer: ACUConv2d) -> int | None:
    """MACs of ``layer.fold()`` for one output pixel, at the present positions.

    None if they are not finite or on the meta device, so that they cannot be folded.
    """
    offsets = layer.active_offsets().detach()
    if offsets.is_meta or not offsets.isfinite().all():
        return None
    if layer.grid_dilations is not None:
        return macs_per_pixel(layer)
    return _dense_macs(layer) * plan_windows(offsets, layer.geometry).cells


def fractional_fold_macs_per_pixel(layer: ACUConv2d) -> int:
    """MACs of ``layer.fold()`` for one output pixel with taps between pixels, within one of where they started.

    A 3x3 then becomes a 5x5 and a 5x5 a 7x7, with dilation 1. All position groups are assumed to be alike, which
    matters only at dilations where the fold is a sum of small convolutions.
    """
    return _dense_macs(layer) * _fractional_cells(layer.geometry, layer.start, layer.fixed_tap)


def _dense_macs(conv: nn.Module) -> int:
    """MACs of one tap: C_out * C_in/groups."""
    channels: Any = conv.out_channels, conv.in_channels
    return channels[0] * channels[1] // getattr(conv, "groups", 1)


@functools.lru_cache(maxsize=512)
def _fractional_cells(
    geometry: ConvGeometry, start: tuple[tuple[float, float], ...] | None, fixed_tap: int | None
) -> int:
    """Cells of the fold with every movable tap half a pixel outwards, on each axis."""
    grid = torch.tensor(geometry.grid(), dtype=torch.float64, device="cpu")
    offsets = torch.zeros_like(grid) if start is None else torch.tensor(start, dtype=torch.float64, device="cpu")
    # Away from the centre of the grid; for a free shape, whose grid is one point, away from the output pixel.
    outwards = torch.where(grid + offsets < (grid.amin(0) + grid.amax(0)) / 2, -0.5, 0.5)
    moved = offsets.trunc() + outwards  # (a start between pixels stays between those two)
    if fixed_tap is not None:
        moved[fixed_tap] = offsets[fixed_tap]
    return plan_windows(moved[None], geometry).cells
