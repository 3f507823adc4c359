"""``lightning-acu report`` and ``lightning-acu export``: what they print and write, and their errors in one line."""

import sys
import warnings

import pytest
import torch
from helpers.oracle import assert_close
from helpers.tiny import TinyModule, fit
from torch import nn

from lightning_acu import ImageClassifier, acu_layers
from lightning_acu.callbacks import ConvertToACU
from lightning_acu.cli import main
from lightning_acu.saving import save_acu

# ImageClassifier could validate; here it only has to be saved.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")]


class Theirs(TinyModule):
    """Somebody's LightningModule, which knows nothing of active convolutions."""

    def __init__(self):
        super().__init__(convert=False)

    def forward(self, images):
        return self.net(images).mean((2, 3))


def move(model):
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.7, 0.7)
        if layer.fixed_tap is not None:
            layer.offsets.data.view(layer.position_groups, -1, 2)[:, layer.fixed_tap] = 0
    return model.eval()


@pytest.fixture
def classifier(tmp_path):
    """A trained ImageClassifier and its checkpoint."""
    module = ImageClassifier("test_resnet", num_classes=3, in_chans=2, convert={"kernel_sizes": [3]})
    trainer = fit(module, [], tmp_path, max_steps=2)
    move(module)
    trainer.save_checkpoint(tmp_path / "classifier.ckpt")
    return module, tmp_path / "classifier.ckpt"


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A trained module that ConvertToACU converted, its checkpoint, and a package that has its class."""
    module = Theirs()
    trainer = fit(module, [ConvertToACU(position_groups=1)], tmp_path, max_steps=2)
    move(module)
    trainer.save_checkpoint(tmp_path / "theirs.ckpt")
    monkeypatch.setitem(sys.modules, "their_package", sys.modules[__name__])
    return module, tmp_path / "theirs.ckpt"


def fails(capsys, *arguments):
    """What a command that exits with 2 writes to stderr."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert "Traceback" not in written.err
    return written.err


def output(capsys, *arguments):
    main(list(map(str, arguments)))
    written = capsys.readouterr()
    assert written.err == ""
    return written.out


def test_report_counts_layers_and_arithmetic(capsys):
    text = output(capsys, "report", "--model", "resnet18", "--input_size", 3, 64, 64)
    assert "ResNet: 16 of 20 convolutions active, 288 parameters added" in text
    assert "layer1.0.conv1" in text
    assert "kernel size 7x7 not among kernel_sizes=[3, 5]" in text
    assert "MMACs at 3x64x64 before" in text
    macs = sum(_macs(row) for row in _resnet18(64))
    assert f"convolutions: {macs / 1e6:.4g} MMACs" in text


def _resnet18(size):
    """(C_in, C_out, kernel, output size) of every convolution of ResNet-18, written down by hand."""
    size //= 4
    rows = [(3, 64, 7, 2 * size)] + [(64, 64, 3, size)] * 4
    for width in (128, 256, 512):
        size //= 2
        rows += [(width // 2, width, 3, size), (width // 2, width, 1, size)] + [(width, width, 3, size)] * 3
    return rows


def _macs(row):
    c_in, c_out, kernel, size = row
    return c_in * c_out * kernel**2 * size**2


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "squeezenet1_1"])
def test_report_takes_torchvisions_names_bare_and_with_their_prefix(capsys, name):
    text = output(capsys, "report", "--model", name, "--input_size", 3, 64, 64, "--kernel_sizes", 3)
    assert "SqueezeNet: 9 of 26 convolutions active" in text


def test_report_takes_the_arguments_of_a_conversion(capsys):
    small = ["report", "--model", "resnet18", "--input_size", 3, 64, 64]
    text = output(capsys, *small, "--kernel_sizes", 7, "--position_groups", 2)
    assert f"1 of 20 convolutions active, {2 * 49 * 2} parameters added" in text
    text = output(capsys, *small, "--target_modules", r"layer[12]\..*", "--exclude_modules", r".*\.conv2")
    assert "4 of 20 convolutions active" in text
    assert "5 of" not in text
    text = output(capsys, *small, "--preset", "C23", "--every")
    assert "12 of 20 convolutions active" in text
    assert text.count("in the first stage, which preset='C23' leaves") == 4


def test_report_of_positions_for_each_channel_says_what_stays_plain(capsys):
    main(["report", "--model", "test_efficientnet", "--position_groups", "channels"])
    shown = capsys.readouterr()
    assert "2 of 17 convolutions active" in shown.out
    assert "4 of 6 selected convolutions of EfficientNet stay plain" in shown.err
    assert "position_groups='channels' needs a depthwise convolution" in shown.out


@pytest.mark.filterwarnings("ignore::lightning_acu.surgery.NoEffectWarning")
def test_report_of_a_model_without_anything_to_convert(capsys):
    main(["report", "--model", "mixer_s32_224", "--input_size", "3", "224", "224"])
    shown = capsys.readouterr()
    assert "0 of 1 convolutions active, 0 parameters added" in shown.out
    assert "kernel size 32x32 not among" in shown.out
    assert "converted nothing in MlpMixer" in shown.err


def test_report_says_that_a_conversion_has_no_effect(capsys):
    main(["report", "--model", "test_resnet", "--target_modules", "nothing"])
    assert "not among target_modules" in capsys.readouterr().err
    main(["report", "--model", "test_resnet", "--exclude_modules", "lay1.*"])
    assert "`exclude_modules`: 'lay1.*' matches no convolution" in capsys.readouterr().err


def test_report_of_checkpoints(capsys, classifier, tmp_path):
    module, path = classifier
    save_acu(module.model, tmp_path / "net.safetensors")
    active, every = sum(1 for _ in acu_layers(module)), sum(isinstance(m, nn.Conv2d) for m in module.modules())
    for file in (path, tmp_path / "net.safetensors"):
        text = output(capsys, "report", "--ckpt", file, "--input_size", 2, 33, 40)
        assert f"ResNet: {active} of {every} convolutions active" in text
        assert "MMACs at 2x33x40 before" in text


def test_report_of_a_module_that_a_callback_converted(capsys, theirs):
    text = output(
        capsys, "report", "--ckpt", theirs[1], "--class_path", "their_package.Theirs", "--input_size", 2, 9, 8
    )
    assert "Theirs: 2 of 2 convolutions active" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet_18"], "did you mean 'resnet18'"),
        (["--model", "torchvision/resnet81"], "'torchvision/resnet18'"),
        (["--model", "test_resnet", "--target_modules", "layer("], "`target_modules` (='layer(') is not a regular"),
        (["--model", "test_resnet", "--exclude_modules", "*"], "`exclude_modules` (='*')"),
        (["--model", "test_resnet", "--kernel_sizes", "0"], "`kernel_sizes` has 0"),
        (["--model", "test_resnet", "--position_groups", "0"], "`position_groups` (=0)"),
        (["--model", "test_resnet", "--preset", "C24"], "`preset` (='C24') must be 'all' or 'C23'; did you mean"),
        (["--model", "test_resnet", "--input_size", "4", "32", "32"], "`input_size` (=(4, 32, 32))"),
        (["--model", "test_resnet", "--input_size", "3", "0", "32"], "`input_size` (=(3, 0, 32))"),
        (["--ckpt", "no_such.ckpt"], "no_such.ckpt does not exist or is not a file"),
        (["--model", "resnet18", "--ckpt", "no_such.ckpt"], "not allowed with"),
        (["--model", "resnet18", "--kernel", "3"], "--kernel"),
        ([], "--model"),
        (["--model", "resnet18.no_such_tag"], "no_such_tag"),
        (["--ckpt", "other.ckpt"], "size mismatch"),
        (["--ckpt", "net.pt", "--kernel_sizes", "3"], "--kernel_sizes"),
    ],
)  # fmt: skip
def test_report_says_what_is_wrong_in_one_line(capsys, tmp_path, monkeypatch, classifier, arguments, message):
    monkeypatch.chdir(tmp_path)
    save_acu(classifier[0].model, "net.pt")
    checkpoint = torch.load(classifier[1], weights_only=False)
    checkpoint["hyper_parameters"]["num_classes"] = 4
    torch.save(checkpoint, "other.ckpt")
    assert message in fails(capsys, "report", *arguments)


def exported(path, images):
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def test_export_of_an_image_classifiers_checkpoint(capsys, classifier):
    module, path = classifier
    text = output(capsys, "export", "--ckpt", path, "--to", "pt2", "--input_size", 2, 33, 40)
    file = path.with_suffix(".pt2")
    assert text.startswith(f"{file}: ")
    assert "images (N, 2, 33, 40); differs from the model by" in text
    images = torch.randn(3, 2, 33, 40)
    with torch.no_grad():
        assert_close(exported(file, images), module(images), 1e-4)


def test_export_to_onnx(capsys, classifier, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, path = classifier
    file = tmp_path / "other" / "net.onnx"
    text = output(
        capsys, "export", "--ckpt", path, "--to", "onnx", "--output", file, "--input_size", 2, 33, 40, "--one_image"
    )
    assert f"{file}: " in text
    assert "images (1, 2, 33, 40)" in text
    images = torch.randn(1, 2, 33, 40)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(scores), module(images), 1e-4)
    assert "`fold`=False" in fails(capsys, "export", "--ckpt", path, "--to", "onnx", "--no_fold")


def test_report_prices_the_forms_of_a_fold(capsys):
    arguments = ("report", "--model", "test_resnet", "--input_size", 3, 32, 32)
    assert "cheapest fold" not in output(capsys, *arguments)
    assert "cheapest fold" in output(capsys, *arguments, "--forms")


def test_export_in_a_form_and_of_any_size(capsys, classifier, tmp_path):
    module, path = classifier
    file = tmp_path / "net.torchscript"
    text = output(
        capsys, "export", "--ckpt", path, "--to", "torchscript", "--form", "shifts", "--output", file, "--dynamic_size",
        "--input_size", 2, 33, 40,
    )  # fmt: skip
    assert "images (N, 2, H, W); differs from the model by" in text
    images = torch.randn(2, 2, 47, 36)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        assert_close(torch.jit.load(file)(images), module(images), 1e-4)
    assert "invalid choice: 'one'" in fails(capsys, "export", "--ckpt", path, "--to", "pt2", "--form", "one")


def test_export_of_a_module_that_a_callback_converted(capsys, theirs, tmp_path):
    module, path = theirs
    arguments = ["export", "--ckpt", path, "--class_path", "their_package.Theirs", "--to", "pt2"]
    arguments += ["--input_size", 2, 9, 8]
    images = torch.randn(3, 2, 9, 8)
    for extra in ([], ["--no_fold"]):
        output(capsys, *arguments, *extra, "--output", tmp_path / "net.pt2")
        with torch.no_grad():
            assert_close(exported(tmp_path / "net.pt2", images), module(images), 1e-4)
        offsets = any("offsets" in name for name in torch.export.load(tmp_path / "net.pt2").state_dict)
        assert offsets is bool(extra)


def test_export_of_a_file_of_save_acu(capsys, classifier, tmp_path):
    model = classifier[0].model
    save_acu(model, tmp_path / "net.pt")
    output(capsys, "export", "--ckpt", tmp_path / "net.pt", "--to", "pt2", "--input_size", 2, 33, 40)
    images = torch.randn(1, 2, 33, 40)
    with torch.no_grad():
        assert_close(exported(tmp_path / "net.pt2", images), model(images), 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "none.ckpt"], "none.ckpt does not exist or is not a file"),
        (["--ckpt", "none.pt"], "none.pt does not exist or is not a file"),
        (["--ckpt", "weights.ckpt"], "weights.ckpt is not a Lightning checkpoint"),
        (["--ckpt", "weights.pt"], "was not written by save_acu"),
        (["--ckpt", "junk.pt"], "is damaged or was not written by save_acu"),
        (["--ckpt", "notes.txt"], "must end in .safetensors, .pt, .pth"),
        (["--ckpt", "theirs.ckpt", "--class_path", "Theirs"], "give package.Class"),
        (["--ckpt", "theirs.ckpt", "--class_path", "no_such_package.Theirs"], "cannot be imported: No module named"),
        (["--ckpt", "theirs.ckpt", "--class_path", "lightning_acu.ACUConv2d"], "is not a LightningModule"),
        (["--ckpt", "theirs.ckpt", "--class_path", "their_package.Theirs", "--input_size", "5", "9", "8"], "5 chan"),
        (["--ckpt", "junk.ckpt"], "junk.ckpt"),
        (["--ckpt", "theirs.ckpt"], "--class_path"),
    ],
)  # fmt: skip
def test_export_says_what_is_wrong_in_one_line(capsys, tmp_path, monkeypatch, theirs, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("junk.pt", "junk.ckpt", "notes.txt"):
        (tmp_path / name).write_text("junk")
    for name in ("weights.pt", "weights.ckpt"):
        torch.save({"weight": torch.zeros(2)}, name)
    assert message in fails(capsys, "export", *arguments, "--to", "pt2")
    assert not list(tmp_path.glob("*.pt2"))


def test_export_in_a_size_that_the_model_asserts_against(capsys, tmp_path):
    model = ImageClassifier("coat_lite_tiny", num_classes=3, convert={}).model
    save_acu(move(model), tmp_path / "net.pt")
    message = fails(capsys, "export", "--ckpt", tmp_path / "net.pt", "--to", "pt2", "--input_size", 3, 65, 70)
    assert "height (65)" in message


def test_export_knows_its_formats(capsys, tmp_path):
    assert "invalid choice: 'tflite'" in fails(capsys, "export", "--ckpt", tmp_path / "net.pt", "--to", "tflite")
