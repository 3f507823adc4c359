"""A folded layer keeps showing the geometry it had, for the code around it; an example shows what that code does."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.oracle import assert_close
from timm.layers import Conv2dSame
from torch import nn

from lightning_acu import ACUConv2d, FoldedConv2d, acu_layers, convert_to_acu, fold_acu, report_acu, round_acu
from lightning_acu.export import export_model
from lightning_acu.folded import ReshapedConv2d

SHOWN = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class Same(nn.Module):
    """Pads by what its convolution says, as TensorFlow does: several ports of models do."""

    def __init__(self, dilation=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, dilation=dilation)

    def forward(self, x):
        pad = max((self.conv.kernel_size[0] - 1) * self.conv.dilation[0] + 1 - self.conv.stride[0], 0)
        return self.conv(F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2)))


def moved(model, by=0.4):
    convert_to_acu(model)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -by, by)
    return model


@pytest.fixture
def image():
    return torch.randn(2, 3, 32, 31)


@pytest.mark.parametrize(
    ("dilation", "form", "kind"), [(1, "auto", ReshapedConv2d), (2, "auto", ReshapedConv2d), (9, "sum", FoldedConv2d)]
)
def test_a_model_that_pads_by_the_kernel_size_computes_the_same_after_the_fold(image, dilation, form, kind):
    model = moved(Same(dilation))
    expected = model(image)
    fold_acu(model, image, form=form)
    assert isinstance(model.conv, kind)
    assert_close(model(image), expected, 1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, (2, 1), (1, 0), (2, 1), groups=2),
        nn.Conv2d(4, 6, 3, padding="same", groups=2),
        nn.Conv2d(4, 6, 5, padding=2, padding_mode="circular"),
        nn.Conv2d(4, 6, 3, dilation=11, bias=False),
        Conv2dSame(4, 6, 3, 2),
        Conv2dSame(4, 6, 3, 2, dilation=2),
    ],
    ids=["strided", "same", "circular", "sum", "Conv2dSame", "dilated Conv2dSame"],
)
@pytest.mark.parametrize("by", [0.0, 0.45])
def test_the_layer_shows_what_it_showed_before(conv, by):
    layer = moved(copy.deepcopy(conv), by)
    x = torch.randn(2, 4, 33, 30)
    shown, expected = {name: getattr(layer, name) for name in SHOWN}, layer(x)
    for fold in (lambda layer: fold_acu(layer), lambda layer: fold_acu(layer, x)):
        folded = fold(copy.deepcopy(layer))
        for twin in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            assert {name: getattr(twin, name) for name in SHOWN} == shown
            assert_close(twin(x), expected, 1e-5)
            assert_close(twin(x[0]), expected[0], 1e-5)
    if not by and conv.padding_mode == "zeros":
        assert type(folded) in (nn.Conv2d, Conv2dSame)  # nothing to hide


def test_rounded_back_to_the_grid_it_is_an_ordinary_convolution(image):
    model, plain = moved(Same()), Same()
    fold_acu(round_acu(model))
    assert repr(model) == repr(plain)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(image), model(image))


def test_the_state_of_a_fold_has_the_names_of_the_plain_model_and_loads_into_another(image):
    model = moved(Same())
    other = copy.deepcopy(model)
    expected = fold_acu(model)(image)
    assert set(model.state_dict()) == {"conv.weight", "conv.bias"}
    for parameter in fold_acu(other).parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(image), expected)


def test_the_plain_convolution_of_a_fold_has_its_own_geometry_and_the_same_parameters():
    layer = moved(nn.Conv2d(3, 8, 3, 2, 1))
    fold_acu(layer)
    plain, x = layer.plain(), torch.randn(2, 3, 9, 11)
    assert type(plain) is nn.Conv2d
    assert (plain.kernel_size, plain.padding, layer.kernel_size, layer.padding) == ((5, 5), (2, 2), (3, 3), (1, 1))
    assert plain.weight is layer.weight
    assert torch.equal(plain(x), layer(x))
    assert "kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), folded: kernel_size=(5, 5), padding=(2, 2)" in repr(
        layer
    )


def test_a_report_counts_what_a_fold_computes(image):
    model = moved(Same())
    before = report_acu(model, (3, 32, 32))
    [row] = report_acu(fold_acu(model), (3, 32, 32)).rows
    assert (row.kind, row.kernel_size, row.macs) == ("ReshapedConv2d", (5, 5), 3 * 8 * 25)
    assert row.macs * row.pixels == before.folded_macs


@pytest.mark.parametrize("padded", [False, True])
def test_what_is_converted_again_still_shows_what_it_showed(image, padded):
    model = moved(nn.Sequential(Conv2dSame(3, 8, 3, 2)) if padded else Same())
    expected = fold_acu(model)(image)
    layer = model[0] if padded else model.conv
    convert_to_acu(model, kernel_sizes=5)
    [(name, active)] = acu_layers(model)
    assert name.endswith(".convs.0")
    assert (layer.kernel_size, active.kernel_size) == ((3, 3), (5, 5))
    assert_close(model(image), expected, 1e-5)
    nn.init.uniform_(active.offsets, -0.4, 0.4)
    expected = model(image)
    fold_acu(model, image)
    assert layer.kernel_size == (3, 3)
    assert_close(model(image), expected, 1e-5)
    assert not any(acu_layers(model))


@pytest.mark.parametrize("far", [0.5, 99.5])
def test_a_free_shape_has_no_grid_to_show(far):
    layer = ACUConv2d.from_positions(3, 4, [(-0.5, 0), (0.5, 0), (0, -0.5), (0, far)])
    x = torch.randn(2, 3, 9, 11)
    expected = layer(x)
    assert type(fold_acu(layer)) is (nn.Conv2d if far == 0.5 else FoldedConv2d)
    assert getattr(layer, "kernel_size", None) == ((3, 3) if far == 0.5 else None)
    assert_close(layer(x), expected, 1e-5)


class ReadsTheWeight(nn.Module):
    """Scales the image by a number that the fold changes."""

    def __init__(self, noise=False):
        super().__init__()
        self.conv, self.noise = nn.Conv2d(3, 8, 3, padding=1), noise

    def forward(self, x, scale=1.0):
        x = self.conv(x) * self.conv.weight.abs().amax() * scale
        return {"image": x, "features": [x + torch.randn_like(x) if self.noise else x]}


def test_with_an_example_a_fold_that_changes_the_output_is_undone(image):
    model = moved(ReadsTheWeight()).train()
    parameters, expected = dict(model.named_parameters()), model(image, 2.0)["image"]
    with pytest.raises(RuntimeError, match=r"ReadsTheWeight for `example_input` would change by .*the model itself:"):
        fold_acu(model, (image, torch.tensor(2.0)))
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert isinstance(model.conv, ACUConv2d)
    assert model.conv.training
    assert torch.equal(model(image, 2.0)["image"], expected)
    fold_acu(model)  # without an example nobody looks


class Stretches(nn.Module):
    """Resizes the image by the size of its kernel, so that all that follows has another shape."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return nn.functional.interpolate(self.conv(x), scale_factor=self.conv.weight.shape[-1])


@pytest.mark.parametrize("inner", [ReadsTheWeight, Stretches])
def test_the_first_module_that_differs_is_named(image, inner):
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = inner()

        def forward(self, x):
            out = self.part(x if inner is ReadsTheWeight else x.repeat(1, 3, 1, 1)[:, :8])
            return out["image"] if isinstance(out, dict) else out

    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Sequential(Picks(), nn.ReLU()), nn.Conv2d(8, 4, 3))
    moved(model)
    state, expected = model.state_dict(keep_vars=True), model(image)
    with pytest.raises(RuntimeError, match=r"first that of 1\.0\.part: its code"):
        fold_acu(model, image)
    assert all(model.state_dict(keep_vars=True)[name] is value for name, value in state.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(image), expected)


class PadsOddImages(nn.Module):
    """Makes images of an odd width even, by half of the kernel that it finds: wrong after a fold, at those only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images):
        x = images["x"] if isinstance(images, dict) else images
        return self.conv(F.pad(x, (0, self.conv.weight.shape[-1] // 2)) if x.shape[-1] % 2 else x)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_fold_that_differs_at_another_size_only_is_undone(as_dict):
    model, image = moved(nn.Sequential(PadsOddImages(), nn.ReLU())), torch.randn(1, 3, 12, 16)
    state, expected = model.state_dict(keep_vars=True), model(image)
    with pytest.raises(
        RuntimeError, match=r"`example_input`, enlarged to \(13, 17\) would change by .*first that of 0\.conv:"
    ):
        fold_acu(model, {"x": image} if as_dict else image)
    assert all(model.state_dict(keep_vars=True)[name] is value for name, value in state.items())
    assert torch.equal(model(image), expected)


class Picky(nn.Module):
    """Takes images of one size, or of multiples of ``step`` pixels, with a mask; notes what came."""

    def __init__(self, step=None):
        super().__init__()
        self.conv, self.step, self.seen = nn.Conv2d(3, 8, 3, padding=1), step, []

    def forward(self, x, mask):
        self.seen.append(tuple(x.shape[-2:]))
        if self.seen[-1] != (64, 96) and (self.step is None or any(size % self.step for size in self.seen[-1])):
            raise AssertionError("wrong size")
        return self.conv(x) * mask


@pytest.mark.parametrize(
    ("step", "sizes"),
    [(None, [(64, 96)]), (32, [(64, 96), (96, 128)]), (64, [(64, 96)]), (1, [(64, 96), (65, 97)])],
)
def test_a_fold_is_compared_at_two_sizes_where_the_model_takes_them(step, sizes):
    model, image, mask = moved(Picky(step)), torch.randn(1, 3, 64, 96), torch.ones(1, 64, 96, dtype=torch.bool)
    model.seen.clear()
    fold_acu(model, (image, mask))
    tried = model.seen.index(sizes[-1]) + 1 if len(sizes) > 1 else 4
    assert model.seen[0] == (64, 96)
    assert model.seen[tried:] == sizes[::-1]  # after the fold, at the given size last
    assert not any(acu_layers(model))


def test_other_sizes_are_tried_for_images_only():
    seen = []
    model = type("Bag", (nn.Module,), {"forward": lambda self, x: seen.append(x.shape) or self.layer(x)})()
    model.layer = nn.Linear(4, 2)
    fold_acu(model, torch.randn(5, 4))
    assert seen == [(5, 4), (5, 4)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_an_example_noise_and_precision_are_no_difference(image, dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)).to(dtype)
    moved(model).train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert fold_acu(model, image.to(dtype)) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_example_that_does_not_fit_changes_nothing(image):
    model = moved(Same())
    with pytest.raises(ValueError, match="channels"):
        fold_acu(model, image[:, :2])
    assert isinstance(model.conv, ACUConv2d)
    with pytest.raises(ValueError, match=r"`example_input`: the output of Text .* no tensors"):
        fold_acu(type("Text", (Same,), {"forward": lambda self, x: "a label"})(), image)


@pytest.mark.parametrize("dilation", [1, 2])
def test_exported_and_compiled_folds(tmp_path, image, dilation):
    model = moved(Same(dilation)).eval()
    assert export_model(model, tmp_path / "net.pt2", input_size=(3, 32, 31)) <= 1e-4
    with torch.no_grad():
        expected = model(image)
        assert_close(torch.export.load(tmp_path / "net.pt2").module()(image), expected, 1e-4)
        fold_acu(model)
        assert_close(torch.fx.symbolic_trace(model)(image), expected, 1e-4)
        torch._dynamo.reset()
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), expected, 1e-4)


def test_a_file_is_compared_with_the_model_and_not_with_its_fold(tmp_path):
    model = moved(ReadsTheWeight())
    with pytest.raises(RuntimeError, match=r"net\.pt2 would differ from the model by"):
        export_model(model, tmp_path / "net.pt2", input_size=(3, 16, 15))
    assert not list(tmp_path.iterdir())
    assert export_model(model, tmp_path / "net.pt2", input_size=(3, 16, 15), fold=False) <= 1e-4


def test_a_padding_model_goes_to_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert export_model(moved(Same()), tmp_path / "net.onnx", input_size=(3, 32, 31)) <= 1e-4
