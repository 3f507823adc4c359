"""Help, short errors, and a LightningModule of one's own from the current folder, as separate processes see them."""

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.caffe_file import encoded, layers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lightning_acu import __version__, acu_layers, create_model, load_acu
from lightning_acu.cli import main
from lightning_acu.cli.commands import COMMANDS
from lightning_acu.cli.completion import _all_commands
from lightning_acu.cli.misspelt import without_types

ROOT = Path(__file__).parents[2]
QUICKSTART = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--trainer.accelerator=cpu"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

MY_MODULE = """
import lightning.pytorch as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import convert_to_acu


class MyModel(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = convert_to_acu(torch.nn.Sequential(torch.nn.Conv2d(1, width, 3), torch.nn.Conv2d(width, 3, 3)))

    def forward(self, images):
        return self.net(images).mean((2, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        images = torch.randn(10, 1, 9, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(10) % 3), batch_size=4)

    test_dataloader = predict_dataloader = train_dataloader
"""


def command(folder, *words, **environment):
    """A finished process of ``python -m lightning_acu``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-m", "lightning_acu", *map(str, words)]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def fails(capsys, *words):
    """(exit code, lines on stderr) of a command that fails."""
    for name in ("lightning.pytorch", "lightning.fabric"):  # they keep the stderr of the test that imported them
        for handler in logging.getLogger(name).handlers:
            handler.setStream(sys.stderr)
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    return caught.value.code, capsys.readouterr().err.splitlines()


def rows_of(table):
    return list(csv.DictReader(table.read_text().splitlines()))


def test_help_lists_every_command_with_an_example_and_imports_no_torch(tmp_path):
    program = (
        "import sys; from lightning_acu.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert f"\n  {name} " in shown.stdout
        assert f"$ lightning-acu {name} " in shown.stdout


def test_help_takes_less_than_two_seconds_of_cpu_time_more_than_python(tmp_path):
    def seconds(*words):
        before = os.times()
        subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    pairs = [(seconds("-c", "pass"), seconds("-m", "lightning_acu", "--help")) for _ in range(3)]
    assert min(help - nothing for nothing, help in pairs) < 2


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"lightning-acu {__version__}\n"


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "usage: lightning-acu COMMAND" in capsys.readouterr().out


def test_a_pipe_that_closes_early_is_no_error(tmp_path):
    words = f"{sys.executable} -m lightning_acu configs | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.count("\n") == 1
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["ft"], 2, "there is no command 'ft'; did you mean 'fit'?"),
        (["fit"], 2, "give --config FILE"),
        (["fit", "--config", "quickstrat.yaml"], 2, "quickstrat.yaml does not exist; did you mean 'quickstart.yaml'?"),
        (["fit", "--model=ImageClasifier"], 2, "did you mean 'ImageClassifier'?"),
        (["fit", "--model=lightning_acu.ImageClasifier"], 2, "did you mean 'ImageClassifier'?"),
        (["fit", "--model=my_modul.MyModel"], 2, "(searched, too: the current folder); did you mean 'my_module'?"),
        (["fit", "--model=ImageClassifier", "--model.model=test_resnet"], 2, "there are no data"),
        ([*QUICKSTART, "--trainer.max_epoch=3"], 2, "did you mean '--trainer.max_epochs'?"),
        ([*QUICKSTART, "--trainer.max_epochs=three"], 2, "--trainer.max_epochs (=three) must be of type int"),
        ([*QUICKSTART, "--trainer.precision=16-mxied"], 2, "did you mean '16-mixed'?"),
        ([*QUICKSTART, "--data.batch_sizes=3"], 2, "has no argument 'batch_sizes'; did you mean 'batch_size'?"),
        ([*QUICKSTART, "--model.optimizer=torch.optim.AdamWW"], 2, "no AdamWW in torch.optim; did you mean 'AdamW'?"),
        ([*QUICKSTART, "--model.convert.preset=c23"], 2, "`preset` (='c23') must be 'all' or 'C23'; did you mean"),
        ([*QUICKSTART, "--model.init_args.model=resnet_18"], 2, "did you mean 'resnet18'"),
        ([*QUICKSTART, "--model.init_args.num_classes=3"], 2, "`num_classes` (=3) is too small: the data have 10"),
        (["test", "--ckpt_path", "nothing.ckpt"], 2, "--ckpt_path (=nothing.ckpt) does not exist"),
        (["configs", "quickstrat"], 2, "did you mean 'quickstart.yaml'?"),
        (["configs", "quickstart", "--to", "my_module.py"], 2, "--to (=my_module.py) is a file"),
        (["report", "--model", "test_resnet", "--kernel_size", "3"], 2, "did you mean '--kernel_sizes'?"),
        (["report", "--model", "test_resnet", "--figure", "shapes.gif"], 2, "--figure (=shapes.gif)"),
        (["convert", "--model", "test_resnet", "--out", "net.txt"], 2, "--out (=net.txt)"),
        (["convert", "--model", "test_resnet", "--out", "net.pt", "--num_classes", "-3"], 2, "`num_classes` (=-3)"),
        (["convert", "--model", "test_resnet", "--out", "net.pt", "--rules", "nothing"], 2, "--rules (='nothing')"),
        (["export", "--ckpt", "net.pt", "--to", "onx"], 2, "did you mean 'onnx'?"),
        (["predict", "--ckpt", "nothing.pt", "my_modul.py"], 2, "my_modul.py does not exist; did you mean"),
        (["predict", "--ckpt", "nothing.pt", "x.jpg", "--top_k", "0"], 2, "--top_k (=0)"),
        (["completion", "bsh"], 2, "did you mean 'bash'?"),
    ],
    ids=lambda value: "-".join(map(str, value[-2:])) if isinstance(value, list) else None,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::lightning_acu.surgery.NoEffectWarning")
def test_an_error_is_short_and_names_the_nearest_choice(tmp_path, monkeypatch, capsys, words, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    (tmp_path / "quickstart.yaml").write_text("base: nothing")
    given, lines = fails(capsys, *words)
    assert message in "\n".join(lines)
    assert given == code
    assert len(lines) <= 6


def test_debug_shows_the_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`num_classes`"):
        main(["convert", "--model", "test_resnet", "--out", "net.pt", "--num_classes", "-3", "--debug"])


def test_an_error_in_ones_own_code_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text(MY_MODULE.replace("return F.cross_entropy", "raise ValueError('mine')  #"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="mine"):
        main(["fit", "--model=failing.MyModel", *QUIET, "--trainer.fast_dev_run=true"])
    sys.modules.pop("failing", None)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("something else", "something else"),
        ("x\nErrors:\n  - `a` (=1) is wrong\n  - Expected a <class 'NoneType'>\nGiven value: 1", "`a` (=1) is wrong"),
    ],
)
def test_other_messages_stay_or_lose_their_lists_of_types(message, said):
    assert without_types(message) == said


#: The commands after one another in one folder; each uses what those before it wrote.
OWN_MODULE = [
    ["fit", "--model=my_module.MyModel", "--trainer.max_epochs=1"],
    ["test", "--ckpt_path=CKPT"],
    ["predict", "--ckpt_path=CKPT", "--top_k=2"],
    [
        "report",
        "--ckpt",
        "CKPT",
        "--class_path",
        "my_module.MyModel",
        "--input_size",
        1,
        9,
        8,
        "--figure",
        "shapes.png",
    ],
    ["view", "CKPT", "--class_path", "my_module.MyModel", "--input_size", 1, 9, 8, "--output", "shapes.html"],
]


@pytest.mark.slow
def test_ones_own_module_without_a_data_module(tmp_path):
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    for words in OWN_MODULE:
        found = [str(path) for path in tmp_path.rglob("*.ckpt")]
        lightning = [] if words[0] not in ("fit", "test", "predict") else QUIET
        done = command(tmp_path, *(str(word).replace("CKPT", *found[:1] or ["-"]) for word in words), *lightning)
        assert done.returncode == 0, done.stderr
    (table,) = tmp_path.rglob("predictions.csv")
    rows = rows_of(table)
    assert [(row["file"], row["rank"]) for row in rows] == [(str(n), str(rank)) for n in range(10) for rank in (1, 2)]
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    assert (tmp_path / "shapes.png").stat().st_size > 1000
    assert '"title":"Price of the fold"' in (tmp_path / "shapes.html").read_text()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A flat folder of two classes, whose images are almost all of one colour, and a run trained on it."""
    root = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        (root / "images" / name).mkdir(parents=True)
        for index in range(10):
            noise = torch.randint(0, 50, (20, 24, 3), generator=generator)
            image = (noise + torch.tensor(colour)).to(torch.uint8).numpy()
            Image.fromarray(image).save(root / "images" / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        main(
            ["fit", "--model=ImageClassifier", "--model.model=test_resnet", "--model.num_classes=2",
             "--model.convert={}", "--data=ImageFolderDataModule", "--data.root=images", "--data.val_size=0.2",
             "--data.test_size=4", "--data.image_size=16", "--data.num_workers=0", "--data.batch_size=6",
             "--trainer.max_epochs=3", *QUIET]
        )  # fmt: skip
    return root


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_flat_folder_is_trained_tested_and_predicted(photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    (checkpoint,) = photos.rglob("*.ckpt")
    main(["test", "--ckpt_path", str(checkpoint), *QUIET])
    assert "with the configuration" in capsys.readouterr().err
    main(["predict", "--ckpt_path", str(checkpoint), *QUIET])
    (table,) = photos.rglob("version_*/predictions.csv")
    tested = [Path(row["file"]) for row in rows_of(table)]
    assert len(tested) == 4
    assert sorted(path.parent.name for path in tested) == ["blue", "blue", "red", "red"]  # in proportion
    main(["predict", "--ckpt", str(checkpoint), "images", "--top_k", "2", "--batch_size", "3"])
    rows = rows_of(Path("predictions.csv"))
    assert len(rows) == 40
    by_file = {(row["file"], row["class"]): float(row["probability"]) for row in rows}
    for row in rows_of(table):  # LightningCLI's predict and ours agree
        assert by_file[row["file"].replace(f"{photos}/", ""), row["class"]] == pytest.approx(
            float(row["probability"]), abs=1e-4
        )
    for name in {row["file"] for row in rows}:
        assert by_file[name, "red"] + by_file[name, "blue"] == pytest.approx(1, abs=1e-5)
    main(["export", "--ckpt", str(checkpoint), "--to", "pt2"])
    assert "images (N, 3, 16, 16)" in capsys.readouterr().out  # of the training, not timm's 160


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_test_without_a_configuration_asks_the_checkpoint_for_its_model(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (source,) = photos.rglob("*.ckpt")
    (tmp_path / "alone.ckpt").write_bytes(source.read_bytes())
    assert "there are no data" in "\n".join(fails(capsys, "test", "--ckpt_path", "alone.ckpt", *QUIET)[1])
    data = ["--data=ImageFolderDataModule", f"--data.root={photos / 'images'}", "--data.val_size=0.2"]
    main(["test", "--ckpt_path", "alone.ckpt", *data, "--data.image_size=16", "--data.num_workers=0", *QUIET])
    assert "test/accuracy" in capsys.readouterr().out


def test_convert_writes_a_file_that_report_and_load_acu_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "convert",
            "--model",
            "test_resnet",
            "--out",
            "net.safetensors",
            "--position_groups",
            "2",
            "--kernel_sizes",
            "3",
        ]
    )
    assert "net.safetensors: " in capsys.readouterr().out
    assert {layer.position_groups for _, layer in acu_layers(load_acu("net.safetensors"))} == {2}
    main(["report", "--ckpt", "net.safetensors", "--json", "--input_size", "3", "32", "40", "--figure", "shapes.svg"])
    report = json.loads(capsys.readouterr().out)
    assert report["input_size"] == [3, 32, 40]
    assert report["macs"] == sum(row["macs"] * row["pixels"] for row in report["convolutions"])
    plain = create_model("test_resnet").modules()
    expected = sum(isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3) for conv in plain)
    assert sum(row["converted"] for row in report["convolutions"]) == expected
    assert (tmp_path / "shapes.svg").read_text().startswith("<?xml")


def test_view_writes_a_page_of_a_file_or_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["convert", "--model", "test_resnet", "--out", "net.safetensors", "--kernel_sizes", "3"])
    main(["view", "net.safetensors", "--input_size", "3", "32", "40"])
    assert "wrote shapes.html" in capsys.readouterr().out
    page = (tmp_path / "shapes.html").read_text()
    active = len(list(acu_layers(load_acu("net.safetensors"))))
    assert f"{active} active convolutions" in page
    assert "images of 3x32x40" in page
    for words, message in (
        (["view", "nothing.ckpt"], "nothing.ckpt"),
        (["view", "."], "has no checkpoint"),
        (["view", "net.safetensors", "--input-size", "3"], "did you mean '--input_size'?"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_import_caffe_writes_a_file_that_load_acu_reads(tmp_path, monkeypatch, capsys):
    pytest.importorskip("google.protobuf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.caffemodel").write_bytes(encoded(layers()))
    main(["import-caffe", "plain.caffemodel"])
    assert "plain.safetensors: acu_plain; taps moved, in pixels on average: conv1.1.conv 0." in capsys.readouterr().out
    assert len(list(acu_layers(load_acu("plain.safetensors")))) == 6
    with pytest.raises(SystemExit):
        main(["import-caffe", "plain.caffemodel", "--out", "plain.onnx"])
    assert "--out (=plain.onnx) must end in .safetensors, .pt or .pth" in capsys.readouterr().err
    (tmp_path / "other.caffemodel").write_bytes(b"other")
    with pytest.raises(SystemExit):
        main(["import-caffe", "other.caffemodel"])
    assert "other.caffemodel" in capsys.readouterr().err


def test_the_summary_counts_flops(tmp_path, monkeypatch, capsys):
    """Two for each multiply-accumulate of the plain network, whose active layers compute the same."""
    monkeypatch.chdir(tmp_path)
    main([*QUICKSTART, "--trainer.enable_progress_bar=false", "--trainer.fast_dev_run=1"])
    shown = capsys.readouterr().out
    plain = create_model("acu_small", num_classes=10, in_chans=1).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(torch.zeros(1, 1, 28, 28))
    assert f"Total FLOPs: {counter.get_total_flops() / 1e6:.1f} M" in shown


def test_every_option_is_completed():
    commands = next(action.choices for action in _all_commands("FILE")._actions if isinstance(action.choices, dict))
    assert set(commands) == set(COMMANDS)
    options = {name: set(parser._option_string_actions) for name, parser in commands.items()}
    assert {"--trainer.max_epochs", "--config", "--ckpt_path"} <= options["fit"]
    assert {"--ckpt_path", "--ckpt", "--top_k"} <= options["predict"]
    assert {"--kernel_sizes", "--figure", "--json"} <= options["report"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_that_shell(capsys, shell, tmp_path):
    pytest.importorskip("shtab")
    main(["completion", shell])
    script = capsys.readouterr().out
    assert "--trainer.max_epochs" in script
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        subprocess.run(["bash", "-n", str(tmp_path / "script")], check=True)
