"""ActiveShift2d: what it computes, that only its shifts are trained, and that all made for active layers serves it."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.oracle import assert_close
from helpers.tiny import TinyModule, fit
from torch import nn

from lightning_acu import (
    ActiveShift2d,
    ACUConv2d,
    acu_conv2d,
    acu_state_dict,
    convert_to_acu,
    fold_acu,
    load_acu,
    load_acu_state_dict,
    report_acu,
    round_acu,
    save_acu,
)
from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.ops import backends
from lightning_acu.training import PositionTrainer

BACKENDS = ["reference", "dense", "cython", "auto"]


def shifted(image, shifts, stride):
    """The formula as loops, in float64: output[n, c, i, j] is image[n, c] at (i, j) * stride + shifts[c], bilinear."""
    batch, channels, height, width = image.shape
    out = torch.zeros(batch, channels, -(-height // stride[0]), -(-width // stride[1]), dtype=torch.float64)
    for n in range(batch):
        for c, (dy, dx) in enumerate(shifts.tolist()):
            for i in range(out.shape[2]):
                for j in range(out.shape[3]):
                    y, x = i * stride[0] + dy, j * stride[1] + dx
                    for row in (math.floor(y), math.floor(y) + 1):
                        for column in (math.floor(x), math.floor(x) + 1):
                            if 0 <= row < height and 0 <= column < width:
                                share = (1 - abs(y - row)) * (1 - abs(x - column))
                                out[n, c, i, j] += share * float(image[n, c, row, column])
    return out


def shift_of(channels, stride=1, spread=2.5, **arguments):
    layer = ActiveShift2d(channels, stride, dtype=torch.float64, **arguments)
    nn.init.uniform_(layer.offsets, -spread, spread)
    return layer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_channel_is_read_at_its_own_distance(backend, stride, channels_last):
    layer, image = shift_of(5, stride, backend=backend), torch.randn(2, 5, 7, 10, dtype=torch.float64)
    if channels_last:
        image = image.to(memory_format=torch.channels_last)
    assert_close(layer(image), shifted(image, layer.offsets.view(-1, 2), stride))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_formula(backend):
    """By finite differences of the loops: exact between pixels, where the output is linear in each coordinate."""
    layer = shift_of(3, (2, 1), backend=backend)
    image = torch.randn(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.offsets.copy_(torch.tensor([0.3, -1.6, 1.45, 0.7, -0.2, 2.4]))
    direction = torch.randn(1, 3, 2, 3, dtype=torch.float64)
    (layer(image) * direction).sum().backward()

    def loss(pixels, shifts):
        return (shifted(pixels, shifts.view(-1, 2), (2, 1)) * direction).sum()

    for value, gradient in ((layer.offsets.detach(), layer.offsets.grad), (image.detach(), image.grad)):
        for index in range(value.numel()):
            step = torch.zeros(value.numel(), dtype=torch.float64)
            step[index] = 1e-2
            step = step.view_as(value)
            pair = [
                loss(image.detach(), value + h) if value.ndim == 1 else loss(value + h, layer.offsets.detach())
                for h in (step, -step)
            ]
            assert_close(gradient.flatten()[index], (pair[0] - pair[1]) / 2e-2, 1e-10)


def test_it_starts_at_random_within_the_radius():
    torch.manual_seed(0)
    for radius in (1.0, 0.25):
        shifts = ActiveShift2d(2000, radius=radius).offsets
        assert shifts.min() > -radius
        assert shifts.max() < radius
        assert abs(shifts.mean()) < 0.05 * radius
        assert shifts.std().item() == pytest.approx(radius / 3**0.5, rel=0.05)  # uniform
    layer = ActiveShift2d(3)
    before = layer.offsets.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.offsets, before)
    assert torch.equal(layer.displacement, layer.positions)  # counted from no shift
    image = torch.randn(1, 3, 4, 5)
    assert torch.equal(ActiveShift2d(3, radius=0)(image), image)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_its_weight_is_never_trained(make):
    net = nn.Sequential(ActiveShift2d(4), nn.Conv2d(4, 2, 1)).requires_grad_(False).requires_grad_()
    assert [name for name, _ in net.named_parameters()] == ["0.offsets", "1.weight", "1.bias"]
    assert list(net.state_dict()) == ["0.offsets", "1.weight", "1.bias"]
    optimizer = make(net.parameters(), lr=0.1, weight_decay=0.5)
    before = net[0].offsets.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 4, 5, 6)).square().sum().backward()
        optimizer.step()
    assert torch.equal(net[0].weight, torch.ones(4, 1, 1, 1))
    assert not torch.equal(net[0].offsets, before)


def test_it_leaves_the_meta_device_whole():
    with torch.device("meta"):
        layer = ActiveShift2d(3)
    assert layer.weight.is_meta
    assigned = copy.deepcopy(layer)
    layer.to_empty(device="cpu")
    assert torch.equal(layer.weight, torch.ones(3, 1, 1, 1))
    assert 0 < layer.offsets.abs().max() < 1
    assigned.load_state_dict(layer.state_dict(), assign=True)
    image = torch.randn(1, 3, 4, 5)
    assert torch.equal(assigned(image), layer(image))
    half = layer.to(torch.bfloat16)
    assert (half.weight.dtype, half.offsets.dtype) == (torch.bfloat16, torch.float32)
    assert half(image.bfloat16()).dtype == torch.bfloat16


def test_it_is_no_conversion_and_says_what_is_wrong():
    for make in (ActiveShift2d.adopt, ActiveShift2d.from_conv2d, ActiveShift2d.from_positions):
        with pytest.raises(TypeError, match="built by ActiveShift2d"):
            make(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"`radius` \(=-1\)"):
        ActiveShift2d(3, radius=-1)
    with pytest.raises(ValueError, match="`backend`"):
        ActiveShift2d(3, backend="fast")
    assert repr(ActiveShift2d(3)) == "ActiveShift2d(3)"
    text = repr(ActiveShift2d(3, (2, 1), radius=0.5, backend="dense"))
    assert text == "ActiveShift2d(3, stride=(2, 1), radius=0.5, backend='dense')"


@pytest.mark.parametrize("stride", [(1, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("spread", [0.9, 4.0])
def test_it_folds_into_one_depthwise_convolution_exactly(stride, spread):
    layer, image = shift_of(6, stride, spread), torch.randn(2, 6, 9, 11, dtype=torch.float64)
    folded = layer.fold()
    assert type(folded) is nn.Conv2d
    assert (folded.groups, folded.bias) == (6, None)
    assert not folded.weight.requires_grad
    assert max(folded.kernel_size) <= 2 * math.ceil(spread) + 1
    assert_close(folded(image), shifted(image, layer.offsets.view(-1, 2), stride), 1e-10)


def test_whole_shifts_move_pixels():
    layer, image = shift_of(2), torch.randn(1, 2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.offsets.copy_(torch.tensor([1.2, -1.7, -0.6, 0.1]))
    round_acu(layer)
    expected = torch.stack((F.pad(image, (2, 0, 0, 1))[0, 0, 1:, :6], F.pad(image, (0, 0, 1, 0))[0, 1, :5]))
    assert torch.equal(layer(image)[0], expected)
    assert torch.equal(layer.fold()(image)[0], expected)


def block(channels=4, out=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 1), ActiveShift2d(8), nn.ReLU(), nn.Conv2d(8, out, 1)).double()


def test_surgery_reports_and_folds_it_and_converts_only_the_rest():
    net, image = nn.Sequential(block(), nn.Conv2d(3, 2, 3)).double(), torch.randn(2, 4, 9, 7, dtype=torch.float64)
    shift, expected = net[0][1], net(image)
    convert_to_acu(net)
    assert [type(layer) for layer in (net[0][1], net[1])] == [ActiveShift2d, ACUConv2d]
    row = report_acu(net, (4, 9, 7)).converted[0]
    assert (row.name, row.kind, row.added, row.macs) == ("0.1", "ActiveShift2d", 16, 8)
    assert_close(net(image), expected)
    fold_acu(net, image)
    assert isinstance(shift, nn.Conv2d)
    assert not isinstance(shift, ACUConv2d)
    assert_close(net(image), expected, 1e-10)
    assert "0.1.weight" in net.state_dict()


def test_positions_and_whole_models_are_saved(tmp_path):
    net, other = block(), block()
    load_acu_state_dict(other, acu_state_dict(net))
    assert torch.equal(other[1].offsets, net[1].offsets)
    other.load_state_dict(net.state_dict())
    image = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    assert torch.equal(other(image), net(image))
    torch.save(net, tmp_path / "net.pt")
    assert torch.equal(torch.load(tmp_path / "net.pt", weights_only=False)(image), net(image))
    assert torch.equal(copy.deepcopy(net)(image), net(image))


class ShiftNet(nn.Sequential):
    """A shift and a 3x3 convolution, which timm builds by name."""

    def __init__(self, num_classes=2, in_chans=3, **_):
        super().__init__(ActiveShift2d(in_chans), nn.Conv2d(in_chans, num_classes, 3), nn.AdaptiveAvgPool2d(1))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_save_acu_keeps_the_shifts_that_an_architecture_has_by_itself(tmp_path, monkeypatch, suffix):
    builders = timm.models._registry._model_entrypoints
    monkeypatch.setitem(builders, "shift_net", lambda pretrained=False, **arguments: ShiftNet(**arguments))
    net = convert_to_acu(ShiftNet(4))
    nn.init.uniform_(net[1].offsets, -1, 1)
    save_acu(net, tmp_path / f"net{suffix}", name="shift_net", num_classes=4)
    loaded, image = load_acu(tmp_path / f"net{suffix}"), torch.randn(2, 3, 8, 9)
    assert [type(loaded[0]), type(loaded[1])] == [ActiveShift2d, ACUConv2d]
    assert torch.equal(loaded(image), net(image))


def test_it_learns_a_shift_and_ends_on_whole_pixels():
    torch.manual_seed(1)
    target = torch.tensor([[2.0, -1.0], [-1.0, 0.0]])
    layer = ActiveShift2d(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    trainer = PositionTrainer(optimizer, layer, multiplier=0.05, warmup_steps=3, total_steps=120, round_at=0.8)
    # Smooth images, so that a shift's gradient says where the target is.
    images = F.avg_pool2d(torch.randn(8, 2, 28, 28), 9, 1)
    goal = acu_conv2d(images, torch.ones(2, 1, 1, 1), target[:, None], groups=2)
    start = layer.offsets.detach().clone()
    for step in range(120):
        if step == 3:
            assert torch.equal(layer.offsets, start)  # the warm-up
        optimizer.zero_grad()
        F.mse_loss(layer(images), goal).backward()
        optimizer.step()
        if step == 3:  # unit gradients: every channel moves by the rate, as the authors' code has it
            moved = (layer.offsets - start).view(-1, 2).norm(dim=1)
            assert_close(moved, torch.full_like(moved, 0.05), 1e-5)
    assert trainer.rounded
    assert torch.equal(layer.offsets.view(-1, 2), target)
    assert torch.equal(layer.fold()(images), goal)


def test_shifts_are_not_rounded_to_dilations():
    model = nn.Sequential(ACUConv2d(3, 4, 3), nn.Sequential(ActiveShift2d(4), nn.Conv2d(4, 2, 1)))
    nn.init.uniform_(model[0].offsets, -0.4, 0.4)
    before = copy.deepcopy(model.state_dict())
    message = r"1\.0: it has one tap, a shift, which no dilation keeps; round to whole pixels .*`exclude_modules`"
    with pytest.raises(ValueError, match=message):
        round_acu(model, to="dilation")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        PositionTrainer(optimizer, model, round_to="dilation", round_at=5)
    assert len(optimizer.param_groups) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_trains_under_lightning(tmp_path):
    module = TinyModule()
    module.net.insert(0, ActiveShift2d(module.net[0].in_channels))
    layer = module.net[0]
    start = layer.offsets.detach().clone()
    fit(module, [PositionLRSchedule(warmup_steps=2), RoundThenFinetune(at_fraction=0.5)], tmp_path, max_steps=6)
    assert not torch.equal(layer.offsets, start)
    assert torch.equal(layer.offsets, layer.offsets.round())
    assert torch.equal(layer.weight, torch.ones_like(layer.weight))


def test_the_compiled_kernels_run_it_channel_by_channel(monkeypatch):
    layer, image = ActiveShift2d(16), torch.randn(2, 16, 12, 13)
    kernels = backends.BACKENDS["cython"]._channelwise
    ran, forward = [], kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *arguments: ran.append(1) or forward(*arguments))
    layer(image).sum().backward()
    assert ran == [1]
