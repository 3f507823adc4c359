"""fold_acu(form=...): every form computes the same, keeps the layer's face, and the rule picks by arithmetic."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.folds import assert_forms_agree
from helpers.layers import CROSS, RING
from helpers.oracle import assert_close
from torch import nn

from lightning_acu import ACUConv2d, FoldedConv2d, acu_layers, convert_to_acu, fold_acu, report_acu, round_acu
from lightning_acu.folded import ReshapedConv2d
from lightning_acu.forms import FORMS, ShiftedConv2d
from lightning_acu.surgery import fold_rule, fold_times

#: Torch's, of the plain convolution too, where "same" pads the sides differently.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SHOWN = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
KIND = {"single": ReshapedConv2d, "sum": FoldedConv2d, "depthwise": FoldedConv2d, "shifts": ShiftedConv2d}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_every_form_of_any_layer_computes_the_same(part):
    for seed in range(part * 50, part * 50 + 50):  # scripts/check_folds.py goes on
        assert_forms_agree(seed)


@pytest.mark.parametrize("taps", [CROSS, RING])
@pytest.mark.parametrize("form", FORMS)
def test_free_shapes_fold_in_every_form(taps, form):
    layer = ACUConv2d.from_positions(2, 6, taps, (2, 1), position_groups=2, dtype=torch.float64)
    nn.init.uniform_(layer.offsets, -1, 1)
    model, x = nn.Sequential(layer), torch.randn(2, 2, 9, 7, dtype=torch.float64)
    expected = model(x)
    fold_acu(model, form=form)
    assert_close(model(x), expected, 1e-10)
    assert (layer.in_channels, layer.out_channels, layer.stride, layer.groups) == (2, 6, (2, 1), 1)


def moved(conv, by=0.8):
    model = convert_to_acu(nn.Sequential(conv))
    nn.init.uniform_(model[0].offsets, -by, by)
    return model


def torchscript(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return torch.jit.script(model), torch.jit.trace(model, x)


@pytest.mark.parametrize("form", KIND)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_folded_layer_keeps_its_face_and_can_be_scripted_traced_copied_and_pickled(form, padding_mode):
    model = moved(nn.Conv2d(4, 6, 3, (2, 1), 1, groups=2, padding_mode=padding_mode)).eval()
    x = torch.randn(2, 4, 13, 10)
    with torch.no_grad():
        expected = model(x)
        shown = {name: getattr(model[0], name) for name in SHOWN}
        fold_acu(model, form=form)
        assert type(model[0]) is KIND[form] or (form == "single" and padding_mode != "zeros")
        for twin in (
            model,
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.fx.symbolic_trace(model),
            *torchscript(model, x),
        ):
            assert_close(twin(x), expected, 1e-5)
            assert_close(twin(x[:1, :, :8, :7]), model(x[:1, :, :8, :7]), 1e-5)
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {name: getattr(twin[0], name) for name in SHOWN} == shown


@pytest.mark.parametrize("form", KIND)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_precision(form, dtype):
    model, x = moved(nn.Conv2d(4, 6, 3, padding=1)).to(dtype), torch.randn(2, 4, 9, 8)
    exact = copy.deepcopy(model).double()
    expected = exact(x.to(dtype).double())
    fold_acu(model, form=form)
    output = model(x.to(dtype))
    assert output.dtype == dtype
    assert_close(output.double(), expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", KIND)
def test_frozen_weights_stay_frozen_and_what_only_shifts_does_not_learn(form):
    model = moved(nn.Conv2d(4, 6, 3, padding=1))
    fold_acu(model, form=form)
    depthwise = [conv for conv in model.modules() if isinstance(conv, nn.Sequential) and conv is not model]
    assert bool(depthwise) == (form == "depthwise")
    assert not any(pair[0].weight.requires_grad for pair in depthwise)
    model(torch.randn(1, 4, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    frozen = moved(nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False))
    fold_acu(frozen, form=form)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_taps_far_apart_have_no_form_that_would_need_a_large_kernel():
    model = moved(nn.Conv2d(2, 3, 3, padding=1))
    with torch.no_grad():
        model[0].offsets[:2] = 300.0
    with pytest.raises(ValueError, match=r"0: `form`='single' would be a kernel of \d+x\d+ cells"):
        fold_acu(model, form="single")
    with pytest.raises(ValueError, match=r"0: `form`='shifts' pads the image by less than 64 pixels"):
        fold_acu(model, form="shifts")
    assert set(fold_rule.candidates(model[0])) <= {"auto", "sum", "depthwise"}
    x = torch.randn(1, 2, 9, 8)
    expected = model(x)
    for form in ("auto", "sum", "depthwise"):
        assert_close(fold_acu(copy.deepcopy(model), form=form)(x), expected, 1e-5)


def test_arguments_that_cannot_be_meant():
    model, x = moved(nn.Conv2d(2, 3, 3)), torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match=r"`form` \(='one'\) must be 'auto', 'single'"):
        fold_acu(model, form="one")
    with pytest.raises(ValueError, match=r"`runtime` \(='tensorrt'\) must be 'torch', 'onnxruntime' or None"):
        fold_acu(model, x, runtime="tensorrt")
    for arguments in ({"runtime": "torch"}, {"runtime": "torch", "form": "sum", "example_input": x}):
        with pytest.raises(ValueError, match=r"`runtime`.*needs `example_input`"):
            fold_acu(model, **arguments)
    assert list(acu_layers(model))


def test_without_sizes_auto_is_one_convolution_and_with_them_the_cheapest():
    make = lambda: moved(nn.Conv2d(256, 256, 3, padding=1), 1.2)  # noqa: E731
    torch.manual_seed(0)
    assert type(fold_acu(make())[0]) is ReshapedConv2d
    image = torch.randn(1, 256, 14, 14)
    assert type(fold_acu(make(), image, form="single")[0]) is ReshapedConv2d
    assert isinstance(fold_acu(make(), image)[0], FoldedConv2d)
    assert isinstance(fold_acu(round_acu(make()), image)[0], FoldedConv2d)
    on_the_grid = moved(nn.Conv2d(256, 256, 3, padding=1), 0.4)
    assert type(fold_acu(round_acu(on_the_grid), image)[0]) is nn.Conv2d
    depthwise = moved(nn.Conv2d(256, 256, 3, padding=1, groups=256), 1.2)
    assert type(fold_acu(depthwise, image)[0]) is ReshapedConv2d
    few = moved(nn.Conv2d(3, 16, 3, padding=1), 0.5)
    assert type(fold_acu(few, torch.randn(1, 3, 64, 64))[0]) is ReshapedConv2d


class Fuses(nn.Module):
    """Has a method that may merge weights, and one convolution more that it cannot reach."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, x):
        return self.conv(x)

    def fuse(self):
        self.conv.weight.data.mul_(1.0)


def test_what_may_be_merged_later_stays_one_convolution_unless_a_runtime_is_asked():
    model = nn.Sequential(Fuses(), nn.Conv2d(256, 256, 3, padding=1))
    convert_to_acu(model)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1.2, 1.2)
    image = torch.randn(1, 256, 14, 14)
    fold_acu(model, image)
    assert type(model[0].conv) is ReshapedConv2d
    assert isinstance(model[1], FoldedConv2d)


def test_the_runtime_s_times_decide(monkeypatch):
    model, x = moved(nn.Conv2d(64, 64, 3, padding=1), 1.2), torch.randn(1, 64, 14, 14)
    slow = {"auto": 3.0, "single": 3.0, "sum": 2.0, "depthwise": 1.5, "shifts": 1.0}
    seen = []

    def times(calls, budget):
        seen.append([*calls])
        for call in calls.values():
            call()
        return {form: [slow[form]] for form in calls}

    monkeypatch.setattr(fold_times, "in_turns", times)
    expected = model(x)
    fold_acu(model, x, runtime="torch")
    assert type(model[0]) is ShiftedConv2d
    assert "auto" in seen[0]
    assert_close(model(x), expected, 1e-5)


def test_times_are_taken_in_turns():
    times = fold_times.in_turns({"a": lambda: None, "b": lambda: None}, 0.0)
    assert [len(each) for each in times.values()] == [3, 3]
    assert all(seconds >= 0 for each in times.values() for seconds in each)


@pytest.mark.slow
def test_forms_are_measured_in_onnx_runtime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = moved(nn.Conv2d(32, 32, 3, padding=1), 1.2), torch.randn(1, 32, 14, 14)
    expected = model(x)
    fold_acu(model, x, runtime="onnxruntime")
    assert_close(model(x), expected, 1e-5)
    assert not list(acu_layers(model))


def test_a_report_prices_every_form_of_every_fold():
    model = nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1, groups=256))
    model.append(ACUConv2d.from_positions(256, 8, CROSS))
    convert_to_acu(model)
    assert not any(row.form_prices for row in report_acu(model, (256, 14, 10)).rows)
    with pytest.raises(ValueError, match=r"`forms`=True: .* give `input_size`"):
        report_acu(model, forms=True)
    dense, depthwise, free = report_acu(model, (256, 14, 10), forms=True).rows
    assert dense.form_prices["auto"] == depthwise.form_prices["auto"] == 1
    assert free.form_prices == {}
    nn.init.uniform_(model[0].offsets, -1.2, 1.2)
    nn.init.uniform_(model[1].offsets, -1.2, 1.2)
    report = report_acu(model, (256, 14, 10), forms=True)
    dense, depthwise, _ = report.rows
    assert 1 < min(dense.form_prices.values()) < dense.form_prices["auto"]
    assert min(depthwise.form_prices, key=depthwise.form_prices.get) == "auto"
    text = str(report)
    assert "cheapest fold" in text
    assert "auto, " in text


def test_a_count_is_what_a_form_computes():
    layer = ACUConv2d(8, 6, 3, padding=1, dtype=torch.float64)
    nn.init.uniform_(layer.offsets, 0.1, 0.4)
    image = torch.empty(1, 8, 10, 12, device="meta")
    counts = {form: fold_rule.count(layer.float().fold_without_numbers(form), image) for form in KIND}
    pixels = 10 * 12
    assert counts["single"]["dense"] == pixels * 8 * 6 * 25  # rows and columns -2 to 2, of which -2 is empty
    assert counts["sum"]["dense"] == pixels * 8 * 6 * (9 * 4)
    assert counts["depthwise"]["pointwise"] == counts["shifts"]["pointwise"] == pixels * 8 * 6 * 9
    assert counts["single"]["passes"] == pixels * (8 + 6)
    assert counts["single"]["calls"] == 1
    assert counts["depthwise"]["depthwise"] > 0 == counts["shifts"]["depthwise"]
    assert set(counts["sum"]) == set(fold_rule.KINDS)
    assert all(len(weights) == len(fold_rule.KINDS) for weights in fold_rule.WEIGHTS.values())
    cheaper = fold_rule.price(counts["depthwise"], "torch"), fold_rule.price(counts["depthwise"], "onnxruntime")
    assert min(cheaper) > 0


def test_forms_of_many_small_parts_are_no_candidates_where_each_channel_has_positions():
    layer = ACUConv2d(32, 32, 3, padding=1, groups=32, position_groups=32)
    nn.init.uniform_(layer.offsets, -0.8, 0.8)
    assert set(fold_rule.candidates(layer)) == {"auto"}  # and "single", which is the same here
