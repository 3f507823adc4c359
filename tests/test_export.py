"""Exported files compute what the model does, at any batch size, and are not kept where they would not."""

import builtins
import copy
import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.census_model import wake
from helpers.oracle import assert_close
from timm import create_model
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import nn

from lightning_acu import FoldedConv2d, acu_layers, convert_to_acu, fold_acu
from lightning_acu import export as export_module
from lightning_acu.export import export_model

pytestmark = pytest.mark.slow

SIZE = (2, 15, 18)
TOLERANCE = 1e-4  # float32, as export_model itself

#: Heights and widths of images for a detector, which resizes them.
DETECTED = [(120, 160), (200, 140), (160, 300)]

KINDS = {
    "dense": lambda: nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 0)),
    "dilated": lambda: nn.Conv2d(2, 4, (3, 5), padding="same", dilation=(2, 1)),
    "reflect": lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect", bias=False),
    "same": lambda: Conv2dSame(2, 4, 3, stride=2),
    "standardized": lambda: StdConv2d(2, 4, 3, padding=1),
    "scaled": lambda: ScaledStdConv2d(2, 4, 3, padding=1),
    "grouped": lambda: nn.Conv2d(2, 4, 5, padding=2, groups=2),
}


def network(kind, **arguments):
    """One convolution of a kind, active, its taps between pixels, with a batch norm and a head behind it."""
    model = nn.Sequential(KINDS[kind](), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    nn.init.uniform_(model[1].bias)
    convert_to_acu(model, kernel_sizes=[3, 5, (3, 5)], **arguments)
    with torch.no_grad():
        nn.init.uniform_(model[0].offsets, -1, 1)
        if kind == "dilated":  # so far out that the fold is a sum of small convolutions
            model[0].offsets.view(-1, 2)[0] -= 6.0
            model[0].offsets.view(-1, 2)[-1] += 5.0
    return model


def run_pt2(path, images):
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def run_onnx(path, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(output)


def run_torchscript(path, images):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)(images)


RUN = {"pt2": run_pt2, "onnx": run_onnx, "torchscript": run_torchscript}


@pytest.fixture(params=list(RUN))
def to(request):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    return request.param


def expected(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_what_the_model_does(tmp_path, to, kind):
    model, path = network(kind, position_groups=2), tmp_path / f"net.{to}"
    assert 0 <= export_model(model, path, input_size=SIZE) <= TOLERANCE
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    for batch in (1, 3):
        images = torch.randn(batch, *SIZE)
        assert_close(RUN[to](path, images), expected(model, images), TOLERANCE)


def test_the_dilated_one_is_a_sum_of_convolutions():
    assert isinstance(fold_acu(network("dilated"))[0], FoldedConv2d)


@pytest.mark.slow
def test_a_whole_network_of_its_default_size(tmp_path, to):
    model = convert_to_acu(create_model("test_efficientnet", num_classes=5, in_chans=2))
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.5, 0.5)
    assert export_model(model, tmp_path / f"net.{to}") <= TOLERANCE
    images = torch.randn(3, 2, *model.default_cfg["input_size"][1:])
    assert_close(RUN[to](tmp_path / f"net.{to}", images), expected(model, images), TOLERANCE)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_itself_stays_as_it_is(tmp_path, to, training):
    model = network("dense").train(training)
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    parameters, flags = list(model.parameters()), [module.training for module in model.modules()]
    export_model(model, tmp_path / f"net.{to}", input_size=SIZE)
    assert any(acu_layers(model))
    assert [module.training for module in model.modules()] == flags
    assert all(p is q and p.grad is None for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["dense", "reflect", "same", "standardized"])
def test_without_a_fold_the_program_keeps_the_active_operator(tmp_path, kind):
    model, path = network(kind), tmp_path / "net.pt2"
    export_model(model, path, input_size=SIZE, fold=False)
    program = torch.export.load(path)
    assert any("lightning_acu" in str(node.target) for node in program.graph.nodes)
    assert any(name.endswith("offsets") for name in program.state_dict)
    images = torch.randn(3, *SIZE)
    assert_close(run_pt2(path, images), expected(model, images), 1e-6)
    export_model(model, path, input_size=SIZE)  # over the one that is there
    assert not any("lightning_acu" in str(node.target) for node in torch.export.load(path).graph.nodes)


def test_one_image_at_a_time(tmp_path, to):
    model, path = network("dense"), tmp_path / f"net.{to}"
    export_model(model, path, input_size=SIZE, dynamic_batch=False)
    images = torch.randn(1, *SIZE)
    assert_close(RUN[to](path, images), expected(model, images), TOLERANCE)
    if to == "torchscript":  # which does not keep the size it was traced with
        return
    with pytest.raises(Exception, match=r"size\(\)\[0\] == 1|index: 0 Got: 3 Expected: 1"):
        RUN[to](path, torch.randn(3, *SIZE))


class AnySize(nn.Sequential):
    """Takes images of any size that its strides divide: fully convolutional, and a mean."""

    def __init__(self):
        convs = [nn.Conv2d(2, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding="same"), nn.AdaptiveAvgPool2d(1)]
        super().__init__(*convs, nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("form", ["auto", "single", "sum", "depthwise", "shifts"])
def test_height_and_width_can_stay_open_in_every_form(tmp_path, to, form):
    model, path = convert_to_acu(AnySize()).eval(), tmp_path / f"net.{to}"
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1.2, 1.2)
    assert export_model(model, path, input_size=SIZE, form=form, dynamic_size=True) <= TOLERANCE
    for size in ((1, 2, 15, 18), (3, 2, 40, 22)):
        images = torch.randn(size)
        assert_close(RUN[to](path, images), expected(model, images), TOLERANCE)
    if to == "onnx":
        import onnxruntime

        (input,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_inputs()
        assert (input.name, input.shape) == ("images", ["batch", 2, "height", "width"])


def test_the_batch_has_its_name_and_other_axes_their_numbers(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_model(network("dense"), tmp_path / "net.onnx", input_size=SIZE)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", *SIZE]
    assert session.get_outputs()[0].shape[:2] == ["batch", 3]


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4 * 13 * 16, 3)

    def forward(self, images):
        return self.head(self.conv(images).flatten(1))


def test_a_model_of_one_size_says_so(tmp_path):
    model = convert_to_acu(OneSize())
    with pytest.raises(ValueError, match=r"`dynamic_size` .*OneSize does not take such images: .*leave `dynamic_size`"):
        export_model(model, tmp_path / "net.pt2", input_size=SIZE, dynamic_size=True)
    assert export_model(model, tmp_path / "net.pt2", input_size=SIZE) <= TOLERANCE


def test_the_largest_difference_over_all_images_is_returned(tmp_path, monkeypatch):
    write, seen = export_module._WRITERS["pt2"], []

    def write_with_a_small_error(*arguments):
        run = write(*arguments)

        def wrong(images):
            seen.append(tuple(images.shape))
            return [output + (5e-5 if len(seen) == 2 else 0) * output.abs().max() for output in run(images)]

        return wrong

    monkeypatch.setitem(export_module._WRITERS, "pt2", write_with_a_small_error)
    worst = export_model(network("dense"), tmp_path / "net.pt2", input_size=SIZE)
    assert 4e-5 < worst < 6e-5
    assert seen == [(2, *SIZE), (3, *SIZE), (2, *SIZE), (1, *SIZE)]


def test_outputs_without_a_number_are_refused(tmp_path):
    model = network("dense")
    model[3].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"output 0 of Sequential is NaN everywhere"):
        export_model(model, tmp_path / "net.pt2", input_size=SIZE)
    assert not list(tmp_path.iterdir())


def test_a_detector_says_how_it_is_exported(tmp_path):
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = convert_to_acu(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3))
    with pytest.raises(ValueError, match=r"SSD detects objects: .*torchvision's own way to ONNX"):
        export_model(model, tmp_path / "net.onnx", input_size=(3, 320, 320))


@pytest.mark.filterwarnings("ignore")  # of torch's former exporter, which torchvision's detectors need
def test_a_folded_detector_by_torchvisions_own_way_finds_what_the_active_one_does(tmp_path):
    """By the call that the error above names; scores are compared, since objects of equal scores may change places."""
    import onnxruntime
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(1)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    wake(model)
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(n)) for n, size in enumerate(DETECTED)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.backbone(model.transform(images)[0].tensors)  # norms see images
    convert_to_acu(model.eval())
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    path = tmp_path / "model.onnx"
    with torch.no_grad():
        expected = [model([image])[0] for image in images]
        fold_acu(model)
        torch.onnx.export(
            model, ([images[0]],), path, dynamo=False, opset_version=17, input_names=["image"],
            dynamic_axes={"image": {1: "height", 2: "width"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for image, found in zip(images, expected, strict=True):
        boxes, scores, labels = session.run(None, {"image": image.numpy()})
        assert len(boxes) == len(labels) == len(found["boxes"]) > 50
        torch.testing.assert_close(torch.from_numpy(scores), found["scores"], rtol=0, atol=1e-4)


def test_the_format_can_be_another_than_the_ending_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "net.model"
    export_model(network("dense"), path, to="pt2", input_size=SIZE)
    images = torch.randn(1, *SIZE)
    with path.open("rb") as file:
        assert torch.export.load(file).module()(images).shape == (1, 3, 8, 16)


def test_a_plain_or_folded_model_is_exported_as_well(tmp_path, to):
    model = network("dense")
    images, path = torch.randn(1, *SIZE), tmp_path / f"net.{to}"
    before = expected(model, images)
    export_model(fold_acu(model), path, input_size=SIZE, fold=False)
    assert_close(RUN[to](path, images), before, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("net.tflite", {}, r"`to` \(='tflite'\) must be 'onnx', 'pt2', 'torchscript' .*net\.tflite"),
        ("net", {}, r"`to` \(=''\) must be"),
        ("net.pt2", {"to": "mlmodel"}, r"`to` \(='mlmodel'\)"),
        ("net.pt2", {"form": "one"}, r"`form` \(='one'\) must be 'auto', "),
        ("net.onnx", {"fold": False}, r"`fold`=False: onnx has no active convolution"),
        ("net.torchscript", {"fold": False}, r"`fold`=False: torchscript has no active convolution"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_nothing_written(tmp_path, name, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_model(network("dense"), tmp_path / name, input_size=SIZE, **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path, monkeypatch, missing):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name in ("onnx", "onnxruntime", "onnxscript"):
            if name == missing:
                raise ImportError(f"No module named {name!r}")
            return None
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=rf"needs the package {missing}; .*'lightning_acu\[onnx\]'"):
        export_model(network("dense"), tmp_path / "net.onnx", input_size=SIZE)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


class DependsOnValues(nn.Module):
    """Two branches, by the numbers in the image: no graph holds that."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, images):
        return self.conv(images) if images.sum() > 0 else self.conv(-images)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_model_that_cannot_be_exported_says_so_and_leaves_nothing(tmp_path, to, dynamic):
    model = convert_to_acu(DependsOnValues())
    # A trace holds one of the branches: the file is found to be wrong.
    message = "would differ" if to == "torchscript" else f"DependsOnValues cannot be exported to {to}: "
    with pytest.raises(RuntimeError, match=message) as caught:
        export_model(model, tmp_path / f"net.{to}", input_size=SIZE, dynamic_batch=dynamic)
    assert to == "torchscript" or ("try `dynamic_batch`=False" in str(caught.value)) is dynamic
    assert not list(tmp_path.iterdir())


def test_a_model_without_parameters_is_exported_too(tmp_path):
    assert export_model(nn.AvgPool2d(3), tmp_path / "net.pt2", input_size=SIZE) <= TOLERANCE


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, images):
        features = self.conv(images)
        return {"features": features, "mean": [features.mean((2, 3))]}


WRONG = {
    "values": lambda outputs: [outputs[0], outputs[1] * 1.001],
    "shape": lambda outputs: [outputs[0], outputs[1][:, :3]],
    "nan": lambda outputs: [outputs[0], outputs[1] * float("nan")],
    "fewer": lambda outputs: outputs[:1],
}


@pytest.mark.parametrize(
    "wrong",
    [
        "values",
        "shape",
        "nan",
        "fewer",
    ],
)
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, wrong):
    write = export_module._WRITERS["pt2"]

    def write_wrong(*arguments):
        run = write(*arguments)
        return lambda images: WRONG[wrong](run(images))

    model, path = convert_to_acu(TwoOutputs()), tmp_path / "net.pt2"
    path.write_bytes(b"of before")
    monkeypatch.setitem(export_module._WRITERS, "pt2", write_wrong)
    with pytest.raises(RuntimeError, match=r"net.pt2 would (differ from|give 1 outputs,) the model"):
        export_model(model, path, input_size=SIZE)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    assert path.read_bytes() == b"of before"
    monkeypatch.undo()
    assert export_model(model, path, input_size=SIZE) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_exported_layers_equal_the_eager_ones(kind):
    torch._dynamo.reset()
    model, images = network(kind).double(), torch.randn(3, *SIZE, dtype=torch.float64)
    eager, compiled = copy.deepcopy(model), torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = [compiled(images), eager(images)]
    for output in outputs:
        output.square().sum().backward()
    assert_close(*outputs)
    for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert_close(other.grad, parameter.grad)
    program = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert_close(program.module()(images[:2]), model(images[:2]))


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def part_of_a_file(program, f=None, **kwargs):
    Path(f).write_bytes(b"a part")
    try:
        no_space()
    except OSError as error:  # as its exporter does with errors of all kinds
        raise RuntimeError("Failed to export the model to ONNX") from error


@pytest.mark.parametrize("earlier", [True, False], ids=["replaces one", "is new"])
@pytest.mark.parametrize(
    ("to", "writer", "full"),
    [
        ("onnx", "torch.onnx.ONNXProgram.save", part_of_a_file),
        ("pt2", "pathlib.Path.write_bytes", no_space),
        ("pt2", "os.fsync", no_space),
    ],
)
def test_a_full_disk_is_named_and_an_earlier_file_stays(tmp_path, monkeypatch, to, writer, full, earlier):
    path = tmp_path / f"model.{to}"
    if earlier:
        path.write_text("an earlier one")
    model = network("dense")
    with monkeypatch.context() as patch:
        patch.setattr(writer, full)
        with pytest.raises(OSError, match=r"No space left on device.*model") as caught:
            export_model(model, path, input_size=SIZE)
    assert caught.value.errno == errno.ENOSPC
    assert "dynamic_batch" not in str(caught.value)
    assert list(tmp_path.iterdir()) == ([path] if earlier else [])
    assert not earlier or path.read_text() == "an earlier one"


FULL = """
import os, resource, torch
from torch import nn
from lightning_acu import convert_to_acu, export_model
model = convert_to_acu(nn.Sequential(nn.Conv2d(3, 64, 3)))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    export_model(model, "model.pt2", input_size=(3, 9, 9))
except OSError as error:
    print(error.filename, os.listdir())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits files as Linux does")
def test_a_full_disk_does_not_end_the_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (0, "model.pt2 []\n"), done.stderr
