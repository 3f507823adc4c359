"""ImageClassifier: any model by name, converted or not, its metrics, its optimizers, its checkpoints."""

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import fit
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu import ACUConv2d, ConvertConfig, ImageClassifier, acu_layers
from lightning_acu.data import DigitsDataModule


def images(count=8, channels=1, size=28, classes=10):
    return DataLoader(TensorDataset(torch.randn(count, channels, size, size), torch.arange(count) % classes), 4)


def classifier(**arguments):
    return ImageClassifier(**({"model": "test_resnet", "in_chans": 1, "convert": ConvertConfig()} | arguments))


@pytest.mark.parametrize("convert", [None, ConvertConfig(), ConvertConfig(kernel_sizes=[3], target_modules=["conv2"])])
def test_trains_tests_and_predicts(tmp_path, convert):
    torch.manual_seed(0)
    module = classifier(convert=convert, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, images(), images())
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/error"} <= set(trainer.callback_metrics)
    assert not torch.equal(before["model.fc.weight"], module.model.fc.weight)
    (metrics,) = trainer.test(module, images(), verbose=False)
    assert metrics["test/error"] == pytest.approx(1 - metrics["test/accuracy"])
    predictions = torch.cat(trainer.predict(module, images()))
    assert predictions.shape == (8, 10)
    torch.testing.assert_close(predictions.sum(1), torch.ones(8))
    agree = (predictions.argmax(1) == torch.arange(8)).float().mean().item()
    assert metrics["test/accuracy"] == pytest.approx(agree)


@pytest.mark.parametrize(("convert", "count"), [(None, 0), (ConvertConfig(), 10), (ConvertConfig(kernel_sizes=[5]), 0)])
def test_convert_decides_which_layers_are_active(convert, count):
    if convert is not None and not count:
        with pytest.warns(UserWarning, match="converted nothing"):
            module = classifier(convert=convert)
    else:
        module = classifier(convert=convert)
    assert len(list(acu_layers(module))) == count


def test_conversion_changes_no_output():
    torch.manual_seed(0)
    plain = classifier(convert=None).eval()
    torch.manual_seed(0)
    active = classifier().eval()
    batch = torch.randn(3, 1, 29, 31)
    torch.testing.assert_close(active(batch), plain(batch), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/inception_v3", "torchvision/googlenet"])
def test_auxiliary_heads_count_in_training_only(name):
    module = ImageClassifier(name, num_classes=4, model_kwargs={"init_weights": False, "aux_logits": True})
    module.log = module.log_dict = lambda *arguments, **keywords: None
    size = 299 if "inception" in name else 64
    loss = module.train().training_step((torch.randn(2, 3, size, size), torch.tensor([1, 3])), 0)
    loss.backward()
    heads = [parameter for name, parameter in module.named_parameters() if "aux" in name.lower()]
    assert heads
    assert all(parameter.grad is not None for parameter in heads)
    assert module.eval()(torch.randn(2, 3, size, size)).shape == (2, 4)


def test_scheduler_and_its_interval():
    arguments = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3), "lr_scheduler_interval": "step"}
    configured = classifier(**arguments).configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    assert isinstance(configured["lr_scheduler"]["scheduler"], torch.optim.lr_scheduler.StepLR)
    plateau = classifier(lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau).configure_optimizers()
    assert plateau["lr_scheduler"]["monitor"] == "val/loss"


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_checkpoint_restores_the_active_model(tmp_path):
    module = classifier(optimizer=torch.optim.SGD)
    trainer = fit(module, [], tmp_path, images(), max_epochs=1)
    with torch.no_grad():
        for _, layer in acu_layers(module):
            layer.offsets.uniform_(-1, 1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = ImageClassifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert isinstance(again.model.layer1[0].conv1, ACUConv2d)
    batch = torch.randn(2, 1, 28, 28)
    assert torch.equal(again.eval()(batch), module.eval()(batch))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "resnet_18"}, r"`model` \(='resnet_18'\) is neither a timm model .* did you mean 'resnet18'"),
        (
            {"model": "deeplabv3_resnet50"},
            "is a torchvision model, not a timm model; write 'torchvision/deeplabv3_resnet50'",
        ),
        ({"lr_scheduler_interval": "batch"}, r"`lr_scheduler_interval` \(='batch'\) must be 'epoch' or 'step'"),
        ({"convert": ConvertConfig(backend="cuda")}, r"`backend` \(='cuda'\) is unknown"),
        ({"compile_mode": "fast"}, r"`compile_mode` \(='fast'\) must be 'default', 'reduce-overhead'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier(**arguments)


def test_a_model_that_gives_no_class_scores():
    module = ImageClassifier("torchvision/lraspp_mobilenet_v3_large", num_classes=3)
    with pytest.raises(TypeError, match=r"LRASPP returned .* instead of class scores \(N, num_classes\)"):
        module.eval()(torch.randn(1, 3, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 3}, r"`num_classes` \(=3\) is too small: the data have 10 classes"),
        ({"in_chans": 3}, r"`in_chans` \(=3\) does not match the data: images have 1 channels"),
    ],
)
def test_data_that_do_not_fit_the_model_stop_before_training(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(classifier(**arguments), [], tmp_path, DigitsDataModule())


def test_convert_may_be_a_dict_and_nothing_else():
    assert len(list(acu_layers(classifier(convert={"kernel_sizes": [3]})))) == 10
    with pytest.raises(TypeError, match=r"`convert` \(=True\) must be a ConvertConfig"):
        classifier(convert=True)


def test_channels_last_is_the_layout_of_weights_and_images_and_changes_no_number():
    torch.manual_seed(0)
    plain = classifier().eval()
    last = classifier(channels_last=True).eval()
    last.load_state_dict(plain.state_dict())
    seen = []
    last.model.conv1[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    batch = torch.randn(3, 1, 29, 31)
    torch.testing.assert_close(last(batch), plain(batch), rtol=0, atol=1e-5)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in last.model.parameters() if p.ndim == 4)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_the_model_is_compiled_once_and_in_place(tmp_path, monkeypatch):
    """With the backend that runs graphs as they are: what a compiler makes of them is not ours."""
    compiled = []

    def compile_eagerly(module, mode):
        compiled.append((module, mode))
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    losses = []
    for mode in (None, "default"):
        torch.manual_seed(0)
        module = classifier(compile_mode=mode, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
        names = list(module.state_dict())
        trainer = fit(module, [], tmp_path, images(), max_epochs=2)
        losses.append(trainer.callback_metrics["train/loss"].item())
        assert list(module.state_dict()) == names
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, images())
    assert [mode for _, mode in compiled] == ["default"]
    assert compiled[0][0] is module.model
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
