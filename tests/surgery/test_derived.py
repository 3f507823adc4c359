"""Subclasses of nn.Conv2d that change nothing of what is computed are converted, and stay what they were."""

import abc
import copy
import io
import pickle

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn
from torch.nn.utils import parametrizations

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, fold_acu, report_acu, round_acu
from lightning_acu.derived import active_class, what_differs
from lightning_acu.surgery import NoEffectWarning, convert_like


class DepthwiseConv2d(nn.Conv2d):
    """Only the constructor is another, as in Hugging Face's EfficientNetDepthwiseConv2d."""

    def __init__(self, in_channels, depth_multiplier=1, kernel_size=3, stride=1, padding=0):
        super().__init__(
            in_channels, in_channels * depth_multiplier, kernel_size, stride, padding, groups=in_channels, bias=False
        )


class Conv3x3(nn.Conv2d):
    """With an attribute and methods that its users call, and its own initialisation."""

    def __init__(self, *channels, name="conv"):
        super().__init__(*channels, 3, padding=1)
        self.name = name

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.125)
        nn.init.zeros_(self.bias)

    def describe(self):
        return f"{self.name}: {tuple(self.weight.shape)}"

    def extra_repr(self):
        return f"{super().extra_repr()}, name={self.name}"


class Deeper(Conv3x3):
    """A subclass of a subclass."""


class Abstract(nn.Conv2d, abc.ABC):
    """With another metaclass."""


class Same(nn.Conv2d):
    """Padded by a word."""


MAKE = {
    "depthwise": lambda: DepthwiseConv2d(4, 2),
    "conv3x3": lambda: Conv3x3(4, 6),
    "deeper": lambda: Deeper(4, 6, name="deep"),
    "same": lambda: Same(4, 6, 3, padding="same"),
    "abstract": lambda: Abstract(4, 6, (3, 5), stride=2, padding=1, padding_mode="reflect"),
}


def moved(model):
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.6, 0.6)
    return model


@pytest.fixture
def image():
    return torch.randn(2, 4, 9, 11)


@pytest.mark.parametrize("kind", MAKE)
def test_they_are_converted_and_folded_and_stay_of_their_class(kind, image):
    model = nn.Sequential(MAKE[kind]())
    conv, plain = model[0], copy.deepcopy(model[0])
    parameters, expected = dict(conv.named_parameters()), conv(image)
    convert_to_acu(model, kernel_sizes=[3, (3, 5)])
    assert model[0] is conv
    assert isinstance(conv, ACUConv2d)
    assert isinstance(conv, type(plain))
    assert all(conv.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert_close(conv(image), expected, 1e-6)
    usual = ACUConv2d.from_conv2d(as_plain(copy.deepcopy(plain)))
    moved(model)
    usual.load_state_dict(conv.state_dict())
    expected = conv(image)
    assert torch.equal(usual(image), expected)
    expected.square().sum().backward()
    assert conv.offsets.grad.any()
    assert_close(fold_acu(copy.deepcopy(model))(image), expected, 1e-5)
    nn.init.zeros_(conv.offsets)
    fold_acu(model)
    assert not isinstance(conv, ACUConv2d)
    assert conv.kernel_size != (3, 3) or type(conv) is type(plain)
    assert_close(conv(image), plain(image), 1e-6)
    assert not any(acu_layers(model))
    convert_to_acu(model, kernel_sizes=[3, (3, 5)])  # and again
    assert_close(conv(image), plain(image), 1e-6)


def as_plain(conv):
    conv.__class__ = nn.Conv2d
    return conv


def test_what_their_users_call_stays(image):
    model = convert_to_acu(nn.Sequential(Conv3x3(4, 6, name="first")))
    assert model[0].describe() == "first: (6, 4, 3, 3)"
    assert "name=first" in repr(model)
    assert [row.kind for row in report_acu(model).converted] == ["ACUConv3x3"]
    nn.init.ones_(model[0].weight)
    moved(model)[0].reset_parameters()
    assert model[0].weight.eq(0.125).all()
    assert not model[0].offsets.any()
    alone = model[0].fold()
    assert type(alone) is Conv3x3
    assert (alone.describe(), hasattr(alone, "offsets")) == ("first: (6, 4, 3, 3)", False)
    assert fold_acu(copy.deepcopy(model))[0].describe() == "first: (6, 4, 3, 3)"
    folded = moved(model)[0].fold()  # a 5x5 is no Conv3x3
    assert (type(folded), folded.kernel_size) == (nn.Conv2d, (5, 5))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy", "copy"])
def test_they_are_copied_and_pickled(kind, how, image):
    model = moved(convert_to_acu(nn.Sequential(MAKE[kind]()), kernel_sizes=[3, (3, 5)], position_groups=2))
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = getattr(copy, how)(model[0])
        again = nn.Sequential(again)
    assert type(again[0]) is type(model[0])
    assert again[0] is not model[0]
    assert again[0].position_groups == 2
    assert torch.equal(again(image), model(image))


@pytest.mark.parametrize("kind", sorted(MAKE.keys() - {"abstract"}))  # which is padded first: a FoldedConv2d
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "copy"])
def test_a_fold_of_another_shape_is_still_of_their_class(kind, how, image):
    model = moved(convert_to_acu(nn.Sequential(MAKE[kind]()), kernel_sizes=[3, (3, 5)]))
    expected = model(image)
    fold_acu(model)
    conv = model[0]
    assert isinstance(conv, type(MAKE[kind]()))
    assert conv.weight.shape[2:] != conv.kernel_size
    again = pickle.loads(pickle.dumps(conv)) if how == "pickle" else getattr(copy, how)(conv)
    assert type(again) is type(conv)
    for layer in (conv, again):
        assert_close(layer(image), expected, 1e-5)
    convert_to_acu(model, kernel_sizes=[5, (5, 7)])
    assert any(acu_layers(model))
    assert_close(model(image), expected, 1e-5)


def test_what_a_model_calls_stays_after_a_fold_of_another_shape(image):
    class Doubled(nn.Conv2d):
        FACTOR = 2

        def doubled(self, image):
            return self.FACTOR * self(image)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Doubled(4, 6, 3, padding=1)
            self.conv.pad = 1  # a name that the fold uses, too

        def forward(self, image):
            return self.conv.doubled(image) + self.conv.pad

        def fuse(self):
            self.conv.weight.data.mul_(1)

    model = moved(convert_to_acu(Model()))
    expected = model(image)
    fold_acu(model, image)
    assert_close(model(image), expected, 1e-5)
    model.fuse()  # which the guard tries, with the geometry of the fold
    assert_close(model(image), expected, 1e-5)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), expected, 1e-5)
    assert_close(torch.export.export(model, (image,)).module()(image), expected, 1e-5)


def test_one_class_has_one_active_version():
    assert active_class(Conv3x3) is active_class(Conv3x3)
    assert type(convert_to_acu(Conv3x3(2, 4))) is active_class(Conv3x3)
    assert active_class(Conv3x3).__module__ == Conv3x3.__module__


def test_a_state_dict_of_one_says_how_it_was_converted(image):
    source = moved(convert_to_acu(nn.Sequential(Conv3x3(4, 6)), position_groups=3, fixed_centre=False))
    again = convert_like(nn.Sequential(Conv3x3(4, 6)), source.state_dict())
    again.load_state_dict(source.state_dict())
    assert torch.equal(again(image), source(image))
    assert torch.equal(round_acu(again)[0].offsets, source[0].offsets.round())


def test_a_parametrization_on_top_is_folded(image):
    layer = moved(convert_to_acu(Conv3x3(4, 6)))
    nn.init.normal_(layer.weight)
    parametrizations.weight_norm(layer)
    expected = layer(image)
    assert torch.equal(copy.deepcopy(layer)(image), expected)
    assert_close(layer.fold()(image), expected, 1e-5)


class OwnForward(nn.Conv2d):
    def forward(self, input):
        return super().forward(2 * input)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class OwnCall(nn.Conv2d):
    def __call__(self, input):
        return 2 * super().__call__(input)


class ScaleMixin:
    def forward(self, input):
        return 2 * super().forward(input)


class Mixed(ScaleMixin, nn.Conv2d):
    pass


class OwnParameter(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(1))


class OwnBuffer(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones(1), persistent=False)


class OwnModule(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.adapter = nn.Linear(2, 2)


class Weighted(nn.Conv2d):
    bias = property(lambda self: None)

    def __init__(self, *args):
        nn.Module.__init__(self)


class OwnPositions(nn.Conv2d):
    def positions(self):
        return "of words"


class OwnStart(nn.Conv2d):
    def __init__(self, *args):
        super().__init__(*args)
        self.start = 3


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (OwnForward, "overrides `forward`"),
        (OwnConvForward, "overrides `_conv_forward`"),
        (OwnCall, "overrides `__call__`"),
        (Mixed, "overrides `forward`"),
        (OwnParameter, "has a tensor 'gain' of its own"),
        (OwnBuffer, "has a tensor 'mask' of its own"),
        (OwnModule, "has a tensor 'adapter.weight' of its own"),
        (Weighted, "overrides `bias`"),
        (OwnPositions, "has its own `positions`"),
        (OwnStart, "has its own `start`"),
    ],
)
def test_what_may_compute_something_else_is_not(cls, what):
    assert what_differs(cls(4, 6, 3)) == what
    if cls is not Weighted:
        with pytest.warns(
            NoEffectWarning, match=f"no rule for the class {cls.__name__}, which {what}; .*register_rule"
        ):
            model = convert_to_acu(nn.Sequential(cls(4, 6, 3)))
        assert type(model[0]) is cls


def test_a_conversion_in_part_says_how_much_stays_plain():
    layers = [OwnForward(4, 4, 3), OwnForward(4, 4, 5), OwnParameter(4, 4, 3), OwnForward(4, 4, 1), nn.Conv2d(4, 4, 1)]
    model = nn.Sequential(*layers, nn.Conv2d(4, 4, 3), Conv3x3(4, 4))
    with pytest.warns(NoEffectWarning) as caught:
        convert_to_acu(model)
    [warning] = caught
    text = str(warning.message)
    assert "3 of 5 selected convolutions of Sequential stay plain: 2 because: no rule for the class OwnForward" in text
    assert "; 1 because: no rule for the class OwnParameter" in text
    assert warning.filename == __file__
    reasons = {row.name: row.reason for row in report_acu(model).skipped}
    assert "overrides `forward`" in reasons["0"]
    assert reasons["3"] == reasons["4"] == "kernel size 1x1 not among kernel_sizes=[3, 5]"


def test_reasons_are_those_of_the_last_conversion():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), OwnForward(4, 4, 3))
    convert_to_acu(model, target_modules=["0"])
    assert "not among target_modules" in report_acu(model).skipped[0].reason
    with pytest.warns(NoEffectWarning, match="1 of 1 selected"):
        convert_to_acu(model)
    assert "no rule for the class OwnForward" in report_acu(model).skipped[0].reason
    convert_to_acu(model, exclude_modules=["1"])  # leaves it out without a word
    assert "exclude_modules" in report_acu(model).skipped[0].reason
