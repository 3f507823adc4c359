"""What callbacks check when a training has ended: still in the warm-up, on whole pixels, in every copy of the model."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import Spy, TinyModule, fit, loader
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_acu import acu_layers
from lightning_acu.callbacks import (
    CheckpointAfterRounding,
    OffsetLogger,
    PositionLRSchedule,
    RoundThenFinetune,
    evaluate_stages,
)

AT, STEPS = 9, 12
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def callbacks(**arguments):
    return [PositionLRSchedule(3.0, warmup_steps=1), RoundThenFinetune(at_step=AT, keep=False, **arguments)]


def positions(net):
    return torch.cat([layer.offsets.detach() for _, layer in acu_layers(net)])


@torch.no_grad()
def average_(copy_, tensors, decay=0.9):
    for one, other in zip(copy_, tensors, strict=True):
        one.lerp_(other, 1 - decay)


# ---- copies of the model


class Averages(pl.Callback):
    """A user's own: averages at two decays, in a dict; kept as networks or as weights."""

    def __init__(self, kind):
        self.kind, self.averages = kind, {}

    def keep(self, net):
        return copy.deepcopy(net.state_dict()) if self.kind == "weights" else copy.deepcopy(net)

    def on_train_start(self, trainer, pl_module):
        self.averages = {decay: self.keep(pl_module.net) for decay in (0.5, 0.9)}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for decay, kept in self.averages.items():
            values = kept.values() if self.kind == "weights" else kept.state_dict().values()
            average_(values, pl_module.net.state_dict().values(), decay)

    def positions(self, decay):
        kept = self.averages[decay]
        return torch.cat([kept["0.offsets"], kept["2.offsets"]]) if self.kind == "weights" else positions(kept)


class Teaching(TinyModule):
    """A momentum teacher in the module: "hidden" in a list, a "module", or "buffers", as diffusion models average."""

    def __init__(self, kind):
        super().__init__()
        teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.kind = kind
        if kind == "hidden":
            self.teachers = [teacher]
        elif kind == "module":
            self.teacher = teacher
        else:  # names of buffers have no dots
            self.ema = nn.Module()
            for name, parameter in self.net.named_parameters():
                self.ema.register_buffer(name.replace(".", ""), parameter.detach().clone())

    def tensors(self):
        if self.kind == "hidden":
            return self.teachers[0].parameters()
        return self.teacher.parameters() if self.kind == "module" else self.ema.buffers()

    def on_train_batch_end(self, *_):
        average_(self.tensors(), self.net.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    def copied(self):
        return torch.cat([tensor for tensor in self.tensors() if tensor.shape == (18,)])


IN_AVERAGES = "Averages.averages.0.5.0.offsets, Averages.averages.0.5.2.offsets, Averages.averages.0.9.0.offsets and 1"
FOUND = {
    "networks": IN_AVERAGES,
    "weights": IN_AVERAGES,
    "hidden": r"Teaching.teachers.0.0.offsets, Teaching.teachers.0.2.offsets",
    "buffers": r"Teaching.ema.0offsets, Teaching.ema.2offsets",
}


def make(kind):
    """(module, more callbacks, what the copies hold)"""
    if kind in ("networks", "weights"):
        averages = Averages(kind)
        return TinyModule(), [averages], lambda: [averages.positions(0.5), averages.positions(0.9)]
    module = Teaching(kind)
    return module, [], lambda: [module.copied()]


@pytest.mark.parametrize("kind", FOUND)
def test_copies_that_lose_the_rounding_are_named(tmp_path, kind):
    module, more, _ = make(kind)
    with pytest.warns(UserWarning, match=f"not on whole pixels: {FOUND[kind]}.*give the attribute to `copies`"):
        fit(module, [*callbacks(), *more], tmp_path)
    assert torch.equal(positions(module.net), positions(module.net).round())


@pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")
def test_a_momentum_teacher_that_is_a_layer_of_the_module_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"positions of teacher.0, teacher.2 are not on whole pixels, although they"):
        fit(Teaching("module"), callbacks(), tmp_path)


@pytest.mark.parametrize("more_first", [True, False])
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("networks", "averages"),
        ("weights", "averages"),
        ("hidden", "teachers"),
        ("module", "teacher"),
        ("buffers", "ema"),
    ],
)
def test_copies_that_are_given_by_name_get_the_positions_of_the_model(tmp_path, kind, path, more_first):
    module, more, copied = make(kind)
    ours = callbacks(copies=[path])
    fit(module, [*more, *ours] if more_first else [*ours, *more], tmp_path)  # a warning would be an error
    rounded = positions(module.net)
    assert torch.equal(rounded, rounded.round())
    assert rounded.abs().max() >= 1
    assert all(torch.equal(each, rounded) for each in copied())


def test_a_copy_kept_from_before_is_named_and_one_that_rests_is_not(tmp_path):
    class Keeps(pl.Callback):
        def __init__(self, net, at):
            self.at, self.rests, self.best = at, copy.deepcopy(net), None

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == self.at:
                self.best = {"epoch": 1, "state": copy.deepcopy(pl_module.state_dict())}

    module = TinyModule()
    with torch.no_grad():
        module.net[0].offsets.uniform_(-1, 1)
    with pytest.warns(UserWarning, match=r"Keeps.best.state.net.0.offsets, Keeps.best.state.net.2.offsets\. They"):
        fit(module, [*callbacks(), Keeps(module.net, 5)], tmp_path)
    module = TinyModule()
    with torch.no_grad():
        module.net[0].offsets.uniform_(-1, 1)
    fit(module, [*callbacks(), Keeps(module.net, 11)], tmp_path)


def test_names_that_nobody_has_are_an_error_before_training(tmp_path):
    spy = Spy()
    with pytest.raises(
        RuntimeError, match=r"neither TinyModule nor a callback has the attribute 'ema.shadow' of `copies`"
    ):
        fit(TinyModule(), [*callbacks(copies=["ema.shadow"]), spy], tmp_path)
    assert spy.offsets == []
    with pytest.raises(TypeError, match=r"`copies` \(='ema'\) must be a list of names"):
        RoundThenFinetune(at_step=1, copies="ema")


# ---- the model itself


class Changes(pl.Callback):
    """Adds to a position of a layer after a step."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.net[2].offsets[3] += self.value


@pytest.mark.parametrize(
    ("step", "value", "message"),
    [
        (
            10,
            0.25,
            r"positions of net.2 are not on whole pixels, although they were rounded at step 9: something other",
        ),
        (12, 1.0, r"positions of net.2 are on other pixels than those they were rounded to at step 9"),
        (2, 0.25, r"positions of net.2 moved in the warm-up \(`warmup_steps` \(=4\)\): something other than"),
        (11, torch.nan, r"positions of net.2 are not finite"),
    ],
)
def test_what_does_not_hold_is_said_in_one_warning(tmp_path, step, value, message):
    ours = [PositionLRSchedule(3.0, warmup_steps=4), RoundThenFinetune(at_step=AT, keep=False), OffsetLogger(50)]
    with pytest.warns(UserWarning, match=f"After this training:\n.*{message}") as caught:
        fit(TinyModule(), [*ours, Changes(step, value)], tmp_path)
    assert sum("After this training" in str(warning.message) for warning in caught) == 1


@pytest.mark.filterwarnings("ignore:PositionLRSchedule. `warmup_epochs` .=2. is not less than")
@pytest.mark.parametrize(("warmup", "step"), [("2 epochs", 12), (7, 7)])
def test_the_last_moment_of_the_warm_up_counts(tmp_path, warmup, step):
    schedule = PositionLRSchedule(3.0, warmup_epochs=2) if warmup == "2 epochs" else PositionLRSchedule(3.0, warmup)
    with pytest.warns(UserWarning, match="positions of net.2 moved in the warm-up"):
        fit(TinyModule(), [schedule, Changes(step, 0.25)], tmp_path)


def test_a_resumed_training_is_watched_too(tmp_path):
    trainer = fit(TinyModule(), callbacks(), tmp_path)
    trainer.save_checkpoint(path := tmp_path / "rounded.ckpt")
    with pytest.warns(UserWarning, match="positions of net.2 are on other pixels than those they were rounded to at"):
        fit(TinyModule(), [*callbacks(), Changes(15, 1.0)], tmp_path, ckpt_path=path, max_epochs=3)


# ---- checkpoints from before rounding


class Worsens(TinyModule):
    """Its first epoch is the best."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0 + self.current_epoch)

    test_step = validation_step

    def val_dataloader(self):
        return loader(batches=1)

    def test_dataloader(self):
        return loader(batches=1)


def saving(cls, tmp_path, **arguments):
    return cls(tmp_path / "kept", monitor="val/loss", **arguments)


BEST = "is from before rounding, so that ckpt_path='best' gives a model with fractional positions; use CheckpointAfter"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_best_checkpoint_from_before_rounding_is_said_and_said_again_when_it_is_tested(tmp_path, resumed):
    def train(epochs, ckpt_path=None):
        model, best = Worsens(), saving(ModelCheckpoint, tmp_path)
        ours = callbacks()
        arguments = {"enable_checkpointing": True, "max_epochs": epochs, "ckpt_path": ckpt_path}
        return fit(model, [*ours, best], tmp_path, **arguments), model, ours[1]

    with pytest.warns(UserWarning, match=BEST):
        trainer, model, rounding = train(2)
    if resumed:
        trainer.save_checkpoint(path := tmp_path / "two.ckpt")
        with pytest.warns(UserWarning, match=BEST):
            trainer, model, rounding = train(3, path)
    rounded = model.offsets
    trainer.test(model, verbose=False)  # the model as it is: nothing is said
    with pytest.warns(
        UserWarning, match=r"is a checkpoint from before rounding: the positions of net.0, net.2 are not"
    ):
        trainer.test(model, ckpt_path="best", verbose=False)
    assert not torch.equal(model.offsets, rounded)
    assert rounding.rounded_at == AT  # and not what that checkpoint says


def test_a_checkpoint_that_begins_after_rounding(tmp_path):
    model, best = Worsens(), saving(CheckpointAfterRounding, tmp_path)
    trainer = fit(model, [*callbacks(), best], tmp_path, enable_checkpointing=True, max_epochs=4)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["epoch=1-step=12.ckpt"]
    trainer.test(model, ckpt_path="best", verbose=False)
    assert torch.equal(model.offsets, model.offsets.round())


def test_it_saves_by_steps_and_at_epochs_without_validation(tmp_path):
    every = CheckpointAfterRounding(tmp_path / "a", every_n_train_steps=2, save_top_k=-1)
    fit(TinyModule(), [*callbacks(), every], tmp_path, enable_checkpointing=True)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["epoch=1-step=10.ckpt", "epoch=1-step=12.ckpt"]
    each = CheckpointAfterRounding(tmp_path / "b", save_top_k=-1)
    fit(TinyModule(), [*callbacks(), each], tmp_path, enable_checkpointing=True, max_epochs=3)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["epoch=1-step=12.ckpt", "epoch=2-step=18.ckpt"]


def test_without_rounding_it_would_never_save(tmp_path):
    with pytest.raises(RuntimeError, match="CheckpointAfterRounding would never save: add RoundThenFinetune"):
        fit(TinyModule(), [CheckpointAfterRounding(tmp_path)], tmp_path, enable_checkpointing=True)


# ---- killed after the last checkpoint


def saved_at_the_end(tmp_path, name, **arguments):
    """A training that was killed after its last epoch's checkpoint: what came after it is gone."""
    rounding = RoundThenFinetune(at_step=AT)
    ours = [PositionLRSchedule(3.0, 1), rounding, OffsetLogger(5)]
    last = ModelCheckpoint(tmp_path, filename="last", **arguments)
    logger = CSVLogger(tmp_path, name="", version=name)
    fit(Worsens(), [*ours, last], tmp_path, logger=logger, enable_checkpointing=True)
    for path in (tmp_path / name).glob("shapes.*"):
        path.unlink()
    return tmp_path / "last.ckpt"


@pytest.mark.parametrize("arguments", [{}, {"every_n_train_steps": STEPS}])
def test_what_is_made_at_the_end_is_made_at_the_resume(tmp_path, arguments):
    path = saved_at_the_end(tmp_path, "killed", **arguments)
    ours = [PositionLRSchedule(3.0, 1), RoundThenFinetune(at_step=AT), OffsetLogger(5)]
    model, spy = Worsens(), Spy()
    logger = CSVLogger(tmp_path, name="", version="resumed")
    last = ModelCheckpoint(tmp_path, filename="last", **arguments)
    trainer = fit(model, [*ours, spy, last], tmp_path, logger=logger, ckpt_path=path, enable_checkpointing=True)
    assert spy.offsets == []
    assert trainer.global_step == STEPS
    assert {path.name for path in (tmp_path / "resumed").iterdir()} >= {"shapes.png", "shapes.gif"}
    assert torch.equal(model.offsets, model.offsets.round())
    assert list(evaluate_stages(trainer, model, ours[1])) == ["before rounding", "after rounding", "after fine-tuning"]


def test_what_was_not_done_is_said_at_the_resume(tmp_path):
    trainer = fit(TinyModule(), [PositionLRSchedule(3.0, 1)], tmp_path)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    ours = [PositionLRSchedule(3.0, 1), RoundThenFinetune(at_step=AT), OffsetLogger(5)]
    with pytest.warns(UserWarning, match=r"ended at step 12, before `at_step` \(=9\); the positions are not rounded"):
        fit(TinyModule(), ours, tmp_path, ckpt_path=path)
    assert (tmp_path / "shapes.png").exists()
