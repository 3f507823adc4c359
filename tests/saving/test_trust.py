"""Checkpoints from somebody else: nothing in them is run, imported or downloaded, unless they are trusted."""

import os
import sys

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import TinyModule, fit
from torch import nn

from lightning_acu import ImageClassifier
from lightning_acu.cli import main
from lightning_acu.saving.checkpoint import load_any, load_converted

pytestmark = pytest.mark.slow


class Runs:
    """Pickled as a call that leaves a folder."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.makedirs, (str(self.mark), 0o777, True)


class Located(TinyModule):
    """A hyperparameter of a class that torch does not count as safe."""

    def __init__(self, folder=None):
        super().__init__()
        self.save_hyperparameters()


@pytest.fixture
def their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "their_package", sys.modules[__name__])


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes the checkpoint of an ImageClassifier, changed."""
    module = ImageClassifier("test_resnet", num_classes=3, in_chans=2, convert={"kernel_sizes": [3]})
    trainer = pl.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "usual.ckpt")

    def write(change=lambda content: None):
        content = torch.load(tmp_path / "usual.ckpt", weights_only=True)
        change(content)
        torch.save(content, tmp_path / "theirs.ckpt")
        return tmp_path / "theirs.ckpt"

    return write


COMMANDS = {
    "report": ("report", "--input_size", "2", "33", "40"),
    "export": ("export", "--to", "pt2", "--input_size", "2", "33", "40"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("where", ["callbacks", "hyper_parameters", "state_dict"])
def test_code_in_a_checkpoint_runs_only_where_it_is_trusted(command, where, checkpoint, tmp_path, capsys):
    mark = tmp_path / "ran"
    path = checkpoint(lambda content: content.setdefault(where, {}).update(theirs=Runs(mark)))
    with pytest.raises(SystemExit) as caught:
        main([*COMMANDS[command], "--ckpt", str(path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "theirs.ckpt has something other than tensors and plain values" in message
    assert "(os.makedirs), and reading that can run any code" in message
    assert "--trust" in message
    assert len(message.splitlines()) == 2  # and where the traceback is
    for load in (load_any, lambda path: load_converted(ImageClassifier, path)):
        with pytest.raises(ValueError, match=r"theirs.ckpt has something other than tensors"):
            load(path)
    assert not mark.exists()
    if where == "callbacks":
        main([*COMMANDS[command], "--ckpt", str(path), "--trust"])
        assert mark.exists()


@pytest.mark.usefixtures("their_package")
def test_hyperparameters_of_other_classes_need_trust(tmp_path):
    module = Located(tmp_path)
    fit(module, [], tmp_path, max_steps=1).save_checkpoint(tmp_path / "located.ckpt")
    path = tmp_path / "located.ckpt"
    with pytest.raises(ValueError, match=r"plain values \(pathlib.*PosixPath\).*--trust \(`trust`=True\)"):
        load_any(path, "their_package.Located")
    with pytest.raises(ValueError, match=r"plain values \(pathlib.*PosixPath\).*use weights_only=False"):
        load_converted(Located, path)
    for loaded in (
        load_any(path, "their_package.Located", trust=True),
        load_converted(Located, path, weights_only=False),
    ):
        assert loaded.hparams.folder == tmp_path
        assert torch.equal(loaded.offsets, module.offsets)


def hparams(**values):
    return lambda content: content["hyper_parameters"].update(values)


def test_a_class_that_the_file_names_is_not_imported(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "theirs_to_import.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = checkpoint(hparams(_class_path="theirs_to_import.Module", _instantiator="theirs_to_import.make"))
    with pytest.raises(ValueError, match=r"is of the class 'theirs_to_import.Module'; name it yourself .*--class_path"):
        load_any(path)
    path = checkpoint(hparams(_instantiator="theirs_to_import.make"))
    assert isinstance(load_any(path), nn.Module)
    with pytest.raises(SystemExit, match="imported"):
        load_any(checkpoint(hparams(_class_path="theirs_to_import.Module")), trust=True)


def test_sub_classes_that_the_file_names_are_not_imported(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "theirs_to_import.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    instantiator = "lightning.pytorch.cli.instantiate_module"
    theirs = {"class_path": "theirs_to_import.Optimizer", "init_args": {}}
    path = checkpoint(
        hparams(_instantiator=instantiator, _class_path="lightning_acu.ImageClassifier", optimizer=theirs)
    )
    assert isinstance(load_any(path), nn.Module)


def test_nothing_is_downloaded_or_read_for_a_checkpoint(checkpoint, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("downloads or reads")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("timm.models._factory.load_checkpoint", refuse)
    sources = {"checkpoint_path": "/no/such/file", "pretrained_cfg": {"file": "/no/such/file"}, "pretrained": True}
    assert isinstance(load_any(checkpoint(hparams(pretrained=True, model_kwargs=sources))), nn.Module)
    with pytest.raises(ValueError, match=r"has a model \(='hf-hub:a/b'\) that is built from what is downloaded"):
        load_any(checkpoint(hparams(model="hf-hub:a/b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hparams(model_kwargs={"layers": [100000] * 4}), "many more tensors, or larger ones, than the file holds"),
        (hparams(num_classes=10**12), "many more tensors, or larger ones, than the file holds"),
        (hparams(model=3), "theirs.ckpt does not fit ImageClassifier"),
        (hparams(convert=3), "theirs.ckpt does not fit ImageClassifier"),
        (hparams(model_kwargs=3), r"`model_kwargs` \(=3\) that are not a mapping"),
        (lambda content: content.update(hyper_parameters=None), "is not a Lightning checkpoint"),
        (lambda content: content.update(state_dict=[1]), "is not a Lightning checkpoint"),
        (lambda content: content.pop("state_dict"), "is not a Lightning checkpoint"),
    ],
)
def test_what_is_wrong_is_said_before_memory_is_taken(change, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        load_any(checkpoint(change))
