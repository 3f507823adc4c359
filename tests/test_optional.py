"""What works without the packages that only parts of this one need; each in a process that cannot import them."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

#: Whatever is installed besides torch, NumPy and what torch itself needs.
OPTIONAL = (
    "huggingface_hub",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "mlxtend",
    "rich",
    "safetensors",
    "scipy",
    "timm",
    "torchmetrics",
)

CORE = """
# The operator.
x, weight, offsets = torch.randn(1, 2, 6, 7), torch.randn(4, 2, 3, 3), torch.zeros(9, 2)
torch.testing.assert_close(lightning_acu.acu_conv2d(x, weight, offsets), nn.functional.conv2d(x, weight))

# The layers.
layer = lightning_acu.ACUConv2d(2, 4, 3, position_groups=2)
layer(x).sum().backward()
free = lightning_acu.ACUConv2d.from_positions(2, 4, [(0, 0.5), (1, -1)])
torch.testing.assert_close(free.fold()(x), free(x))

# Surgery.
net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 5), nn.ConvTranspose2d(4, 4, 2)).double()
x = torch.randn(2, 3, 12, 13, dtype=torch.float64)
expected, plain = net(x), copy.deepcopy(net.state_dict())
lightning_acu.convert_to_acu(net, exclude_modules=["2"])
torch.testing.assert_close(net(x), expected)
report = lightning_acu.report_acu(net, (3, 12, 13))
assert [row.name for row in report.converted] == ["0"]
nn.init.uniform_(net[0].offsets, -0.7, 0.7)
torch.testing.assert_close(lightning_acu.fold_acu(copy.deepcopy(net))(x), net(x))
lightning_acu.fold_acu(lightning_acu.round_acu(copy.deepcopy(net), separate=False))

# Positions alone, and a state_dict of a plain model.
twin = copy.deepcopy(net)
twin[0].reset_parameters()
lightning_acu.load_acu_state_dict(twin, lightning_acu.acu_state_dict(net))
assert torch.equal(twin[0].positions, net[0].positions)
net[0].reset_parameters()
warnings.simplefilter("ignore")
net.load_state_dict(plain)
torch.testing.assert_close(net(x), expected)

# Taps that do not meet are rounded without SciPy, and names of modules are found.
lightning_acu.round_acu(lightning_acu.convert_to_acu(nn.Sequential(nn.Conv2d(1, 1, 3))), separate=True)
lightning_acu.surgery, lightning_acu.functional

# The runner of scripts can be imported, and watches what there is.
import lightning_acu.integrations.run
with lightning_acu.integrations.run.ScriptWatch():
    pass
"""

TORCHVISION = """
import torchvision
model = torchvision.models.resnet18(num_classes=2).eval()
x = torch.randn(1, 3, 40, 48)
expected = model(x)
lightning_acu.convert_to_acu(model, preset="C23")
torch.testing.assert_close(model(x), expected)
assert len(lightning_acu.report_acu(model).converted) == 12
for _, layer in lightning_acu.acu_layers(model):
    nn.init.uniform_(layer.offsets, -0.4, 0.4)
expected = model(x)
torch.testing.assert_close(lightning_acu.fold_acu(copy.deepcopy(model))(x), expected, rtol=1e-3, atol=1e-4)
named = lightning_acu.create_model("torchvision/resnet18", num_classes=2)
assert named.fc.out_features == 2
"""


def run(code, blocked):
    """``code`` in a process of its own that cannot import ``blocked``; what it prints."""
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))"
    setting = "import copy, warnings, torch, lightning_acu; from torch import nn"
    done = subprocess.run([sys.executable, "-c", f"{block}\n{setting}\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_operator_layers_and_surgery_work_with_torch_and_numpy_alone():
    run(CORE, (*OPTIONAL, "torchvision"))


def test_surgery_on_torchvisions_models_needs_no_timm():
    run(TORCHVISION, OPTIONAL)


def test_saving_a_model_of_torchvision_needs_no_timm(tmp_path):
    code = f"""
model = lightning_acu.convert_to_acu(lightning_acu.create_model("torchvision/resnet18", num_classes=2)).eval()
lightning_acu.save_acu(model, {str(tmp_path / "model.safetensors")!r}, name="torchvision/resnet18", num_classes=2)
x = torch.randn(1, 3, 40, 48)
assert torch.equal(lightning_acu.load_acu({str(tmp_path / "model.safetensors")!r})(x), model(x))
"""
    run(code, tuple(set(OPTIONAL) - {"safetensors"}))


def test_training_a_model_of_torchvision_needs_no_timm():
    code = """
from lightning_acu.callbacks import ConvertToACU, OffsetLogger, PositionLRSchedule, RoundThenFinetune
module = lightning_acu.ImageClassifier("torchvision/resnet18", num_classes=2, convert={"preset": "C23"})
assert len(list(lightning_acu.acu_layers(module))) == 12
lightning_acu.data.DigitsDataModule()
try:
    lightning_acu.data.ImageFolderDataModule("images")
except ModuleNotFoundError as error:
    print(error)
"""
    message = "ImageFolderDataModule needs timm, which is not installed: pip install timm"
    assert run(code, ("timm",)).splitlines()[-1] == message


ERRORS = {
    "create_model('resnet18')": "ModuleNotFoundError: `name` (='resnet18', a name of timm's; those of torchvision "
    "begin with 'torchvision/') needs timm, which is not installed: pip install timm",
    "create_model('torchvision/resnet81')": "ValueError: `model` (='torchvision/resnet81') is neither",
    "round_acu(meeting, separate=True)": "ModuleNotFoundError: `separate`=True, where taps would meet on one pixel, "
    "needs scipy, which is not installed: pip install scipy",
    "report_acu(meeting).table()": "ModuleNotFoundError: a report as a table (not its rows and properties) needs rich, "
    "which is not installed: pip install rich",
    "save_acu(meeting, 'a.safetensors')": "ModuleNotFoundError: `path` (='a.safetensors') needs safetensors, which is "
    "not installed: pip install safetensors",
    "load_acu('a.safetensors')": "ModuleNotFoundError: `path` (='a.safetensors') needs safetensors, which is not",
    "push_to_hub(meeting, 'a/b')": "ModuleNotFoundError: push_to_hub needs huggingface_hub, which is not installed: "
    "pip install huggingface_hub",
    "from_pretrained('a/b')": "ModuleNotFoundError: loading from a hub needs huggingface_hub, which is not installed",
    "timm_convs": "ModuleNotFoundError: lightning_acu.timm_convs needs timm, which is not installed: pip install timm",
    "callbacks": "ModuleNotFoundError: lightning_acu.callbacks needs lightning, which is not installed: pip install",
    "ImageClassifier": "ModuleNotFoundError: lightning_acu.ImageClassifier needs lightning, which is not installed",
    "metrics": "ModuleNotFoundError: lightning_acu.metrics needs torchmetrics, which is not installed: pip install",
    "plot_shapes": "ModuleNotFoundError: lightning_acu.plot_shapes needs matplotlib, which is not installed: pip",
    "data.DigitsDataModule": "ModuleNotFoundError: lightning_acu.data needs lightning, which is not installed: pip",
}


def test_what_needs_a_package_that_is_missing_says_which():
    code = f"""
meeting = lightning_acu.convert_to_acu(nn.Sequential(nn.Conv2d(1, 1, 3)))
nn.init.constant_(meeting[0].offsets.data[:2], 1.0)
for call in {list(ERRORS)}:
    try:
        eval(f"lightning_acu.{{call}}")
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}")
"""
    lines = run(code, OPTIONAL).splitlines()
    assert len(lines) == len(ERRORS), lines
    for line, message in zip(lines, ERRORS.values(), strict=True):
        assert line.startswith(message)


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("transformers", "import lightning_acu.integrations.huggingface"),
        ("jsonargparse", "from lightning_acu.integrations.run import main; main(['train.py'])"),
    ],
)
def test_an_integration_says_which_package_is_missing(package, code):
    guarded = f"""
try:
    {code}
except ModuleNotFoundError as error:
    print(error)
"""
    message = run(guarded, (package,)).splitlines()[-1]
    assert message.endswith(f" needs {package}, which is not installed: pip install {package}")


def test_the_operator_and_the_layers_import_torch_and_numpy_alone():
    """Where everything is installed, none of it is imported."""
    code = (
        "lightning_acu.acu_conv2d, lightning_acu.ACUConv2d, lightning_acu.FoldedConv2d\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    loaded = set(run(code, ()).split())
    assert "torch" in loaded
    assert loaded.isdisjoint({*OPTIONAL, "torchvision"})
