"""evaluate_stages: how good the model was before and after rounding, and is now."""

import functools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit, loader, validate
from lightning.pytorch.loggers import CSVLogger

from lightning_acu.callbacks import ConvertToACU, PositionLRSchedule, RoundThenFinetune, evaluate_stages


class Validating(TinyModule):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        images, labels = batch
        scores = self.net(images).mean((2, 3))
        self.log("loss", F.cross_entropy(scores, labels))
        self.log("accuracy", (scores.argmax(1) == labels).float().mean())

    test_step = validation_step

    def val_dataloader(self):
        return loader(batches=3)

    def test_dataloader(self):
        return loader(batches=2)


def trained(tmp_path, model=None, rounding=None, **arguments):
    model, rounding = model or Validating(), rounding or RoundThenFinetune(at_step=9)
    trainer = fit(model, [PositionLRSchedule(3.0, warmup_steps=1), rounding], tmp_path, **arguments)
    return trainer, model, rounding


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, other):
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("method", ["validate", "test", "by default"])
def test_the_numbers_are_those_of_the_kept_checkpoints_and_of_the_end(tmp_path, method):
    trainer, model, rounding = trained(tmp_path, logger=CSVLogger(tmp_path))
    final, callbacks = state_of(model), list(trainer.callbacks)
    arguments = {} if method == "by default" else {"method": method}
    stages = evaluate_stages(trainer, model, rounding, **arguments)
    assert_same(model.state_dict(), final)
    assert trainer.callbacks == callbacks
    assert list(stages) == ["before rounding", "after rounding", "after fine-tuning"]
    assert len({metrics["loss"] for metrics in stages.values()}) == 3
    states = [torch.load(rounding.checkpoints[name])["state_dict"] for name in ("before_rounding", "rounded")]
    for metrics, state in zip(stages.values(), [*states, final], strict=True):
        other = Validating()
        other.load_state_dict(state)
        other.val_dataloader = getattr(other, f"{'val' if method == 'validate' else 'test'}_dataloader")
        assert metrics == validate(other, tmp_path)


def test_loggers_hear_of_it_as_of_any_validation(tmp_path):
    trainer, model, rounding = trained(tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    evaluate_stages(trainer, model, rounding)
    trainer.logger.save()
    assert "loss" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("given", ["no callback", "one that did not round"])
def test_where_nothing_was_rounded_there_is_only_the_end(tmp_path, given):
    model, rounding = Validating(), RoundThenFinetune(at_step=9)
    trainer = fit(model, [PositionLRSchedule(3.0, warmup_steps=1)], tmp_path)
    stages = evaluate_stages(trainer, model, rounding if given == "one that did not round" else None, method="validate")
    assert stages == {"final": validate(model, tmp_path)}


def test_without_kept_checkpoints_there_is_only_the_end(tmp_path):
    trainer, model, rounding = trained(tmp_path, rounding=RoundThenFinetune(at_step=9, keep=False))
    assert evaluate_stages(trainer, model, rounding, method="validate") == {
        "after fine-tuning": validate(model, tmp_path)
    }


def test_a_checkpoint_that_is_gone_is_said_and_left_out(tmp_path):
    trainer, model, rounding = trained(tmp_path)
    (tmp_path / "before_rounding.ckpt").unlink()
    with pytest.warns(UserWarning, match=r"before_rounding.ckpt does not exist any more; the model before rounding is"):
        stages = evaluate_stages(trainer, model, rounding)
    assert list(stages) == ["after rounding", "after fine-tuning"]


def test_a_sharded_checkpoint_is_an_error(tmp_path):
    trainer, model, rounding = trained(tmp_path)
    (tmp_path / "rounded.ckpt").unlink()
    (tmp_path / "rounded.ckpt").mkdir()
    with pytest.raises(RuntimeError, match=r"rounded.ckpt is a folder of shards \(FSDP2\).*trainer.validate\(module, "):
        evaluate_stages(trainer, model, rounding)


def test_an_error_on_the_way_leaves_the_final_weights_and_the_callbacks(tmp_path):
    class Fails(Validating):
        failing = False

        def validation_step(self, batch, batch_idx):
            if self.failing:
                raise ArithmeticError

    trainer, model, rounding = trained(tmp_path, Fails())
    final, callbacks = state_of(model), list(trainer.callbacks)
    model.failing = True
    with pytest.raises(ArithmeticError):
        evaluate_stages(trainer, model, rounding, method="validate")
    assert_same(model.state_dict(), final)
    assert trainer.callbacks == callbacks


def test_several_loaders_of_a_datamodule(tmp_path):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return [loader(batches=3), loader(3, 2)]

    model, rounding = Validating(), RoundThenFinetune(at_step=9)
    trainer = fit(model, [PositionLRSchedule(3.0, 1), rounding], tmp_path)
    stages = evaluate_stages(trainer, model, rounding, datamodule=Data(), method="validate")
    names = {f"{name}/dataloader_idx_{index}" for name in ("loss", "accuracy") for index in (0, 1)}
    assert [set(metrics) for metrics in stages.values()] == [names] * 3
    alone = evaluate_stages(trainer, model, rounding, dataloaders=loader(3, 2), method="validate")
    assert [metrics["loss"] for metrics in alone.values()] == [
        metrics["loss/dataloader_idx_1"] for metrics in stages.values()
    ]


def test_a_module_that_a_callback_converted_and_whose_hyperparameters_name_a_class(tmp_path):
    class WithHyperparameters(Validating):
        def __init__(self, optimizer, kind):
            super().__init__(optimizer, convert=False)
            self.save_hyperparameters()

    model = WithHyperparameters(functools.partial(torch.optim.SGD, lr=0.1), torch.nn.Conv2d)
    rounding = RoundThenFinetune(at_step=9)
    trainer = fit(model, [ConvertToACU(), PositionLRSchedule(3.0, 1), rounding], tmp_path)
    stages = evaluate_stages(trainer, model, rounding)
    assert len({metrics["loss"] for metrics in stages.values()}) == 3


def test_the_method_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match=r"`method` \(='predict'\) must be 'test' or 'validate'"):
        evaluate_stages(None, None, method="predict")
