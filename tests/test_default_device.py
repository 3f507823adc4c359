"""Every tensor that library code makes names its device and dtype: the caller's defaults do not change what it does."""

import ast
import copy
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.oracle import acu_conv2d_loops, assert_close
from helpers.tiny import loader
from torch import nn
from torch.nn import functional as F

import lightning_acu
from lightning_acu import (
    ACUConv2d,
    convert_to_acu,
    create_model,
    export_model,
    fold_acu,
    load_acu,
    model_statistics,
    plot_shapes,
    report_acu,
    round_acu,
    save_acu,
)
from lightning_acu.callbacks import ConvertToACU, OffsetLogger, PositionLRSchedule, RoundThenFinetune
from lightning_acu.data import ArrayDataModule
from lightning_acu.figures import animate_shapes, shapes_of
from lightning_acu.metrics import position_metrics
from lightning_acu.saving import acu_state_dict, load_acu_state_dict

pytestmark = pytest.mark.slow

PACKAGE = Path(lightning_acu.__file__).parent

#: torch's functions whose result is where the default device says, and in the default dtype.
MAKERS = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted",
    "empty_strided", "eye", "full", "hamming_window", "hann_window", "kaiser_window", "linspace", "logspace",
    "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip


def without_place(source):
    """(line, call) of each call of a maker that does not name both the device and the dtype."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            named = {keyword.arg for keyword in node.keywords}
            if not {"device", "dtype"} <= named:
                yield node.lineno, ast.unparse(node)


def test_the_makers_are_torchs():
    from torch.utils._device import _device_constructors

    ours = {getattr(torch, name) for name in MAKERS}
    unknown = {f.__name__ for f in _device_constructors() - ours if getattr(torch, f.__name__, None) is f}
    assert not {name for name in unknown if "sparse" not in name and "quantized" not in name and "fft" not in name}


def test_calls_without_a_place_are_seen():
    source = "import torch\ntorch.zeros(3)\ntorch.ones(2, device=d)\ntorch.eye(2, device=d, dtype=t)\nx.new_zeros(2)"
    assert [line for line, _ in without_place(source)] == [2, 3]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_tensor_that_library_code_makes_names_its_device_and_dtype(path):
    assert list(without_place(path.read_text())) == []


@pytest.fixture(params=["meta", "inference mode", "float64"])
def defaults(request):
    """What the caller has set while library code runs: another default device, inference mode, another dtype."""
    if request.param == "float64":
        torch.set_default_dtype(torch.float64)
        yield request.param
        torch.set_default_dtype(torch.float32)
    else:
        with torch.device("meta") if request.param == "meta" else torch.inference_mode():
            yield request.param


def network():
    """On the CPU in float32: a dilated layer, a free shape, one with position groups."""
    kind = {"device": "cpu", "dtype": torch.float32}
    with torch.inference_mode(False):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=2, dilation=2, **kind),
            ACUConv2d.from_positions(4, 4, [(0, 0), (0, 1), (1.5, 0)], **kind),
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, **kind),
        )


def images(*shape):
    return torch.randn(*shape, dtype=torch.float32, device="cpu", generator=torch.Generator().manual_seed(1))


@pytest.fixture
def moved(defaults):
    """A converted network whose taps are between pixels, and an image."""
    model = convert_to_acu(network(), position_groups=2)
    for layer in (model[0], model[2]):
        with torch.no_grad():
            layer.offsets.copy_(images(layer.offsets.numel()))
    return model, images(1, 3, 6, 7)


def on_the_cpu(model):
    return {(t.device.type, t.dtype) for t in (*model.parameters(), *model.buffers())} == {("cpu", torch.float32)}


def by_loops(model, x):
    for layer in model:
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        x = acu_conv2d_loops(
            x.double(), weight, layer.active_offsets().detach().double(), bias,
            stride=layer.geometry.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
        )  # fmt: skip
    return x


@pytest.mark.parametrize("backend", ["auto", "cython", "dense", "reference"])
def test_the_forward_and_backward_pass_of_each_backend(backend, moved, defaults):
    model, x = moved
    for layer in model:
        layer.backend = backend
    output = model(x)
    assert (output.device.type, output.dtype) == ("cpu", torch.float32)
    with torch.device("cpu"), torch.no_grad():
        assert_close(output.double(), by_loops(model, x), 1e-5)
    if defaults != "inference mode":
        output.square().sum().backward()
        assert all(p.grad.device.type == "cpu" and p.grad.isfinite().all() for p in model.parameters())


def test_reports_statistics_and_pictures(moved, tmp_path):
    model, _ = moved
    report = report_acu(model, (3, 11, 13))
    assert report.folded_macs > report.macs
    assert str(report)
    statistics = model_statistics(model)
    metrics = position_metrics()
    metrics.update(model)
    values = metrics.compute()
    assert {value.device.type for value in values.values()} == {"cpu"}
    assert values["max_displacement"].item() == pytest.approx(max(s.max_displacement for s in statistics.values()))
    plot_shapes(model)
    frames = [(0, shapes_of(model)), (1, shapes_of(round_acu(model)))]
    animate_shapes(frames, tmp_path / "film.gif", seconds=0.2, dpi=20)


def test_rounding_and_folding(moved, defaults):
    model, x = moved
    expected = model(x)
    folded = fold_acu(copy.deepcopy(model))
    assert on_the_cpu(folded)
    assert_close(folded(x), expected, 1e-5)
    for separate in (False, True):
        rounded = round_acu(copy.deepcopy(model), separate=separate)
        assert on_the_cpu(rounded)
        assert_close(fold_acu(copy.deepcopy(rounded))(x), rounded(x), 1e-5)


def test_positions_are_loaded(moved):
    model, x = moved
    other = convert_to_acu(network(), position_groups=2)
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    load_acu_state_dict(other, {key: value.clone() for key, value in acu_state_dict(model).items()})
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files(defaults, suffix, tmp_path):
    with torch.device("cpu"):
        model = convert_to_acu(create_model("test_resnet", num_classes=3)).float().eval()
    save_acu(model, tmp_path / f"model.{suffix}", num_classes=3)
    loaded = load_acu(tmp_path / f"model.{suffix}")
    x = images(1, 3, 32, 33)
    assert torch.equal(loaded(x), model(x))
    assert not any(parameter.is_inference() for parameter in loaded.parameters())


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_export(to, moved, tmp_path):
    model, _ = moved
    assert export_model(model, tmp_path / f"model.{to}", input_size=(3, 11, 13)) < 1e-4


@pytest.mark.parametrize("preprocessing", ["whiten", "normalize"])
def test_images_in_memory(preprocessing, defaults, tmp_path):
    pixels, labels = np.random.default_rng(0).random((12, 8, 8, 3), dtype=np.float32), np.arange(12) % 3
    np.savez(tmp_path / "data.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    data = ArrayDataModule(
        tmp_path / "data.npz", preprocessing=preprocessing, on_device=True, batch_size=4, val_size=3, crop_padding=1,
        flip=True,
    )  # fmt: skip
    data.setup()
    for load in (data.train_dataloader, data.val_dataloader, data.test_dataloader):
        for batch, label in load():
            assert (batch.device.type, batch.dtype) == ("cpu", torch.float32)
            assert (label.device.type, label.dtype) == ("cpu", torch.int64)


class Late(pl.LightningModule):
    """Builds its layers in ``configure_model``, which Lightning calls with the device as the default."""

    def configure_model(self):
        if not hasattr(self, "net"):
            # As on a GPU, where the default device is the GPU and the layers are made there; "meta" cannot train.
            self.net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, device="cpu"), nn.Conv2d(4, 3, 3, device="cpu"))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]).mean((2, 3)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_callbacks_with_a_module_that_is_built_where_the_default_device_is(tmp_path, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda self: torch.device("meta"))
    module = Late()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ConvertToACU(),
            PositionLRSchedule(multiplier=50.0, warmup_steps=2),
            RoundThenFinetune(at_fraction=0.5),
            OffsetLogger(),
        ],
    )
    trainer.fit(module, loader())
    assert on_the_cpu(module)
    assert all(torch.equal(layer.offsets, layer.offsets.round()) and layer.offsets.any() for layer in module.net)
