"""Which convolutions are left alone, and the reason that the report gives for it."""

import re
import warnings

import pytest
import timm
import torch
from helpers.oracle import assert_close
from timm import layers
from timm.layers.conv2d_same import Conv2dSameExport
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu, report_acu
from lightning_acu.surgery import NoEffectWarning, register_rule, rules, why_not_convertible


def weight_norm_hook(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv)


def spectral_norm_hook(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.spectral_norm(conv)


NOT_PLAIN = {
    "Conv2dSameExport": (lambda: Conv2dSameExport(4, 8, 3), "no rule for the class Conv2dSameExport"),
    "LazyConv2d": (lambda: nn.LazyConv2d(8, 3), "its parameters are not initialised yet; run one batch first"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), "parametrized"),
    "weight norm (hook)": (lambda: weight_norm_hook(nn.Conv2d(4, 8, 3)), "recomputed.*weight norm"),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 8, 3)), "parametrized"),
    "spectral norm (hook)": (lambda: spectral_norm_hook(nn.Conv2d(4, 8, 3)), "recomputed.*spectral norm"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Conv2d(4, 8, 3)), "parametrized"),
    "pruned": (lambda: prune.random_unstructured(nn.Conv2d(4, 8, 3), "weight", 0.5), "recomputed.*pruning"),
    "pruned bias": (lambda: prune.random_unstructured(nn.Conv2d(4, 8, 3), "bias", 0.5), "recomputed.*pruning"),
    "complex": (lambda: nn.Conv2d(4, 8, 3, dtype=torch.complex64), "complex64"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning", "ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_computes_otherwise_is_skipped_with_its_reason(kind):
    make, reason = NOT_PLAIN[kind]
    model = nn.Sequential(make(), nn.Conv2d(8, 8, 3))
    before = type(model[0]), sorted(model[0].state_dict())
    with pytest.warns(NoEffectWarning, match=f"1 of 2 selected convolutions of Sequential stay plain: 1 .*{reason}"):
        convert_to_acu(model)
    assert (type(model[0]), sorted(model[0].state_dict())) == before
    assert type(model[1]) is ACUConv2d
    [row] = report_acu(model).skipped
    assert row.name == "0"
    assert row.reason == why_not_convertible(model[0])
    assert re.search(reason, row.reason)


def test_routed_convolutions_are_skipped_with_their_reason():
    routed = layers.CondConv2d(4, 8, 3, num_experts=2)  # no nn.Conv2d, and takes routing weights
    with pytest.warns(NoEffectWarning, match="1 of 2 selected convolutions of ModuleList stay plain"):
        model = convert_to_acu(nn.ModuleList([routed, nn.Conv2d(4, 8, 3)]))
    assert type(model[0]) is layers.CondConv2d
    assert [(row.name, row.kind, row.reason) for row in report_acu(model).skipped] == [
        ("0", "CondConv2d", why_not_convertible(routed))
    ]
    assert "mixed from several experts for every image" in why_not_convertible(routed)


class SeparableConv2d(nn.Module):
    """A block that is no convolution itself; such as timm's of this name, with an int for a kernel size."""

    def __init__(self):
        super().__init__()
        self.kernel_size = 3
        self.conv_dw = nn.Conv2d(4, 4, 3, groups=4)
        self.conv_pw = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return self.conv_pw(self.conv_dw(x))


def test_a_block_named_like_a_convolution_is_looked_into():
    model = convert_to_acu(nn.Sequential(SeparableConv2d()))
    assert [name for name, _ in acu_layers(model)] == ["0.conv_dw"]
    assert {"0.conv_dw", "0.conv_pw"} <= {row.name for row in report_acu(model).rows}


@pytest.mark.parametrize(
    ("name", "skipped", "converted"),
    [
        ("tf_efficientnet_b0", set(), 17),
        ("tf_efficientnet_cc_b0_4e", {"CondConv2d"}, 9),
        ("xception41", set(), 41),
    ],
)
@pytest.mark.filterwarnings("ignore:convert_to_acu. .* selected convolutions:lightning_acu.surgery.NoEffectWarning")
def test_every_convolution_of_a_model_is_accounted_for(name, skipped, converted):
    model = convert_to_acu(timm.create_model(name))
    rows = report_acu(model).rows
    assert sum(row.converted for row in rows) == converted
    assert {row.kind for row in rows if not row.converted and "kernel size" not in row.reason} == skipped
    convs = {n for n, module in model.named_modules() if isinstance(module, nn.Conv2d | layers.CondConv2d)}
    assert convs <= {row.name for row in rows}


class Doubled(nn.Conv2d):
    """A subclass that computes what its parent does, which nobody can see."""

    def forward(self, input):
        return super().forward(input)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))


@pytest.mark.usefixtures("registry")
def test_a_rule_for_another_class_converts_it():
    model, x = nn.Sequential(Doubled(2, 4, 3), Doubled(4, 4, 3, groups=4)), torch.randn(1, 2, 9, 8)

    @register_rule(Doubled)
    def doubled(conv):
        return "grouped ones are not" if conv.groups > 1 else None

    expected = model(x)
    with pytest.warns(NoEffectWarning, match="1 of 2 selected .* stay plain: 1 because: grouped ones are not"):
        convert_to_acu(model)
    assert [name for name, _ in acu_layers(model)] == ["0"]
    assert_close(model(x), expected, 1e-6)
    assert [row.reason for row in report_acu(model).skipped] == ["grouped ones are not"]


@pytest.mark.usefixtures("registry")
def test_a_rule_may_bring_its_own_conversion():
    given = []

    def convert(conv, **arguments):
        given.append(arguments)
        conv.__class__ = nn.Conv2d
        ACUConv2d.adopt(conv, **arguments)

    register_rule(Doubled, convert)(lambda conv: None)
    model = convert_to_acu(nn.Sequential(Doubled(2, 4, 3)), position_groups=2, fixed_centre=False, backend="dense")
    assert given == [{"position_groups": 2, "fixed_centre": False, "backend": "dense"}]
    assert type(model[0]) is ACUConv2d


def test_no_rule_is_left_behind():
    with pytest.warns(
        NoEffectWarning, match="no rule for the class Doubled, which overrides `forward`; .*register_rule adds one"
    ):
        convert_to_acu(Doubled(2, 4, 3))


@pytest.mark.parametrize("kind", ["weight norm", "weight norm (hook)", "pruned", "pruned bias"])
def test_what_was_skipped_converts_once_that_is_removed(kind):
    conv = NOT_PLAIN[kind][0]()
    with pytest.warns(NoEffectWarning):
        convert_to_acu(conv)
    if kind == "weight norm":
        nn.utils.parametrize.remove_parametrizations(conv, "weight")
    elif kind == "weight norm (hook)":
        nn.utils.remove_weight_norm(conv)
    else:
        prune.remove(conv, "bias" if kind == "pruned bias" else "weight")
    assert report_acu(conv).rows[0].reason == "not converted yet"
    x = torch.randn(1, 4, 6, 7)
    expected = conv(x)
    assert_close(fold_acu(convert_to_acu(conv))(x), expected, 1e-6)
