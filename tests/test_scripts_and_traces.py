"""torch.jit and torch.fx: what they make of active and of folded convolutions, for images of other sizes too."""

import io

import pytest
import torch
from helpers.oracle import assert_close
from timm.layers import Conv2dSame, StdConv2dSame
from torch import fx, nn

from lightning_acu import FoldedConv2d, acu_conv2d, acu_layers, convert_to_acu, fold_acu
from lightning_acu.folded import ReshapedConv2d

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning"  # torch's own advice
)  # fmt: skip


class Own(nn.Conv2d):
    """A subclass with attributes of its own, some of names that a fold has too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad, self.sides, self.convs, self.note = 3, "left", None, {"a": object()}


CONVS = {
    "near": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "far": lambda: nn.Conv2d(3, 6, 3, padding=9, dilation=(9, 8), groups=3),
    "same": lambda: nn.Conv2d(3, 4, (3, 5), padding="same"),
    "reflect": lambda: nn.Conv2d(3, 4, 3, 2, padding=(2, 1), padding_mode="reflect"),
    "Conv2dSame": lambda: Conv2dSame(3, 4, 3, (2, 3), bias=False),
    "far Conv2dSame": lambda: Conv2dSame(3, 4, 3, 2, dilation=9),
    "StdConv2dSame": lambda: StdConv2dSame(3, 4, 3, 2),
    "subclass": lambda: Own(3, 4, 3),
    "far subclass": lambda: Own(3, 4, 3, dilation=5, padding=5, padding_mode="circular"),
}
SIZES = [(24, 21), (8, 9), (31, 30)]


@pytest.fixture(params=CONVS)
def model(request):
    model = convert_to_acu(nn.Sequential(CONVS[request.param](), nn.ReLU()), kernel_sizes=[3, (3, 5)]).double()
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.7, 0.7)
    return model


@pytest.fixture
def images():
    return [torch.rand(2, 3, *size, dtype=torch.float64) for size in SIZES]


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")  # sizes of kernels, which are constant
@pytest.mark.parametrize("folded", [False, True], ids=["active", "folded"])
@pytest.mark.parametrize("made_with", range(3))
def test_a_trace_takes_images_of_other_sizes(model, images, folded, made_with):
    expected = [model(image) for image in images]
    if folded:
        fold_acu(model)
    traced = saved_and_loaded(torch.jit.trace(model, images[made_with]))
    for image, value in zip(images, expected, strict=True):
        assert_close(traced(image), value)


def test_a_script_of_a_fold_computes_the_same_and_learns(model, images):
    expected = [model(image) for image in images]
    fold_acu(model)
    assert type(model[0]) is not nn.Conv2d
    scripted = saved_and_loaded(torch.jit.script(model))
    for image, value in zip(images, expected, strict=True):
        assert_close(scripted(image), value)
    scripted(images[0]).square().sum().backward()
    assert all(parameter.grad.any() for parameter in scripted.parameters())
    assert isinstance(model[0], ReshapedConv2d | FoldedConv2d)  # the model itself stays as it is


def test_a_script_of_active_convolutions_is_an_error_that_says_what_to_do(model):
    with pytest.raises(RuntimeError, match=r"use torch\.jit\.trace, which can, or lightning_acu\.fold_acu\(model\)"):
        torch.jit.script(model)
    assert len([*acu_layers(model)]) == 1


@pytest.mark.parametrize("folded", [False, True], ids=["active", "folded"])
def test_fx_traces_both(model, images, folded):
    expected = [model(image) for image in images]
    if folded:
        fold_acu(model)
    traced = fx.symbolic_trace(model)
    for image, value in zip(images, expected, strict=True):
        assert_close(traced(image), value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_of_convolutions_is_added_in_float32_and_keeps_its_precision(dtype):
    model = convert_to_acu(CONVS["far"]())
    nn.init.uniform_(model.offsets, -0.7, 0.7)
    fold_acu(model).to(dtype)
    image = torch.rand(1, 3, 11, 12, dtype=dtype)
    assert len(model.convs) > 2
    scripted = torch.jit.script(model)
    assert model(image).dtype == scripted(image).dtype == dtype
    assert torch.equal(scripted(image), model(image))


def test_wrong_shapes_are_errors_while_a_trace_is_made():
    weight, offsets = torch.rand(4, 3, 3, 3), torch.zeros(9, 2)
    with pytest.raises(ValueError, match=r"do not fit each other: `input` \(1, 2, 8, 8\)"):
        torch.jit.trace(lambda x: acu_conv2d(x, weight, offsets), torch.rand(1, 2, 8, 8))
