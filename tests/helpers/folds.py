"""Random layers whose folds are compared with the formula, in every form."""

import torch

from helpers.oracle import assert_close
from lightning_acu import ACUConv2d
from lightning_acu.forms import FORMS


def random_layer(seed):
    """Any layer in float64, with taps on and between pixels, and an image; computed by the formula."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    stride = pick((1, 1), (2, 1), (1, 3), (2, 2))
    kernel_size = (pick(1, 2, 3, 4, 5), pick(1, 2, 3, 4, 5))
    dilation = (pick(1, 2, 3), pick(1, 2, 3))
    padding = pick((0, 0), (1, 1), (2, 1), (0, 3), "same" if stride == (1, 1) else "valid")
    layer = ACUConv2d(
        4,
        8,
        kernel_size,
        stride,
        padding,
        dilation,
        groups=pick(1, 2, 4),
        bias=pick(True, False),
        padding_mode=pick("zeros", "zeros", "zeros", "reflect", "replicate", "circular"),
        dtype=torch.float64,
        position_groups=pick(1, 2, 4, 8),
        fixed_centre=pick(True, False),
        backend="reference",
    )
    by, share = pick(0.0, 0.7, 2.0, 6.0), pick(0.0, 0.5, 1.0)
    with torch.no_grad():
        layer.offsets.copy_((torch.rand(layer.offsets.shape, generator=generator) * 2 - 1) * by)
        whole = torch.rand(layer.offsets.shape, generator=generator) < share
        layer.offsets[whole] = layer.offsets[whole].round()
    size = [pick(4, 5, 8, 11) + (k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
    return layer, torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)


def assert_forms_agree(seed):
    """That every fold of ``random_layer(seed)`` computes what the layer does, to 1e-10 of the largest value."""
    layer, image = random_layer(seed)
    expected = layer(image)
    for form in FORMS:
        folded = layer.fold(form)
        assert_close(folded(image), expected, 1e-10)
        assert folded(image[0]).shape == expected[0].shape
        without = layer.fold_without_numbers(form)
        assert [p.shape for p in without.parameters()] == [p.shape for p in folded.parameters()]
