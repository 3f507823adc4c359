"""A method is refused for what it does to active or folded convolutions, not for its name."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.oracle import assert_close
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_acu import acu_layers, convert_to_acu, fold_acu, round_acu
from lightning_acu.surgery import guards


@pytest.fixture(autouse=True)
def copies(monkeypatch):
    """The modules that guards have copied."""
    torch.manual_seed(0)
    made = []
    counting = SimpleNamespace(deepcopy=lambda module: made.append(module) or copy.deepcopy(module))
    monkeypatch.setattr(guards, "copy", counting)
    return made


def moved(model, by=0.4):
    convert_to_acu(model)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -by, by)
    return model


STAGES = {"plain": lambda model: model, "active": moved, "folded": lambda model: fold_acu(moved(model))}
stages = pytest.mark.parametrize("stage", STAGES)


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )
        self.decoder = nn.Linear(2, 64)

    def reparameterize(self, mu, logvar):
        return mu + torch.randn_like(mu) * (logvar / 2).exp()

    def forward(self, x):
        return self.decoder(self.reparameterize(*self.encoder(x).chunk(2, 1)))


class KeepsFeatures(nn.Module):
    """`merge` needs no arguments and is a step of the forward pass, which also calls a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def merge(self):
        return self.features + self.second(self.features).to(self.second.weight.dtype)

    def forward(self, x):
        self.features = self.first(x)
        return self.merge()


class FusesFeatures(nn.Module):
    """`fuse` could be called without arguments, but is called with feature maps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def fuse(self, *features, scale=1.0):
        return sum(features) * scale * self.conv.weight.abs().mean()

    def forward(self, x):
        x = self.conv(x)
        return self.fuse(x, x.relu())


@stages
@pytest.mark.parametrize("make", [VAE, KeepsFeatures, FusesFeatures])
def test_a_step_of_the_forward_pass_just_runs(make, stage, copies):
    model, x = STAGES[stage](make()), torch.randn(4, 1, 8, 8)
    for _ in range(2):
        model(x).sum().backward()
    assert copies == []
    assert all(parameter.grad is not None for parameter in model.parameters())


@stages
@pytest.mark.parametrize("make", [VAE, KeepsFeatures, FusesFeatures])
def test_a_step_of_the_forward_pass_can_be_compiled(make, stage):
    torch._dynamo.reset()
    model, x = STAGES[stage](make()).eval(), torch.randn(4, 1, 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert compiled(x).shape == expected.shape
        if make is not VAE:  # whose noise is drawn otherwise
            assert_close(compiled(x), expected, 1e-5)


class ConvNorm(nn.Module):
    """As in ultralytics: merged in place, or by making a convolution from the attributes of the old one."""

    def __init__(self, c_in, c_out, stride=1, in_place=True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn, self.in_place = nn.BatchNorm2d(c_out), in_place
        nn.init.uniform_(self.bn.running_var, 0.5, 2)
        nn.init.normal_(self.bn.running_mean)

    def merge(self):
        conv, bn = self.conv, self.bn
        scale = bn.weight / (bn.eps + bn.running_var).sqrt()
        if not self.in_place:
            conv = nn.Conv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation
            )
        conv.bias = nn.Parameter((bn.bias - bn.running_mean * scale).detach())
        conv.weight.data = self.conv.weight.data * scale.detach().view(-1, 1, 1, 1)
        self.conv, self.bn = conv, nn.Identity()

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Head(nn.Module):
    """Takes a list of feature maps; its `fuse` does nothing."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList([nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])

    def fuse(self):
        pass

    def forward(self, features):
        return [tower(x) for tower, x in zip(self.towers, features, strict=True)]


class Detector(nn.Module):
    def __init__(self, in_place=True):
        super().__init__()
        self.early, self.late = ConvNorm(3, 4, in_place=in_place), ConvNorm(4, 8, 2, in_place=in_place)
        self.head = Head()

    def is_fused(self):
        return not isinstance(self.early.bn, nn.BatchNorm2d)

    def fuse(self, verbose=True):
        if not self.is_fused():
            for block in (self.early, self.late):
                block.merge()
            self.head.fuse()
        return self

    def forward(self, x):
        early = self.early(x)
        return self.head([early, self.late(early)])


def outputs(model, x):
    with torch.no_grad():
        return torch.cat([y.flatten() for y in model.eval()(x)])


@pytest.mark.parametrize("in_place", [True, False])
def test_a_detector_is_fused_once_it_is_folded_and_not_before(in_place, copies):
    model, x = moved(Detector(in_place)).eval(), torch.randn(2, 3, 20, 18)
    expected, state = outputs(model, x), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"Detector.fuse\(\) merges weights of active convolutions .*fold_acu"):
        model.fuse()
    assert not model.is_fused()
    model.head.fuse()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    fold_acu(model)
    assert_close(outputs(model, x), expected, 1e-5)
    copies.clear()
    assert model.fuse(verbose=False) is model
    assert set(copies) == {model}  # and not its parts
    assert model.is_fused()
    assert_close(outputs(model, x), expected, 1e-5)


def test_a_method_that_does_nothing_is_not_refused_where_it_cannot_be_tried():
    head = STAGES["folded"](Head())
    assert head.fuse() is None


class Pyramid(Detector):
    """Merges, and takes a list of images."""

    def forward(self, images):
        return super().forward(images[0] + images[1])


def test_what_could_not_be_tried_is_not_said_to_change_the_output():
    model, x = moved(Pyramid()), [torch.randn(2, 3, 20, 18) for _ in range(2)]
    expected = outputs(model, x)
    fold_acu(model)
    with pytest.raises(RuntimeError, match=r"could not be tried on a copy .*fold_acu\(model, example_input=") as caught:
        model.fuse()
    assert "would change" not in str(caught.value)
    assert_close(outputs(model, x), expected, 1e-5)
    fold_acu(model, (x,))  # now it is known what the model takes
    twin = copy.deepcopy(model)
    for each in (twin, model):
        assert_close(outputs(each.fuse(), x), expected, 1e-5)


class RepVGG(nn.Module):
    """Third-party code: a 3x3 and a 1x1 with norms, merged into one 3x3."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.point = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def switch_to_deploy(self):
        if self.training:
            return
        try:
            dense, point = (fuse_conv_bn_eval(*branch) for branch in (self.dense, self.point))
        except RuntimeError:
            return
        merged = nn.Conv2d(4, 4, 3, padding=1)
        merged.weight.data = dense.weight.data + nn.functional.pad(point.weight.data, (1, 1, 1, 1))
        merged.bias.data = dense.bias.data + point.bias.data
        self.deployed = merged
        del self.dense, self.point

    def forward(self, x):
        return self.deployed(x) if hasattr(self, "deployed") else self.dense(x) + self.point(x)


def test_unknown_code_that_merges_branches():
    model, x = moved(nn.Sequential(RepVGG()).double()), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    block = model[0]
    block.train().switch_to_deploy()  # nothing yet
    expected = outputs(model, x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"RepVGG.switch_to_deploy\(\) merges .*\(0.dense.0\)"):
            block.switch_to_deploy()
    assert torch.equal(outputs(model, x), expected)
    on_grid = fold_acu(round_acu(copy.deepcopy(model)))
    at_grid = outputs(on_grid, x)
    on_grid[0].switch_to_deploy()
    assert hasattr(on_grid[0], "deployed")
    assert_close(outputs(on_grid, x), at_grid)
    fold_acu(model)
    with pytest.raises(RuntimeError, match=r"because the fold of 0.dense.0 has another shape"):
        block.switch_to_deploy()
    assert_close(outputs(model, x), expected)


class Nested(nn.Module):
    """Guards within guards: each level merges the next."""

    def __init__(self, depth):
        super().__init__()
        self.inner = Nested(depth - 1) if depth else ConvNorm(3, 3)

    def fuse(self):
        self.inner.fuse() if isinstance(self.inner, Nested) else self.inner.merge()
        return self

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("depth", [1, 7])
def test_guards_within_guards_copy_the_outermost_module_alone(depth, copies):
    model, x = moved(Nested(depth)), torch.randn(2, 3, 9, 8)
    expected = outputs(model, x)
    with pytest.raises(RuntimeError, match=r"Nested.fuse\(\) merges"):
        model.fuse()
    assert copies == [model]
    fold_acu(model)
    copies.clear()
    assert_close(outputs(model.fuse(), x), expected, 1e-5)
    assert copies == [model]


def test_a_model_that_cannot_be_copied_is_stopped_at_the_first_read():
    model, x = moved(nn.Sequential(RepVGG())), torch.randn(2, 4, 9, 8)
    model.eval()[0].kept = model(x)  # with its graph
    expected = outputs(model, x)
    with pytest.raises(RuntimeError, match="merges weights of active convolutions"):
        model[0].switch_to_deploy()
    fold_acu(model)
    with pytest.raises(RuntimeError, match="could not be tried on a copy, because there is none"):
        model[0].switch_to_deploy()
    assert_close(outputs(model, x), expected, 1e-5)


class Steps(nn.Module):
    """Keeps what its forward pass has come to, as a method without arguments needs it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def reparameterize(self):
        return 2 * self.mean

    def forward(self, x):
        self.mean = self.conv(x)
        return self.reparameterize()


@pytest.mark.parametrize("duplicate", [copy.copy, Steps._replicate_for_data_parallel], ids=["copy", "replica"])
def test_in_a_shallow_copy_the_method_is_that_of_the_copy(duplicate):
    model = moved(Steps())
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    model(torch.zeros(2, 3, 6, 6))
    other = duplicate(model)
    other._modules = dict(model._modules)  # a replica's are filled in by nn.DataParallel
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("stage", ["active", "folded"])
def test_a_trial_takes_no_random_numbers(stage):
    class Random(Steps):
        def reparameterize(self):
            return torch.randn(3)

    model = STAGES[stage](Random())
    torch.manual_seed(1)
    found = model.reparameterize()
    torch.manual_seed(1)
    assert torch.equal(found, torch.randn(3))


def test_to_another_precision_is_no_merging():
    class Half(Steps):
        def fuse(self):
            return self.bfloat16()

        def merge_weights(self):
            return self.to(torch.bfloat16).conv.weight + 1

    model = moved(Half())
    with pytest.raises(RuntimeError, match="would lose their positions"):
        model.merge_weights()
    assert model.conv.weight.dtype == torch.float32
    assert model.fuse().conv.weight.dtype == torch.bfloat16
    assert model.conv.offsets.dtype == torch.float32
