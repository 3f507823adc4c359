"""Folds compared with the unfolded layers in every form: of random layers, and of whole models."""

import copy

import torch

from helpers.census_model import NOISE_FACTOR, TOLERANCE, Result, difference, prepare, run
from helpers.oracle import assert_close
from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu
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


def compare_forms(name):
    """A row of the table of scripts/check_folds.py: how far each form of the fold of a census model is from it."""
    result = Result(name)
    row = {"model": name, "status": "", "layers": 0, "sizes": "", **dict.fromkeys(FORMS, ""), "noise": ""}
    try:
        if (prepared := prepare(result, torch.float64, float("inf"))) is None:
            return row | {"status": result.status}
        model, sizes = prepared
        convert_to_acu(model)
        layers = [layer for _, layer in acu_layers(model)]
        move(layers)

        def outputs(network):
            with torch.no_grad():
                return [output for size in sizes for output in run(result, network, size)[0]]

        expected = outputs(model)
        found = {form: difference(outputs(fold_acu(copy.deepcopy(model), form=form)), expected) for form in FORMS}
        limit = TOLERANCE[torch.float64]
        if not max(found.values()) <= limit:
            for size, images in result.images.items():
                result.images[size] = images * (1 + torch.finfo(torch.float64).eps * torch.randn_like(images.double()))
            noise = difference(outputs(model), expected)
            row["noise"], limit = f"{noise:.1e}", max(limit, NOISE_FACTOR * noise)
    except Exception as error:  # a model that takes no float64, or a fold that is refused, is a row of the table too
        return row | {"status": f"{type(error).__name__}: {error}".replace("\n", " ")[:200]}
    row |= {form: f"{value:.1e}" for form, value in found.items()}
    row |= {"layers": len(layers), "sizes": " ".join(map(str, sizes))}
    return row | {"status": "equal" if max(found.values()) <= limit else "differs"}


@torch.no_grad()
def move(layers):
    """Move every tap by up to 0.7 pixels, and half of the coordinates to whole ones of up to 2."""
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        shape = layer.offsets.shape
        moved = torch.rand(shape, generator=generator) * 1.4 - 0.7
        whole = torch.randint(-2, 3, shape, generator=generator).to(moved)
        layer.offsets.copy_(torch.where(torch.rand(shape, generator=generator) < 0.5, moved, whole))
