"""Averaged copies of a model through rounding: theirs are the model's whole positions, to the last bit."""

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import Spy, TinyModule, fit, loader, validate
from lightning.pytorch.callbacks import StochasticWeightAveraging
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_acu import acu_layers
from lightning_acu.callbacks import OffsetLogger, PositionLRSchedule, RoundThenFinetune, evaluate_stages
from lightning_acu.training import trained_layers

pytestmark = pytest.mark.slow

WeightAveraging = getattr(pl.callbacks, "WeightAveraging", None)
needs_weight_averaging = pytest.mark.skipif(WeightAveraging is None, reason="new in Lightning 2.6")
AT = 9


def ema(decay):
    return WeightAveraging(avg_fn=get_ema_avg_fn(decay))


class Module(TinyModule):
    """Validates; offsets are large, where averages are least exact."""

    def __init__(self, scale=7.0, **arguments):
        super().__init__(**arguments)
        with torch.no_grad():
            for layer in (self.net[0], self.net[2]):
                layer.offsets.uniform_(-scale, scale)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("loss", F.cross_entropy(self.net(images).mean((2, 3)), labels))

    def val_dataloader(self):
        return loader(batches=2)


def positions(net):
    return torch.cat([layer.offsets.detach() for _, layer in acu_layers(net)])


def callbacks(rounding, average, first):
    schedule = PositionLRSchedule(2.0, warmup_steps=0)
    return [schedule, rounding, average] if first else [average, schedule, rounding]


KINDS = {
    "mean": {},
    "EMA": {"avg_fn": get_ema_avg_fn(0.9)},
    "EMA, inexact": {"avg_fn": get_ema_avg_fn(0.997)},
    "EMA of all at once": {"multi_avg_fn": get_ema_multi_avg_fn(0.95)},
}


@needs_weight_averaging
@pytest.mark.parametrize("first", [True, False], ids=["rounding first", "averaging first"])
@pytest.mark.parametrize("kind", KINDS)
def test_weight_averaging_ends_with_whole_positions(tmp_path, kind, first):
    class Look(pl.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            if rounding.rounded_at is not None:
                seen.append(pl_module.offsets)

    seen, model, spy, rounding = [], Module(), Spy(), RoundThenFinetune(at_step=6)
    average, epochs = WeightAveraging(**KINDS[kind]), 40 if "inexact" in kind else 5
    fit(model, [*callbacks(rounding, average, first), Look(), spy], tmp_path, max_epochs=epochs, limit_train_batches=3)
    rounded = spy.offsets[6]
    assert torch.equal(rounded, rounded.round())
    assert not torch.equal(spy.offsets[5], spy.offsets[5].round())
    assert rounded.abs().max() > 3
    assert torch.equal(model.offsets, rounded)
    assert torch.equal(positions(average._average_model.module), rounded)
    assert all(torch.equal(offsets, rounded) for offsets in [*spy.offsets[6:], *seen])
    assert len(seen) >= epochs - 2
    assert not torch.equal(model.weights, spy.weights[-1])  # those are averaged


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="new in Lightning 2.6")
def test_ema_weight_averaging(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    model, rounding, average = Module(), RoundThenFinetune(at_step=AT), EMAWeightAveraging(decay=0.999)
    fit(model, callbacks(rounding, average, True), tmp_path, max_epochs=12)
    assert torch.equal(model.offsets, model.offsets.round())
    assert torch.equal(positions(average._average_model.module), model.offsets)


@pytest.mark.parametrize("start", [1, 3])
def test_stochastic_weight_averaging_starting_before_or_after_rounding(tmp_path, start):
    model, rounding, spy = Module(), RoundThenFinetune(at_step=AT), Spy()
    average = StochasticWeightAveraging(0.05, swa_epoch_start=start, annealing_epochs=2)
    fit(model, [*callbacks(rounding, average, True), spy], tmp_path, max_epochs=6)
    rounded = spy.offsets[AT]
    assert torch.equal(model.offsets, rounded)
    assert torch.equal(positions(average._average_model), rounded)
    assert not torch.equal(model.weights, spy.weights[-1])


def module_of(average):
    return average.ema if isinstance(average, ModelEma) else average.module


class Emas(pl.Callback):
    """A user's own, of the inner network."""

    def __init__(self, make):
        self.make, self.ema = make, None

    def on_fit_start(self, trainer, pl_module):
        self.ema = self.make(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.ema.update(pl_module.net)


def inexact_average(net):
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.997))
    average.update = average.update_parameters
    return average


class MyEma(ModelEmaV3):
    pass


EMAS = {
    "ModelEma": lambda net: ModelEma(net, decay=0.997),
    "a subclass": lambda net: MyEma(net, decay=0.9),
    "ModelEmaV3": lambda net: ModelEmaV3(net, decay=0.9),
    "ModelEmaV3 without foreach": lambda net: ModelEmaV3(net, decay=0.9998, foreach=False),
    "ModelEmaV2": lambda net: ModelEmaV2(net, decay=0.997),
    "AveragedModel": inexact_average,
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", EMAS)
def test_an_average_kept_by_a_users_callback(tmp_path, name, first):
    average, model, rounding = Emas(EMAS[name]), Module(), RoundThenFinetune(at_step=AT)
    fit(model, callbacks(rounding, average, first), tmp_path, max_epochs=12)
    assert torch.equal(positions(module_of(average.ema)), model.offsets)
    assert torch.equal(model.offsets, model.offsets.round())
    assert not torch.equal(module_of(average.ema)[0].weight, model.net[0].weight)


class WithEma(Module):
    """An average inside the module, as timm's users have."""

    def __init__(self, make):
        super().__init__()
        self.ema = make(self.net)

    def on_train_batch_end(self, *_):
        self.ema.update(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)

    @property
    def offsets(self):
        return positions(self.net)


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")
@pytest.mark.parametrize("name", EMAS)
def test_an_average_kept_by_the_module_is_no_layer_of_its_own(tmp_path, name):
    model, rounding = WithEma(EMAS[name]), RoundThenFinetune(at_step=AT)
    logger = OffsetLogger(5, figures=False, animation=False)
    fit(model, [PositionLRSchedule(2.0, 0), rounding, logger], tmp_path, max_epochs=12)
    assert torch.equal(positions(module_of(model.ema)), model.offsets)
    assert torch.equal(model.offsets, model.offsets.round())
    assert set(rounding.learned) == {"net.0", "net.2"}
    assert set(logger._last[1]) == {"net.0", "net.2"}
    assert [name for name, _ in trained_layers(model)] == ["net.0", "net.2"]


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")
@needs_weight_averaging
def test_an_average_of_a_module_with_an_average(tmp_path):
    model, rounding, average = WithEma(EMAS["ModelEmaV2"]), RoundThenFinetune(at_step=AT), ema(0.997)
    fit(model, callbacks(rounding, average, True), tmp_path, max_epochs=12)
    assert torch.equal(model.offsets, model.offsets.round())
    for net in (model.ema.module, average._average_model.module.net, average._average_model.module.ema.module):
        assert torch.equal(positions(net), model.offsets)


def test_a_teacher_of_a_callback_stays_as_it_is(tmp_path):
    class Teaches(pl.Callback):
        def __init__(self, net):
            self.teacher, self.average = net, None

    model, rounding = Module(), RoundThenFinetune(at_step=AT)
    teaches = Teaches(copy.deepcopy(model.net).requires_grad_(False))
    before = positions(teaches.teacher).clone()
    fit(model, [teaches, PositionLRSchedule(2.0, 0), rounding], tmp_path)
    assert torch.equal(positions(teaches.teacher), before)


@needs_weight_averaging
@pytest.mark.filterwarnings("ignore:RoundThenFinetune. training ended at step")
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume_before_at_and_after_rounding(tmp_path, stop):
    """Rounding is at the start of epoch 2; stopped after 1, 2 or 3 of 4 epochs."""

    class SavesThere(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch + 1 == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    def train(ckpt_path=None):
        torch.manual_seed(0)
        model = Module(optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
        average, rounding = ema(0.997), RoundThenFinetune(at_epoch=2, finetune_lr=0.1)
        extra = [] if ckpt_path else [SavesThere()]
        fit(model, [*callbacks(rounding, average, True), *extra], tmp_path, ckpt_path=ckpt_path, max_epochs=4)
        return model, average, rounding

    (model, average, rounding), (resumed, other_average, other) = train(), train(tmp_path / "stopped.ckpt")
    assert torch.equal(model.offsets, model.offsets.round())
    assert torch.equal(resumed.offsets, model.offsets)
    assert torch.equal(resumed.weights, model.weights)
    assert torch.equal(positions(other_average._average_model), positions(average._average_model))
    assert other.learned == rounding.learned


@needs_weight_averaging
@pytest.mark.parametrize("kind", ["WeightAveraging", "a user's own"])
def test_what_is_kept_and_evaluated_is_not_swapped_for_the_last_average(tmp_path, kind):
    """WeightAveraging goes on putting its average in place of the weights in each validation, also after training."""

    class Swaps(Emas):
        def on_validation_epoch_start(self, trainer, pl_module):
            self.own = copy.deepcopy(pl_module.net.state_dict())
            pl_module.net.load_state_dict(self.ema.module.state_dict())

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.net.load_state_dict(self.own)

    average = ema(0.9) if kind == "WeightAveraging" else Swaps(EMAS["ModelEmaV3"])
    model, rounding = Module(), RoundThenFinetune(at_step=AT)
    trainer = fit(model, callbacks(rounding, average, True), tmp_path, num_sanity_val_steps=0)
    expected = {}
    for stage, name in (("before rounding", "before_rounding"), ("after rounding", "rounded")):
        other = Module()
        other.load_state_dict(torch.load(rounding.checkpoints[name], weights_only=True)["state_dict"])
        expected[stage] = validate(other, tmp_path)
    expected["after fine-tuning"] = validate(model, tmp_path)
    assert len({metrics["loss"] for metrics in expected.values()}) == 3
    assert evaluate_stages(trainer, model, rounding, method="validate") == expected
    assert average in trainer.callbacks
