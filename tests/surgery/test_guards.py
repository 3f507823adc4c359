"""Models that merge their branches for inference: right, or an error that says what to do; never silently wrong."""

import copy
import functools
import pickle

import pytest
import timm
import torch
from helpers.census_model import tensors, wake
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, create_model, fold_acu, round_acu

#: A small one of every family of the design notes and of every module of timm that merges; for each, whether a fold
#: with larger kernels can still be merged.
FAMILIES = {
    "repvgg_a0": None,
    "mobileone_s0": False,
    "fastvit_t8": False,
    "repvit_m1": False,
    "efficientvit_m0": True,
    "tiny_vit_5m_224": True,
    "shvit_s1": None,
    "levit_128s": True,
    "ghostnetv3_050": False,
    "repghostnet_050": False,
    "lcnetv2_base": None,
    "iformer_t": None,
    "efficientvim_m1": None,
    "nextvit_small": None,
}
#: Their methods merge norms into linear layers and 1x1 convolutions, which are not active.
LEAVES_CONVOLUTIONS_ALONE = {"nextvit_small"}
families = pytest.mark.parametrize("name", [name for name in FAMILIES if timm.is_model(name)])


@pytest.fixture(autouse=True)
def _double():
    """In float64, also what merging builds, so that right and wrong are far apart."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@functools.cache
def plain(name):
    model = create_model(name, num_classes=5, **({"img_size": 64} if "levit" in name else {}))
    wake(model)
    with torch.no_grad():  # statistics that merging has to take into account
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def perturbed(name):
    model = convert_to_acu(copy.deepcopy(plain(name)))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in acu_layers(model):
            layer.offsets.uniform_(-0.7, 0.7)
    return model


def output(model):
    with torch.no_grad():
        image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        return torch.cat([t.flatten() for t in tensors(model(image))])


def close(got, expected):
    return bool((got - expected).abs().max() <= 1e-9 * expected.abs().max())


@pytest.mark.slow
@families
def test_merging_active_convolutions_names_a_layer_and_says_to_fold(name):
    model = perturbed(name)
    before = output(model)
    assert not close(before, output(plain(name)))
    names = [layer for layer, _ in acu_layers(model)]
    if name in LEAVES_CONVOLUTIONS_ALONE:
        merged = reparameterize_model(model)
        assert close(output(merged), before)
        assert len(merged.state_dict()) < len(model.state_dict())
        return
    with pytest.raises(RuntimeError, match="fold_acu") as caught:
        reparameterize_model(model)
    assert any(layer in str(caught.value) for layer in names)
    assert close(output(model), before)


@pytest.mark.slow
@families
def test_merging_a_fold_with_larger_kernels_is_right_or_refused(name):
    model = perturbed(name)
    expected = output(model)
    fold_acu(model)
    try:
        merged = reparameterize_model(model)
    except RuntimeError as error:
        assert "because the fold of" in str(error)  # noqa: PT017 (either is fine, but nothing else)
        assert not FAMILIES[name]
    else:
        assert FAMILIES[name] is not False
        assert close(output(merged), expected)
    assert close(output(model), expected)


@pytest.mark.slow
@families
def test_merging_is_right_once_the_taps_are_back_on_the_grid(name):
    model = perturbed(name)
    with torch.no_grad():
        for _, layer in acu_layers(model):
            layer.offsets.mul_(0.5)  # so that they round to where they came from
    fold_acu(round_acu(model))
    merged = reparameterize_model(model)
    assert close(output(merged), output(plain(name)))
    assert len(merged.state_dict()) < len(model.state_dict())


@pytest.mark.slow
def test_guards_are_copied_and_pickled_with_the_model():
    for clone in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        active = clone(perturbed("repvgg_a0"))
        with pytest.raises(RuntimeError, match="fold_acu"):
            reparameterize_model(active)
        levit = perturbed("levit_128s")
        expected = output(levit)
        folded = clone(fold_acu(levit))
        assert close(output(reparameterize_model(folded)), expected)
        assert close(output(folded), expected)


def test_only_blocks_with_active_convolutions_are_guarded():
    model = convert_to_acu(copy.deepcopy(plain("repvgg_a0")), target_modules=r"stages\.0\.0\..*")
    for _ in range(2):
        guarded = [name for name, module in model.named_modules() if "reparameterize" in vars(module)]
        assert guarded == ["stages.0.0"]
        convert_to_acu(model, target_modules=r"stages\.0\.0\..*")
    fold_acu(model)
    assert not any("reparameterize" in vars(module) for module in model.modules())


class Merges(nn.Module):
    """Takes the middle of the kernel for its centre, as several models do; wrong for kernels of an even size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x):
        return x + self.conv(x)

    def fuse(self):
        conv = copy.deepcopy(self.conv)
        kh, kw = conv.kernel_size
        with torch.no_grad():
            conv.weight[:, 0, kh // 2, kw // 2] += 1
        return conv


@pytest.mark.parametrize(("offset", "right"), [(0.0, True), (0.4, True), (1.0, False)])
def test_what_a_block_makes_of_the_fold_is_tried_and_not_guessed(offset, right):
    model = convert_to_acu(nn.Sequential(Merges()), fixed_centre=False)
    layer = model[0].conv
    with torch.no_grad():
        if offset == 1.0:  # corners only: a 2x2 kernel of dilation 2, without a centre
            grid = torch.tensor([(i, j) for i in (-1.0, 0, 1) for j in (-1.0, 0, 1)])
            layer.offsets.copy_((torch.where(grid < 0, -1.0, 1.0) - grid).flatten())
        else:
            layer.offsets.copy_(torch.full_like(layer.offsets, offset))
    x = torch.randn(2, 4, 9, 11)
    expected = model(x)
    fold_acu(model)
    assert close(model(x), expected)
    if right:
        assert close(reparameterize_model(model)(x), expected)
    else:
        assert model[0].conv.weight.shape[2:] == (2, 2)
        with pytest.raises(RuntimeError, match=r"Merges.fuse\(\) expects kernels of .* the fold of 0.conv has another"):
            reparameterize_model(model)
        assert close(model(x), expected)


class Branches(nn.Module):
    """As YOLOv10: fuse() merges, and drops a branch that is not the main one; it merges badly if ``wrong``."""

    def __init__(self, wrong):
        super().__init__()
        self.conv, self.side, self.wrong = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), wrong
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        y = self.conv(x) * self.scale
        outputs = {"side": self.side(y) if self.side else None, "last": y.relu()}
        return y, {name: value for name, value in outputs.items() if value is not None}

    def fuse(self):
        with torch.no_grad():
            self.conv.weight.mul_(3 if self.wrong else self.scale)
            self.conv.bias.mul_(self.scale)
            self.scale.fill_(1)
        self.side = None


@pytest.mark.parametrize("wrong", [False, True])
def test_a_merge_may_drop_outputs_but_not_change_those_that_stay(wrong):
    model = convert_to_acu(Branches(wrong))
    nn.init.uniform_(model.conv.offsets, -0.7, 0.7)
    fold_acu(model)
    x = torch.randn(2, 4, 9, 11)
    y, others = model(x)
    if wrong:
        with pytest.raises(RuntimeError, match=r"Branches.fuse\(\) expects kernels of the original shape"):
            model.fuse()
    else:
        model.fuse()
        assert model.side is None
        assert close(model(x)[1]["last"], others["last"])
    assert close(model(x)[0], y)


@pytest.mark.parametrize("folded", [False, True])
def test_torchs_own_fusion_of_convolution_and_norm_is_right(folded):
    conv, norm = ACUConv2d(3, 6, 3, stride=2, padding=1, position_groups=2), nn.BatchNorm2d(6)
    nn.init.uniform_(conv.offsets, -1.5, 1.5)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x, model = torch.randn(2, 3, 9, 12), nn.Sequential(conv, norm).eval()
    expected = model(x)
    if folded:
        fold_acu(model)
    assert close(fuse_conv_bn_eval(model[0], model[1])(x), expected)


def test_a_quantisable_model_is_not_fused_around_active_convolutions():
    model = convert_to_acu(create_model("torchvision/quantized_mobilenet_v2", num_classes=5).eval())
    with pytest.raises(RuntimeError, match=r"fuse_model\(\).*fold_acu"):
        model.fuse_model()


class Notes(Merges):
    """Merges, and notes torch's default dtype meanwhile, and what is new in it."""

    def fuse(self):
        self.seen.append((torch.get_default_dtype(), nn.Linear(1, 1).weight.dtype))
        return super().fuse()


def test_a_trial_leaves_torchs_default_dtype_alone():
    torch.set_default_dtype(torch.float32)
    model = convert_to_acu(nn.Sequential(Notes()), fixed_centre=False)
    nn.init.constant_(model[0].conv.offsets, 0.4)
    fold_acu(model)
    seen = Notes.seen = []
    x = torch.randn(2, 4, 9, 11)
    expected = model(x)
    merged = model[0].fuse()
    assert seen == [(torch.float32, torch.float64), (torch.float32, torch.float32)]  # tried, then done
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize(("name", "right"), [("levit_128s", True), ("repghostnet_050", False)])
def test_models_in_float32_are_tried_in_float64(name, right):
    model = perturbed(name).float()
    torch.set_default_dtype(torch.float32)
    fold_acu(model)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
    if not right:
        with pytest.raises(RuntimeError, match="because the fold of"):
            reparameterize_model(model)
        return
    with torch.no_grad():
        torch.testing.assert_close(reparameterize_model(model)(image), expected, rtol=1e-3, atol=1e-4)


def test_a_block_folded_by_itself_merges_without_the_model_being_told():
    model = convert_to_acu(nn.Sequential(Merges()), fixed_centre=False)
    nn.init.constant_(model[0].conv.offsets, 0.4)
    x = torch.randn(2, 4, 9, 11)
    expected = model(x)
    fold_acu(model[0].conv)
    assert close(model[0].fuse()(x), expected)


@pytest.mark.parametrize("moved", [0.4, 1.4])
def test_a_method_that_returns_a_merged_copy_is_right_each_time(moved):
    model = convert_to_acu(nn.Sequential(Merges()), fixed_centre=False)
    nn.init.constant_(model[0].conv.offsets, moved)
    x = torch.randn(2, 4, 9, 11)
    expected = model(x)
    fold_acu(model)
    for _ in range(2):
        assert close(model[0].fuse()(x), expected)
        assert close(model(x), expected)
