"""PositionLRSchedule beside Lightning's own callbacks, tuners and anybody's schedulers."""

import warnings

import lightning.pytorch as pl
import pytest
import timm.scheduler
import torch
import torch.nn.functional as F
from helpers.schedulers import SCHEDULERS
from helpers.tiny import STEPS_PER_EPOCH, Spy, TinyModule, fit, loader
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

from lightning_acu import ConvertConfig
from lightning_acu.callbacks import PositionLRSchedule

pytestmark = pytest.mark.slow

SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731


class Used(TinyModule):
    """Notes the learning rates each step is taken with."""

    monitor, interval = None, "step"

    def __init__(self, scheduler=None, **arguments):
        super().__init__(scheduler=scheduler, **arguments)
        self.used = []

    def on_before_optimizer_step(self, optimizer):
        self.used.append([group["lr"] for group in optimizer.param_groups])

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach() * 0 + 1)
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": self.interval, "monitor": "loss"}
        return [optimizer], [scheduler]


@pytest.mark.filterwarnings("ignore:A `(OneCycleLR|CyclicLR)` scheduler is using 'interval'")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_ratio_holds_at_every_step_under_every_torch_scheduler(tmp_path, name, interval):
    rates = []
    for callbacks in ([], [PositionLRSchedule(0.05, 0)]):
        torch.manual_seed(0)
        model = Used(SCHEDULERS[name])
        model.interval = interval
        fit(model, callbacks, tmp_path, loader(batches=2) if interval == "epoch" else None, max_epochs=4)
        rates.append(model.used)
    assert [weights for weights, _ in rates[1]] == [weights for (weights,) in rates[0]]
    assert len({weights for weights, _ in rates[1]}) > 1 or (name, interval) in CONSTANT_SO_FAR
    for weights, positions in rates[1]:
        assert positions == pytest.approx(0.05 * weights, rel=1e-12)


#: Schedulers that do not change the rate within 4 epochs.
CONSTANT_SO_FAR = {("ConstantLR", "epoch")}


class UsedWithTimm(Used):
    """As timm's users write it: its schedulers want the epoch, or the number of updates."""

    def lr_scheduler_step(self, scheduler, metric):
        if self.interval == "epoch":
            scheduler.step(epoch=self.current_epoch + 1)
        else:
            scheduler.step_update(num_updates=self.global_step)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o, by: timm.scheduler.CosineLRScheduler(o, 8, lr_min=0.01, warmup_t=2, warmup_lr_init=0.02, **by),
        lambda o, by: timm.scheduler.StepLRScheduler(o, decay_t=2, decay_rate=0.5, **by),
    ],
    ids=["CosineLRScheduler", "StepLRScheduler"],
)
def test_the_ratio_holds_under_timms_schedulers(tmp_path, scheduler, interval):
    rates = []
    for callbacks in ([], [PositionLRSchedule(0.05, 0)]):
        model = UsedWithTimm(lambda optimizer: scheduler(optimizer, {"t_in_epochs": interval == "epoch"}))
        model.interval = interval
        fit(model, callbacks, tmp_path, loader(batches=2) if interval == "epoch" else None, max_epochs=4)
        rates.append(model.used)
    assert [weights for weights, _ in rates[1]] == [weights for (weights,) in rates[0]]
    assert len({weights for weights, _ in rates[1]}) > 1
    for weights, positions in rates[1]:
        assert positions == pytest.approx(0.05 * weights, rel=1e-12)


# ---- LearningRateMonitor


class Recorder(CSVLogger):
    """Notes what it is given."""

    def __init__(self, directory):
        super().__init__(directory)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


@pytest.mark.parametrize("monitor_first", [False, True])
@pytest.mark.parametrize(
    ("name", "interval"),
    [
        ("OneCycleLR", "step"),
        ("CosineAnnealingLR", "epoch"),
        ("CyclicLR", "step"),
        ("ReduceLROnPlateau", "epoch"),
        (None, "step"),
    ],
)
def test_the_monitor_logs_what_is_used(tmp_path, name, interval, monitor_first):
    model, recorder = Used(SCHEDULERS.get(name)), Recorder(tmp_path)
    model.interval = interval
    schedule = PositionLRSchedule(0.05, 2, schedule="cosine" if interval == "step" else "constant")
    callbacks = [LearningRateMonitor(), schedule] if monitor_first else [schedule, LearningRateMonitor()]
    fit(model, callbacks, tmp_path, logger=recorder, log_every_n_steps=1, max_epochs=3)
    logged = [row for row in recorder.rows if any("lr-" in key for key in row)]
    assert {key for row in logged for key in row} == {"lr-SGD/pg1", "lr-SGD/acu_positions"}
    per_step = name is None or interval == "step"
    used = model.used if per_step else model.used[::STEPS_PER_EPOCH]
    if name is None:  # both intervals
        logged = logged[1:]
        logged = [row for index, row in enumerate(logged) if (index + 1) % (STEPS_PER_EPOCH + 1)]
    assert [[row["lr-SGD/pg1"], row["lr-SGD/acu_positions"]] for row in logged] == used


class StepsByHand(Used):
    """A scheduler that the module itself steps when an epoch ends."""

    def __init__(self):
        super().__init__(SCHEDULERS["CosineAnnealingLR"])
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def on_train_epoch_end(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return [optimizer], [self.make_scheduler(optimizer)]


def test_the_monitor_behind_it_logs_what_is_used_where_the_module_steps_its_scheduler(tmp_path):
    model, recorder = StepsByHand(), Recorder(tmp_path)
    callbacks = [PositionLRSchedule(0.05, 0), LearningRateMonitor("epoch")]
    fit(model, callbacks, tmp_path, logger=recorder, max_epochs=4)
    logged = [[row["lr-SGD/pg1"], row["lr-SGD/acu_positions"]] for row in recorder.rows if "lr-SGD/pg1" in row]
    assert logged == model.used[::STEPS_PER_EPOCH]
    assert logged[-1] == pytest.approx([logged[-1][0], 0.05 * logged[-1][0]])


# ---- tuners


class Tuned(TinyModule):
    """With the attributes that the tuners set."""

    def __init__(self, lr=0.1, batch_size=4, convert=True):
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=self.lr, momentum=0.9), convert=convert)
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self):
        return loader(self.batch_size, 24 // self.batch_size)


class AtTheStart(pl.Callback):
    """What the training proper begins with."""

    def on_train_start(self, trainer, pl_module):
        if trainer.callbacks and self in trainer.callbacks:
            self.offsets, self.rates = pl_module.offsets, [g["lr"] for g in trainer.optimizers[0].param_groups]


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def tuned(tmp_path, callbacks, module):
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks, max_epochs=4, **QUIET)
    return trainer, module


@pytest.mark.parametrize("finder_first", [False, True])
def test_the_learning_rate_finder_leaves_positions_alone_and_the_ratio_comes_back(tmp_path, finder_first):
    finder, schedule, start = (
        LearningRateFinder(1e-3, num_training_steps=24, early_stop_threshold=None),
        PositionLRSchedule(0.5, 0),
        AtTheStart(),
    )
    model, spy = Tuned(), Spy()
    with torch.no_grad():
        model.net[0].offsets.fill_(0.25)
    before = model.offsets
    callbacks = [finder, schedule] if finder_first else [schedule, finder]
    seen = note_positions_in_every_step(model)
    fit(model, [*callbacks, start, spy], tmp_path, max_epochs=4)
    assert len(seen) == 24 + 24
    assert all(torch.equal(offsets, before) for offsets in seen[:24])
    assert torch.equal(start.offsets, before)
    suggestion = finder.optimal_lr.suggestion()
    assert model.lr == suggestion not in (None, 0.1)
    for weights, positions in spy.rates:
        assert weights == suggestion
        assert positions == pytest.approx(0.5 * weights)
    assert not torch.equal(model.offsets, before)


def note_positions_in_every_step(model):
    """Also in steps of a tuner, which calls no callback."""
    seen, step = [], model.training_step

    def training_step(batch, batch_idx):
        seen.append(model.offsets)
        return step(batch, batch_idx)

    model.training_step = training_step
    return seen


def test_the_tuner_finds_the_learning_rate_of_the_network_with_still_positions(tmp_path):
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        callbacks = [PositionLRSchedule(0.5, 0)] if convert else []
        trainer, model = tuned(tmp_path, callbacks, Tuned(convert=convert))
        finder = Tuner(trainer).lr_find(
            model, min_lr=1e-3, num_training=24, early_stop_threshold=None, update_attr=True
        )
        results.append((finder.results["loss"], finder.suggestion(), model.lr))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert results[1][1:] == results[0][1:]
    assert model.lr == results[1][1] not in (None, 0.1)
    assert (model.offsets == 0).all()
    assert not {"configure_gradient_clipping", "clip_gradients"} & set(vars(model))
    spy = Spy()
    trainer.callbacks.append(spy)
    trainer.fit(model)
    for weights, positions in spy.rates:
        assert weights == model.lr
        assert positions == pytest.approx(0.5 * weights)
    assert model.offsets.abs().max() > 0


@pytest.mark.parametrize("as_callback", [False, True])
def test_looking_for_a_batch_size_leaves_positions_alone(tmp_path, as_callback):
    model, start = Tuned(batch_size=2), AtTheStart()
    callbacks = [PositionLRSchedule(0.5, 0), start]
    if as_callback:
        callbacks.append(BatchSizeFinder(steps_per_trial=2, init_val=2, max_trials=2))
    trainer, model = tuned(tmp_path, callbacks, model)
    seen = note_positions_in_every_step(model)
    if not as_callback:
        Tuner(trainer).scale_batch_size(model, steps_per_trial=2, init_val=2, max_trials=2)
        assert all((offsets == 0).all() for offsets in seen)
        assert len(seen) > 2
    trainer.fit(model)
    assert model.batch_size > 2
    assert (start.offsets == 0).all()
    assert start.rates[1] == pytest.approx(0.5 * start.rates[0])
    assert model.offsets.abs().max() > 0.1


# ---- fine-tuning


class WithBackbone(pl.LightningModule):
    """Frozen until BackboneFinetuning thaws it."""

    def __init__(self, optimizer=SGD):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh())
        self.head = nn.Conv2d(4, 3, 3, padding=1)
        self.make_optimizer = optimizer
        ConvertConfig().apply(self)
        self.used = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.head(self.backbone(batch[0])).mean((2, 3)), batch[1])

    def configure_optimizers(self):
        return self.make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    def on_before_optimizer_step(self, optimizer):
        self.used.append({self.name_of(group): group["lr"] for group in optimizer.param_groups})

    def name_of(self, group):
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return " ".join(names[id(parameter)] for parameter in group["params"])


HEAD, BACKBONE = "head.weight head.bias", "backbone.0.weight backbone.0.bias"
POSITIONS = {HEAD: "head.offsets", BACKBONE: "backbone.0.offsets"}


def finetuning():
    return BackboneFinetuning(1, lambda_func=lambda epoch: 2.0, backbone_initial_ratio_lr=0.1, should_align=False)


def in_order(first, schedule):
    return [finetuning(), schedule] if first == "finetuning" else [schedule, finetuning()]


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("first", ["finetuning", "schedule"])
@pytest.mark.parametrize("warmup", [0, 8])
def test_a_backbone_that_is_thawed_gets_a_group_for_its_positions(tmp_path, first, warmup):
    """With a warm-up, its positions and the head's are all zeros when it is thawed, equal for Lightning."""
    model = WithBackbone()
    head, trunk = model.head, model.backbone[0]
    fit(model, in_order(first, PositionLRSchedule(0.5, warmup)), tmp_path, max_epochs=4)
    assert [set(used) for used in model.used[::STEPS_PER_EPOCH]] == [{HEAD, "head.offsets"}] + [
        {HEAD, BACKBONE, *POSITIONS.values()}
    ] * 3
    expected = {0: None, 1: 0.01, 2: 0.02, 3: 0.04}  # Lightning doubles the backbone's learning rate
    for step, used in enumerate(model.used):
        assert used[HEAD] == 0.1
        assert used["head.offsets"] == pytest.approx(0.05)
        if step >= STEPS_PER_EPOCH:
            assert used[BACKBONE] == pytest.approx(expected[step // STEPS_PER_EPOCH])
            assert used["backbone.0.offsets"] == pytest.approx(0.5 * used[BACKBONE])
    assert trunk.offsets.abs().max() > 0.05
    assert head.offsets.abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("warmup", [0, 8])
@pytest.mark.parametrize("first", ["finetuning", "schedule"])
def test_a_run_with_a_thawed_backbone_can_be_resumed(tmp_path, first, warmup):
    def callbacks():
        return in_order(first, PositionLRSchedule(0.5, warmup))

    model = WithBackbone()
    trainer = fit(model, callbacks(), tmp_path, max_epochs=3)
    trainer.save_checkpoint(path := tmp_path / "model.ckpt")
    resumed = WithBackbone()
    again = fit(resumed, callbacks(), tmp_path, max_epochs=5, ckpt_path=path)
    names = [[model.name_of(g) for g in trainer.optimizers[0].param_groups]]
    names += [[resumed.name_of(g) for g in again.optimizers[0].param_groups]]
    assert names[0] == names[1]
    assert resumed.used[0][BACKBONE] == pytest.approx(0.04)
    for used in resumed.used:
        for weights, positions in POSITIONS.items():
            assert used[positions] == pytest.approx(0.5 * used[weights])


# ---- others


def test_a_schedule_of_accumulation(tmp_path):
    spy, model = Spy(), TinyModule(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.2))
    callbacks = [GradientAccumulationScheduler({0: 1, 1: 3}), PositionLRSchedule(0.05, 0), spy]
    trainer = fit(model, callbacks, tmp_path)
    assert trainer.global_step == 8
    steps = [(after - before)[0:2].norm().item() for before, after in zip(spy.offsets, spy.offsets[1:], strict=False)]
    assert steps == pytest.approx([0.01] * 6 + [0.0, 0.0, 0.01, 0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("swa_first", [False, True])
def test_stochastic_weight_averaging(tmp_path, swa_first):
    swa, schedule = StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2), PositionLRSchedule(0.5, 0)
    model = Used(SCHEDULERS["CosineAnnealingLR"])
    model.interval = "epoch"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        fit(model, [swa, schedule] if swa_first else [schedule, swa], tmp_path, max_epochs=5)
    assert len({weights for weights, _ in model.used}) > 2
    for weights, positions in model.used:
        assert positions == pytest.approx(0.5 * weights, rel=1e-12)
    assert model.offsets.abs().max() > 0.05


OPTIMIZERS = {
    "SGD": SGD,
    "SGD in two groups": lambda p: torch.optim.SGD(
        [{"params": (p := list(p))[:3]}, {"params": p[3:], "lr": 0.05}], 0.1
    ),
    "named": lambda p: torch.optim.SGD([(f"p{i}", q) for i, q in enumerate(p)], lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW with a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.05)),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
}


class StopAfter(pl.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


@pytest.mark.parametrize("schedule", ["cosine", "lattice"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name, schedule):
    def train(epochs, ckpt_path=None):
        torch.manual_seed(0)
        model = Used(SCHEDULERS["LinearLR"], optimizer=OPTIMIZERS[name])
        callbacks = [PositionLRSchedule(2.0, 3, schedule=schedule), StopAfter(epochs)]
        return model, fit(model, callbacks, tmp_path, ckpt_path=ckpt_path, max_epochs=3)

    whole, trainer = train(3)
    train(1)[1].save_checkpoint(path := tmp_path / "stopped.ckpt")
    resumed, again = train(3, path)
    assert resumed.used == whole.used[STEPS_PER_EPOCH:]
    assert torch.equal(resumed.offsets, whole.offsets)
    assert torch.equal(resumed.weights, whole.weights)
    one, other = (t.optimizers[0].state_dict() for t in (trainer, again))
    assert one["param_groups"] == other["param_groups"]
    torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    assert schedule == "lattice" or whole.offsets.abs().max() > 0.01
