"""The console script: LightningCLI, the shipped configurations, the table at the end."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_acu import ImageClassifier, report_acu
from lightning_acu.cli import main
from lightning_acu.cli.configs import configs_directory

CONFIGS = Path(__file__).parents[2] / "configs"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SHORT = [*QUIET, "--trainer.accelerator=cpu", "--trainer.max_epochs=4", "--trainer.limit_train_batches=30"]


def run(tmp_path, monkeypatch, *arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-acu", *arguments])
    main()


def fit_quickstart(tmp_path, monkeypatch, name="quickstart", *extra):
    run(tmp_path, monkeypatch, "fit", "--config", str(CONFIGS / f"{name}.yaml"), *SHORT, *extra)
    return tmp_path / "runs" / name / "version_0"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A short training that rounds, for several tests to look at."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return fit_quickstart(tmp_path_factory.mktemp("quickstart"), monkeypatch, "round_to_pixels")


@pytest.mark.slow
def test_quickstart_writes_what_it_says(quickstart):
    expected = {"shapes.png", "shapes.html", "shapes_before_rounding.png", "metrics.csv", "summary.json", "config.yaml"}
    expected |= {"before_rounding.ckpt", "rounded.ckpt", "final.ckpt"}
    assert expected <= {path.name for path in quickstart.iterdir()}
    summary = json.loads((quickstart / "summary.json").read_text())
    assert list(summary["test"]) == ["before rounding", "after rounding", "after fine-tuning"]
    assert all(0 <= metrics["test/accuracy"] <= 1 for metrics in summary["test"].values())
    assert len(summary["learned"]) == 7
    assert max(row["mean_displacement"] for row in summary["learned"].values()) > 0.1
    assert all(row["off_lattice"] == 0 for row in summary["final"].values())


@pytest.mark.slow
def test_quickstart_stages_differ_as_they_should(quickstart):
    before, rounded, final = (
        torch.load(quickstart / f"{name}.ckpt", weights_only=False)["state_dict"]
        for name in ("before_rounding", "rounded", "final")
    )
    offsets = [name for name in before if name.endswith("offsets")]
    assert len(offsets) == 7
    for name in offsets:
        assert torch.equal(before[name].round(), rounded[name])
        assert torch.equal(rounded[name], final[name])
    assert torch.equal(before["model.conv1.0.weight"], rounded["model.conv1.0.weight"])
    assert not torch.equal(rounded["model.conv1.0.weight"], final["model.conv1.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_the_other_commands_take_the_saved_config_and_checkpoint(quickstart, tmp_path, monkeypatch, command):
    saved = ["--config", str(quickstart / "config.yaml"), "--ckpt_path", str(quickstart / "final.ckpt")]
    run(tmp_path, monkeypatch, command, *saved, *QUIET)


@pytest.mark.slow
def test_the_command_line_has_the_last_word_about_the_model(quickstart, tmp_path, monkeypatch):
    """Also when a training goes on from a checkpoint, whose hyperparameters say something else."""
    saved = ["--config", str(quickstart / "config.yaml"), "--ckpt_path", str(quickstart / "before_rounding.ckpt")]
    run(tmp_path, monkeypatch, "validate", *saved, "--model.init_args.label_smoothing=0.25", *QUIET)
    (written,) = tmp_path.glob("runs/round_to_pixels/*/config.yaml")
    assert yaml.safe_load(written.read_text())["model"]["init_args"]["label_smoothing"] == 0.25


@pytest.mark.slow
def test_a_checkpoint_of_a_module_made_in_python(quickstart, tmp_path, monkeypatch):
    config = yaml.safe_load((quickstart / "config.yaml").read_text())["model"]["init_args"]
    kept = {name: config[name] for name in ("model", "num_classes", "in_chans", "convert", "model_kwargs")}
    module = ImageClassifier(**kept)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    arguments = ["--config", str(quickstart / "config.yaml"), "--ckpt_path", str(tmp_path / "python.ckpt")]
    run(tmp_path, monkeypatch, "test", *arguments, *QUIET)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize(("in_memory", "advised"), [(True, False), (False, True)])
def test_advice_on_workers_where_it_is_right(tmp_path, monkeypatch, recwarn, in_memory, advised):
    monkeypatch.setattr("lightning.pytorch.trainer.connectors.data_connector.suggested_max_num_workers", lambda _: 16)
    monkeypatch.setattr("lightning_acu.data.DigitsDataModule.needs_workers", not in_memory)
    before = list(warnings.filters)
    fit_quickstart(tmp_path, monkeypatch, "quickstart_baseline", "--trainer.fast_dev_run=1", "--data.num_workers=1")
    assert any("does not have many workers" in str(warning.message) for warning in recwarn) is advised
    assert warnings.filters == before


@pytest.mark.parametrize(
    ("optimizer", "weight_decay"), [("SGD", 0), ("Adam", 0), ("AdamW", 0.01), ("RMSprop", 0), ("NAdam", 0)]
)
def test_an_optimizer_has_its_own_defaults(tmp_path, monkeypatch, capsys, optimizer, weight_decay):
    """Those of another class must not get in between, such as AdamW's weight decay."""
    config = {"class_path": "lightning_acu.ImageClassifier", "init_args": {"model": "acu_plain"}}
    config["init_args"]["optimizer"] = {"class_path": f"torch.optim.{optimizer}", "init_args": {"lr": 0.5}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": config}))
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "fit", "--config", "config.yaml", "--data=DigitsDataModule", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]["init_args"]
    assert (printed["lr"], printed["weight_decay"]) == (0.5, weight_decay)


def test_baseline_differs_from_the_quickstart_only_where_it_says():
    quickstart, baseline = (
        yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("quickstart", "quickstart_baseline")
    )
    assert baseline["model"]["init_args"].pop("convert") is None
    assert quickstart["model"]["init_args"].pop("convert")
    assert quickstart["trainer"].pop("callbacks")
    assert "callbacks" not in baseline["trainer"]
    for config in (quickstart, baseline):
        del config["trainer"]["logger"]["init_args"]["name"]
    assert quickstart == baseline


@pytest.mark.slow
def test_baseline_runs_and_shows_one_row(tmp_path, monkeypatch, capsys):
    directory = fit_quickstart(tmp_path, monkeypatch, "quickstart_baseline", "--trainer.limit_train_batches=2")
    assert list(json.loads((directory / "summary.json").read_text())["test"]) == ["final"]
    assert "on the test images" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_puts_runs_beside_one_another(tmp_path, monkeypatch, capsys):
    for name in ("quickstart_baseline", "quickstart"):
        fit_quickstart(tmp_path, monkeypatch, name)
    price = json.loads((tmp_path / "runs/quickstart/version_0/summary.json").read_text())["price"]
    assert price["parameters"] == 6274 + 3 * 18
    assert price["folded_macs"] >= price["macs"] > 1000
    capsys.readouterr()
    run(tmp_path, monkeypatch, "compare", "runs/quickstart_baseline", "runs/quickstart/version_0")
    shown = capsys.readouterr().out
    assert "6,274" in shown
    assert "6,328" in shown
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "compare", "runs/quickstart", "--metric", "test/f1")
    assert "--metric (='test/f1')" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "compare", "runs")
    assert "runs has no summary.json" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_key_of_every_config_has_a_comment_or_a_documented_twin(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[0]) < 130
    assert any(line.strip().startswith("# ") for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.init_args.models=resnet18"], "models"),
        (["--model.init_args.convert.kernel=3"], "kernel"),
        (["--model.class_path=lightning_acu.NoSuchThing"], "NoSuchThing"),
        (["--trainer.max_epoch=3"], "trainer.max_epoch"),
        (["--data.init_args.batch_sizes=3"], "batch_sizes"),
        (["--model.init_args.model=resnet_18"], "did you mean 'resnet18'"),
        # An argument of older configurations, from when RoundThenFinetune evaluated during training
        (
            ["--trainer.callbacks+=lightning_acu.callbacks.RoundThenFinetune", "--trainer.callbacks.evaluate=true"],
            "evaluate",
        ),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path, monkeypatch, capsys, arguments, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        fit_quickstart(tmp_path, monkeypatch, "quickstart", *arguments)
    text = capsys.readouterr().err + str(caught.value)
    assert message in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:RoundThenFinetune. after rounding all taps are where they started")
def test_the_search_ends_in_dilations(tmp_path, monkeypatch):
    directory = fit_quickstart(tmp_path, monkeypatch, "search_dilation")
    module = ImageClassifier.load_from_checkpoint(directory / "final.ckpt", map_location="cpu")
    assert len(report_acu(module).dilations) == 3


def test_callbacks_can_be_added_by_dotted_path(tmp_path, monkeypatch):
    extra = [
        "--trainer.callbacks+=lightning_acu.callbacks.OffsetLogger",
        "--trainer.callbacks.every_n_steps=7",
        "--trainer.max_steps=3",
        "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateMonitor",
    ]
    monkeypatch.setattr(LightningArgumentParser, "instantiate_classes", _stop_after(found := []))
    with pytest.raises(StopIteration):
        fit_quickstart(tmp_path, monkeypatch, "round_to_pixels", *extra)
    names = [callback.class_path.rsplit(".", 1)[1] for callback in found[0].fit.trainer.callbacks]
    assert names == ["PositionLRSchedule", "RoundThenFinetune", "OffsetLogger", "OffsetLogger", "LearningRateMonitor"]
    assert found[0].fit.trainer.callbacks[3].init_args.every_n_steps == 7


def _stop_after(found):
    def instantiate(self, config):
        found.append(config)
        raise StopIteration

    return instantiate


def test_configs_lists_and_copies(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, "configs")
    listed = capsys.readouterr().out
    assert "quickstart.yaml" in listed
    assert "quickstart_baseline.yaml" in listed
    run(tmp_path, monkeypatch, "configs", "quickstart", "--to", "here")
    assert (tmp_path / "here" / "quickstart.yaml").read_bytes() == (CONFIGS / "quickstart.yaml").read_bytes()


def test_configs_errors(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "configs", "nothing")
    assert "there is no configuration 'nothing'; choose one of quickstart.yaml" in capsys.readouterr().err
    run(tmp_path, monkeypatch, "configs", "quickstart")
    run(tmp_path, monkeypatch, "configs", "quickstart")  # the same file
    (tmp_path / "quickstart.yaml").write_text("mine: 1\n")
    with pytest.raises(SystemExit):
        run(tmp_path, monkeypatch, "configs", "quickstart")
    assert "quickstart.yaml already exists and differs" in capsys.readouterr().err
    assert (tmp_path / "quickstart.yaml").read_text() == "mine: 1\n"


def test_configs_are_found_inside_an_installed_package(tmp_path, monkeypatch):
    assert configs_directory() == CONFIGS
    package = tmp_path / "lightning_acu"
    shutil.copytree(CONFIGS, package / "configs")
    monkeypatch.setattr("lightning_acu.cli.configs.__file__", str(package / "cli" / "commands.py"))
    assert configs_directory() == package / "configs"
