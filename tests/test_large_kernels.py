"""Kernels of 7x7 and more: ConvNeXt converted, and values up to 31x31."""

import pytest
import timm
import torch
from helpers.fast_oracle import acu_conv2d_closed_form
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import acu_conv2d, acu_layers, convert_to_acu, fold_acu


@pytest.mark.slow
@pytest.mark.parametrize("position_groups", [1, "channels"])
def test_convnext_is_converted_learns_and_folds(position_groups):
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=5).double()
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # the blocks would count for a millionth of the output
            nn.init.ones_(parameter)
    image = torch.randn(1, 3, 128, 128, dtype=torch.float64)  # 4x4 at the end, where every tap reads pixels
    expected = model(image)
    convert_to_acu(model, kernel_sizes=(7,), position_groups=position_groups)
    layers = [layer for _, layer in acu_layers(model)]
    assert len(layers) == 12
    assert all(layer.kernel_size == (7, 7) and layer.groups == layer.in_channels for layer in layers)
    assert torch.equal(model(image), expected)
    model(image).square().sum().backward()
    for layer in layers:
        gradients = layer.offsets.grad.view(layer.position_groups, 49, 2)
        assert (gradients[:, layer.movable].norm(dim=-1) > 0).all()
        assert not gradients[:, layer.fixed_tap].any()
        nn.init.uniform_(layer.offsets, -2, 2)
    expected = model(image)
    assert_close(fold_acu(model, image)(image), expected, 1e-10)


@pytest.mark.parametrize("backend", ["cython", "dense"])
@pytest.mark.parametrize("side", [7, 9, 11, 31])
@pytest.mark.parametrize("position_groups", [1, 3])
def test_large_kernels_equal_the_closed_form(side, position_groups, backend):
    """Spread so far that the cells of 31x31 fit no table of the compiled kernels either."""
    generator = torch.Generator().manual_seed(side)
    kernel, channels = (side, side - 2), 3
    sizes = (1, channels, 9, 12), (channels, 1, *kernel), (position_groups, kernel[0] * kernel[1], 2), (channels,)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    with torch.no_grad():
        tensors[2].mul_(12 if side == 31 else 1.5)
    stride, padding = (2, 1), (side // 2, side // 2 - 1)
    output = acu_conv2d(*tensors, stride, padding, groups=channels, backend=backend)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    results = [output.detach(), *torch.autograd.grad(output, tensors, direction)]
    arrays = [tensor.detach().numpy() for tensor in (*tensors, direction)]
    oracle = acu_conv2d_closed_form(*arrays, stride=stride, corner=padding, dilation=(1, 1), groups=channels)
    for ours, expected in zip(results, oracle, strict=True):
        assert_close(ours, torch.from_numpy(expected), 1e-11)
