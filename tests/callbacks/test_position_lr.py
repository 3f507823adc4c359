"""PositionLRSchedule under a Trainer: own learning rate, exact warm-up, clear errors."""

import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import ManualModule, Spy, TinyModule, fit, loader
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.callbacks._trainer import require_whole_positions
from lightning_acu.callbacks.schedules import Cosine, Schedule

OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
}


def lengths(before, after):
    """How far each tap went from one (36,) to the next: (layer, tap)."""
    return (after - before).view(2, 9, 2).norm(dim=-1)


def assert_steps(spy, length, atol=1e-7):
    """Every tap but the fixed centre goes ``length`` at every step."""
    expected = torch.tensor([1.0] * 4 + [0.0] + [1.0] * 4).expand(2, 9) * length
    for before, after in zip(spy.offsets, spy.offsets[1:], strict=False):
        torch.testing.assert_close(lengths(before, after), expected, rtol=0, atol=atol)


def sgd(**arguments):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.2, **arguments)


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_positions_are_bit_identical_during_warmup_and_move_after(tmp_path, name, module):
    spy = Spy()
    model = module(optimizer=OPTIMIZERS[name])
    with torch.no_grad():
        model.net[0].offsets.copy_(torch.rand(18))  # decay would move these even without a gradient
    # (manual optimisation counts steps through the same global_step)
    fit(model, [PositionLRSchedule(0.1, warmup_steps=7, weight_decay=0.1), spy], tmp_path)
    first, *rest = spy.offsets
    for step, offsets in enumerate(rest, start=1):  # offsets before step number `step`
        assert torch.equal(offsets, first) == (step <= 7), step


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
def test_a_step_is_the_learning_rate_in_pixels_under_sgd(tmp_path, module):
    spy = Spy()
    model = module(optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    fit(model, [PositionLRSchedule(0.05, warmup_steps=0), spy], tmp_path)
    for before, after in zip(spy.offsets, spy.offsets[1:], strict=False):
        moved = (after - before).view(2, 9, 2).norm(dim=-1)
        expected = torch.tensor([0.01] * 4 + [0.0] + [0.01] * 4)
        torch.testing.assert_close(moved, expected.expand(2, 9), rtol=1e-4, atol=1e-7)


def test_without_normalize_the_gradient_itself_is_used(tmp_path):
    spy = Spy()
    model = TinyModule(optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    fit(model, [PositionLRSchedule(1.0, warmup_steps=0, normalize=False), spy], tmp_path)
    steps = (spy.offsets[1] - spy.offsets[0]).view(2, 9, 2).norm(dim=-1)
    assert steps.max() > 1.5 * steps[steps > 0].min()


def test_the_ratio_holds_at_every_step_under_an_absolute_schedule(tmp_path):
    spy = Spy()
    model = TinyModule(scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=12))
    fit(model, [PositionLRSchedule(0.01, warmup_steps=0), spy], tmp_path)
    rates = spy.rates[1:]
    assert len({weights for weights, _ in rates}) > 5
    for weights, positions in rates:
        assert positions == pytest.approx(0.01 * weights, rel=1e-9)


def test_the_module_is_left_as_it_was(tmp_path):
    model = TinyModule()
    fit(model, [PositionLRSchedule(0.01, 0)], tmp_path)
    assert "configure_gradient_clipping" not in vars(model)
    fit(model, [PositionLRSchedule(0.01, 0)], tmp_path)  # and can train again


@pytest.mark.parametrize("name", ["multiplier", "warmup_steps", "weight_decay"])
def test_negative_arguments(name):
    with pytest.raises(ValueError, match=rf"`{name}` \(=-1\) must not be negative"):
        PositionLRSchedule(**{name: -1})


def test_a_model_without_active_convolutions(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"PositionLRSchedule: TinyModule has no active convolution; call convert_to_acu"
    ):
        fit(TinyModule(convert=False), [PositionLRSchedule()], tmp_path)


def test_positions_that_no_optimizer_holds(tmp_path):
    model = TinyModule()
    model.make_optimizer = lambda parameters: torch.optim.SGD([model.net[0].weight], lr=0.1)
    with pytest.raises(
        RuntimeError, match=r"no optimizer holds the positions of net\.2, nor their weights; give them to one in"
    ):
        fit(model, [PositionLRSchedule()], tmp_path)


def test_a_warmup_that_never_ends_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"`warmup_steps` \(=10000\) is not less than the 12 steps of this training"):
        fit(TinyModule(), [PositionLRSchedule()], tmp_path)


class Stream:
    """Batches whose number nobody knows before."""

    def __iter__(self):
        yield from loader()


@pytest.mark.parametrize("data", [loader, Stream], ids=["known length", "unknown length"])
def test_a_warmup_of_whole_epochs(tmp_path, data):
    spy = Spy()
    model = TinyModule(optimizer=OPTIMIZERS["AdamW"])
    schedule = PositionLRSchedule(0.1, warmup_epochs=1, weight_decay=0.1, max_displacement=0.5)
    fit(model, [schedule, spy], tmp_path, data())
    first, *rest = spy.offsets
    assert [torch.equal(offsets, first) for offsets in rest] == [True] * 6 + [False] * 5


def test_the_limit_holds_after_a_warmup_of_epochs_of_unknown_length(tmp_path):
    model = TinyModule(optimizer=sgd())
    schedule = PositionLRSchedule(5.0, warmup_epochs=1, max_displacement=0.5)
    fit(model, [schedule], tmp_path, Stream())
    assert lengths(torch.zeros(36), model.offsets).max() == pytest.approx(0.5)


def test_a_schedule_begins_when_the_warmup_of_epochs_ends(tmp_path):
    spy = Spy()
    fit(TinyModule(), [PositionLRSchedule(0.1, warmup_epochs=1, schedule="linear"), spy], tmp_path)
    factors = [positions / (0.1 * weights) for weights, positions in spy.rates]
    assert factors == pytest.approx([1.0] * 6 + [1 - step / 6 for step in range(6)])


@pytest.mark.parametrize("data", [loader, Stream], ids=["known length", "unknown length"])
def test_a_long_warmup_of_epochs_warns_only_where_it_can_know(tmp_path, data):
    schedule = PositionLRSchedule(0.1, warmup_epochs=2)
    if data is loader:
        with pytest.warns(UserWarning, match=r"`warmup_epochs` \(=2\) is not less than the 12 steps"):
            fit(TinyModule(), [schedule], tmp_path)
    else:
        fit(TinyModule(), [schedule], tmp_path, data())


class Halves(Schedule):
    """Of a user's own."""

    needs_total = False

    def rate(self, step, total):
        return 0.5**step


@pytest.mark.parametrize(
    ("schedule", "factor"),
    [
        ("constant", lambda progress, step: 1.0),
        ("cosine", lambda progress, step: (1 + math.cos(math.pi * progress)) / 2),
        (Cosine(0.2), lambda progress, step: 0.2 + 0.4 * (1 + math.cos(math.pi * progress))),
        ("linear", lambda progress, step: 1 - progress),
        ("step", lambda progress, step: 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01),
        ("lattice", lambda progress, step: min(1.0, 2 * (1 - progress))),
        (Halves(), lambda progress, step: 0.5**step),
    ],
    ids=["constant", "cosine", "cosine with a floor", "linear", "step", "lattice", "own"],
)
@pytest.mark.parametrize(
    ("module", "arguments", "total"),
    [
        (TinyModule, {}, 12),
        (TinyModule, {"max_steps": 10, "max_epochs": -1}, 10),
        (TinyModule, {"accumulate_grad_batches": 2, "max_epochs": 3}, 9),
        (ManualModule, {}, 12),
    ],
    ids=["epochs", "steps", "accumulating", "manual"],
)
def test_the_learning_rate_has_the_factor_of_the_schedule_at_every_step(
    tmp_path, schedule, factor, module, arguments, total
):
    used = []

    class Used(module):
        def on_before_optimizer_step(self, optimizer):
            used.append([group["lr"] for group in optimizer.param_groups])

    scheduler = None if module is ManualModule else lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, 12)
    fit(Used(scheduler=scheduler), [PositionLRSchedule(0.1, warmup_steps=4, schedule=schedule)], tmp_path, **arguments)
    assert len(used) == total
    for step, (weights, positions) in enumerate(used):
        learning = max(0, step - 4)
        assert positions == pytest.approx(0.1 * weights * factor(learning / (total - 4), learning), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("optimizer", ["SGD with momentum", "AdamW"])
@pytest.mark.parametrize("module", [TinyModule, ManualModule])
def test_the_lattice_schedule_ends_on_whole_pixels_with_the_training(tmp_path, module, optimizer):
    spy, model = Spy(), module(optimizer=OPTIMIZERS[optimizer])
    fit(model, [PositionLRSchedule(2.0, warmup_steps=2, schedule="lattice"), spy], tmp_path, max_epochs=3)
    assert torch.equal(model.offsets, model.offsets.round())
    assert model.offsets.abs().max() >= 1
    distances = [(offsets - offsets.round()).abs().mean() for offsets in spy.offsets]
    assert distances[-1] < 0.2 * max(distances)


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("rounding_first", [False, True])
@pytest.mark.parametrize("when", [{"at_step": 11}, {"at_epoch": 2}, {"at_fraction": 0.7}])
def test_rounding_moves_nothing_after_the_lattice_schedule(tmp_path, when, rounding_first, limit):
    rounding = RoundThenFinetune(**when)
    schedule = PositionLRSchedule(2.0, warmup_steps=2, schedule="lattice", max_displacement=limit)
    spy, model = Spy(), TinyModule()
    fit(model, [rounding, schedule, spy] if rounding_first else [schedule, rounding, spy], tmp_path, max_epochs=3)
    before, after = (
        torch.load(rounding.checkpoints[name], weights_only=True)["state_dict"]["net.0.offsets"]
        for name in ("before_rounding", "rounded")
    )
    assert torch.equal(before, after)
    assert after.abs().max() >= 1
    for offsets in spy.offsets[rounding.rounded_at :]:
        assert torch.equal(offsets[:18], after)


def test_taps_keep_within_the_limit_at_every_step(tmp_path):
    spy, model = Spy(), TinyModule()
    fit(model, [PositionLRSchedule(2.0, warmup_steps=2, max_displacement=0.4), spy], tmp_path)
    distances = torch.stack([lengths(torch.zeros(36), offsets) for offsets in [*spy.offsets, model.offsets]])
    assert distances.max() == pytest.approx(0.4, rel=1e-6)
    assert (distances[-1] > 0.399).sum() > 8
    assert (distances[-1] < 0.39).sum() > 2  # the fixed centres, and taps that came back


def test_a_limit_does_not_pull_rounded_taps_back(tmp_path):
    spy, model, rounding = Spy(), TinyModule(), RoundThenFinetune(at_step=6)
    fit(model, [PositionLRSchedule(3.0, warmup_steps=1, max_displacement=0.7), rounding, spy], tmp_path)
    assert spy.offsets[6].abs().max() == 1
    assert all(torch.equal(offsets, spy.offsets[6]) for offsets in [*spy.offsets[6:], model.offsets])


@pytest.mark.parametrize("extra", [{"schedule": "lattice"}, {"max_displacement": 0.1}])
def test_a_frozen_layer_stays_where_it_is(tmp_path, extra):
    model = TinyModule()
    with torch.no_grad():
        model.net[0].offsets.fill_(0.3)
    model.net[0].offsets.requires_grad_(False)
    fit(model, [PositionLRSchedule(1.0, 0, **extra)], tmp_path)
    assert (model.net[0].offsets == 0.3).all()
    assert model.net[2].offsets.abs().max() > 0


def test_a_layer_that_somebody_thaws_later_has_the_learning_rate_of_positions(tmp_path):
    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.net[0].offsets.requires_grad_(trainer.current_epoch == 1)

    model, spy = TinyModule(optimizer=sgd()), Spy()
    model.net[0].offsets.requires_grad_(False)
    fit(model, [PositionLRSchedule(0.05, 0), Thaw(), spy], tmp_path)
    steps = torch.stack([lengths(*pair)[0, 0] for pair in zip(spy.offsets, spy.offsets[1:], strict=False)])
    torch.testing.assert_close(steps, torch.tensor([0.0] * 6 + [0.01] * 5), rtol=0, atol=1e-7)


# ---- several optimizers


class TwoNets(pl.LightningModule):
    """As a GAN: two networks, an optimizer each, stepped one after the other."""

    def __init__(self, every=(1, 1)):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = TinyModule(), TinyModule()
        self.every = every
        self.used = [[], []]

    def training_step(self, batch, batch_idx):
        for index, (net, optimizer) in enumerate(zip((self.one, self.two), self.optimizers(), strict=True)):
            loss = net.training_step(batch, batch_idx) / self.every[index]
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss)
            if (batch_idx + 1) % self.every[index] == 0:
                optimizer.step()
                optimizer.zero_grad()
                self.used[index].append([group["lr"] for group in optimizer.param_groups])
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [sgd()(net.parameters()) for net in (self.one, self.two)]


class TwoSpies(Spy):
    """Offsets of both networks."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.offsets.append((pl_module.one.offsets, pl_module.two.offsets))

    def steps(self, net):
        """How far the first tap went, in each batch."""
        pairs = zip(self.offsets, self.offsets[1:], strict=False)
        return torch.stack([lengths(before[net], after[net])[0, 0] for before, after in pairs]).tolist()


def test_two_optimizers_under_one_callback(tmp_path):
    spy, model = TwoSpies(), TwoNets()
    fit(model, [PositionLRSchedule(0.05, 0), spy], tmp_path)
    assert spy.steps(0) == pytest.approx([0.01] * 11, abs=1e-7)
    assert spy.steps(1) == pytest.approx([0.01] * 11, abs=1e-7)


def test_two_callbacks_serve_two_optimizers_with_multipliers_of_their_own(tmp_path):
    spy, model = TwoSpies(), TwoNets()
    callbacks = [
        PositionLRSchedule(0.05, 0, optimizer_idx=0),
        PositionLRSchedule(0.1, warmup_steps=9, optimizer_idx=1, schedule="linear"),
    ]
    fit(model, [*callbacks, spy], tmp_path)
    assert spy.steps(0) == pytest.approx([0.01] * 11, abs=1e-7)
    # Two steps of the trainer a batch: the warm-up ends at step 9, the second of batch 4; the training has 24.
    linear = [0.02 * (1 - (2 * batch + 1 - 9) / 15) for batch in range(4, 11)]
    assert spy.steps(1) == pytest.approx([0.0] * 4 + linear, abs=1e-7)
    assert model.used[1][-1] == pytest.approx([0.2, 0.02 / 15])


def test_positions_of_an_optimizer_that_is_not_served_stay_in_its_own_group(tmp_path):
    spy, model = TwoSpies(), TwoNets()
    fit(model, [PositionLRSchedule(0.05, 0, optimizer_idx=0), spy], tmp_path)
    assert [len(rates[0]) for rates in model.used] == [2, 1]
    assert spy.steps(0) == pytest.approx([0.01] * 11, abs=1e-7)
    assert len({round(step, 5) for step in spy.steps(1)}) > 3  # the gradients as they are


@pytest.mark.parametrize(("every", "steps"), [((1, 1), 24), ((3, 1), 16), ((1, 4), 14)])
def test_every_optimizer_ends_on_whole_pixels(tmp_path, every, steps):
    """Whichever stepped last."""
    model = TwoNets(every)
    with torch.no_grad():
        model.one.net[0].offsets.fill_(0.3)
    fit(model, [PositionLRSchedule(1.0, 0, schedule="lattice")], tmp_path, max_steps=steps)
    for net in (model.one, model.two):
        assert torch.equal(net.offsets, net.offsets.round())


@pytest.mark.parametrize("second", ["plain", "active"])
def test_the_limit_holds_for_the_optimizer_that_steps_first(tmp_path, second):
    model = TwoNets()
    if second == "plain":
        model.two = TinyModule(convert=False)
    fit(model, [PositionLRSchedule(2.0, 0, max_displacement=0.5)], tmp_path)
    assert lengths(torch.zeros(36), model.one.offsets).max() == pytest.approx(0.5)


def test_gradients_accumulated_by_hand_are_normalised_once(tmp_path):
    spy, model = TwoSpies(), TwoNets(every=(3, 1))
    fit(model, [PositionLRSchedule(0.05, 0), spy], tmp_path)
    assert spy.steps(0) == pytest.approx(([0.0, 0.0, 0.01] * 4)[:11], abs=1e-7)
    assert spy.steps(1) == pytest.approx([0.01] * 11, abs=1e-7)


class ClippingModule(ManualModule):
    """Clips by hand, as manual optimisation has it."""

    algorithm = "norm"

    def training_step(self, batch, batch_idx):
        loss = TinyModule.training_step(self, batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1e-2, gradient_clip_algorithm=self.algorithm)
        optimizer.step()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_weights_clipped_by_hand_are_clipped_as_if_there_were_no_offsets(tmp_path, algorithm):
    weights = []
    for callbacks in ([], [PositionLRSchedule(multiplier=0, warmup_steps=0)]):
        torch.manual_seed(0)
        model = ClippingModule(convert=bool(callbacks))
        model.algorithm = algorithm
        start = model.weights
        fit(model, callbacks, tmp_path)
        weights.append(model.weights)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-7)
    assert not torch.equal(weights[1], start)


def test_positions_are_not_clipped_by_hand(tmp_path):
    spy, model = Spy(), ClippingModule(optimizer=sgd())
    fit(model, [PositionLRSchedule(0.05, 0), spy], tmp_path)
    assert_steps(spy, 0.01)


# ---- mixed precision


def half(scale=2.0**12):
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_learning_rate_under_scaled_float16(tmp_path, fused, module):
    """A fused optimizer divides gradients by the scale itself, in its step, after they were normalised."""
    spy, model = Spy(), module(optimizer=sgd(fused=fused))
    fit(model, [PositionLRSchedule(0.05, 0), spy], tmp_path, plugins=[half()])
    assert_steps(spy, 0.01, atol=1e-6)
    assert not torch.equal(spy.weights[0], spy.weights[-1])


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_skips_a_step_whose_gradient_is_infinite(tmp_path, fused, module):
    data = loader()
    images, labels = data.dataset.tensors
    images[3 * 4 : 4 * 4] = 1e30
    spy, model = Spy(), module(optimizer=sgd(fused=fused))
    fit(
        model, [PositionLRSchedule(0.05, 0), spy], tmp_path, DataLoader(TensorDataset(images, labels), 4),
        plugins=[half()], max_epochs=1,
    )  # fmt: skip
    same = [torch.equal(a, b) for a, b in zip(spy.offsets, [*spy.offsets[1:], model.offsets], strict=True)]
    assert same == [False, False, False, True, False, False]
    assert [torch.equal(a, b) for a, b in zip(spy.weights, spy.weights[1:], strict=False)] == same[:5]
    assert model.offsets.isfinite().all()


@pytest.mark.parametrize("module", [TinyModule, ManualModule])
@pytest.mark.parametrize("normalize", ["gradient", "momentum"])
def test_a_skipped_first_step_leaves_no_state_of_positions(tmp_path, normalize, module):
    """Torch's fused SGD would leave a momentum there that it never wrote."""
    data = loader()
    images, labels = data.dataset.tensors
    images[2 * 4 : 3 * 4] = 1e30  # the first batch after the warm-up

    class States(Spy):
        def on_train_batch_end(self, trainer, pl_module, *_):
            held.append(pl_module.net[0].offsets in trainer.optimizers[0].state)

    held, spy, model = [], States(), module(optimizer=sgd(fused=True, momentum=0.9))
    fit(
        model, [PositionLRSchedule(0.05, 2, normalize), spy], tmp_path, DataLoader(TensorDataset(images, labels), 4),
        plugins=[half()], max_epochs=1,
    )  # fmt: skip
    assert held == [False] * 3 + [True] * 3
    assert torch.equal(spy.offsets[3], spy.offsets[2])
    spy.offsets = spy.offsets[3:5]
    assert_steps(spy, 0.01, atol=1e-6)


def test_a_gradient_that_remains_when_positions_are_frozen_moves_nothing(tmp_path):
    class Freezes(ManualModule):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:  # a gradient of the step before is still there
                assert self.net[0].offsets.grad is not None
                self.net[0].offsets.requires_grad_(False)
            optimizer = self.optimizers()
            if self.net[0].offsets.requires_grad:
                optimizer.zero_grad()
            self.manual_backward(TinyModule.training_step(self, batch, batch_idx))
            optimizer.step()

    spy, model = Spy(), Freezes(optimizer=sgd(momentum=0.9))
    fit(model, [PositionLRSchedule(0.05, 0), spy], tmp_path, max_epochs=1)
    moved = [
        not torch.equal(a[:18], b[:18]) for a, b in zip(spy.offsets, [*spy.offsets[1:], model.offsets], strict=True)
    ]
    assert moved == [True] * 3 + [False] * 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_warmup_under_scaled_float16(tmp_path, fused):
    spy, model = Spy(), TinyModule(optimizer=sgd(fused=fused, momentum=0.9))
    fit(model, [PositionLRSchedule(0.05, 7), spy], tmp_path, plugins=[half()])
    assert [torch.equal(offsets, spy.offsets[0]) for offsets in spy.offsets[1:]] == [True] * 7 + [False] * 4


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_is_the_learning_rate_under_bfloat16(tmp_path, clip):
    spy, model = Spy(), TinyModule(optimizer=sgd())
    fit(model, [PositionLRSchedule(0.05, 0), spy], tmp_path, precision="bf16-mixed", gradient_clip_val=clip)
    assert model.net[0].offsets.dtype == torch.float32
    assert_steps(spy, 0.01, atol=1e-6)


@pytest.mark.parametrize("multiplier", [0.05, 1.0])
def test_positions_under_an_optimizer_of_their_own(tmp_path, multiplier):
    """Two of them, one for the weights: what GANs have, under mixed precision with a warm-up."""

    class Own(ManualModule):
        def training_step(self, batch, batch_idx):
            self.manual_backward(TinyModule.training_step(self, batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            offsets = [self.net[0].offsets, self.net[2].offsets]
            others = [parameter for name, parameter in self.named_parameters() if "offsets" not in name]
            return [sgd()(others), sgd()(offsets)]

    spy, model = Spy(), Own()
    fit(model, [PositionLRSchedule(multiplier, 4), spy], tmp_path, plugins=[half()], max_epochs=1)
    assert [torch.equal(offsets, spy.offsets[0]) for offsets in spy.offsets[1:]] == [True] * 2 + [False] * 3
    spy.offsets = spy.offsets[2:]
    assert_steps(spy, 0.2 * multiplier, atol=1e-6)


# ---- errors, all before the first batch


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"warmup_epochs": -1}, ValueError, r"`warmup_epochs` \(=-1\) must not be negative"),
        ({"max_displacement": -0.5}, ValueError, r"`max_displacement` \(=-0.5\) must not be negative"),
        ({"optimizer_idx": -1}, ValueError, r"`optimizer_idx` \(=-1\) must not be negative"),
        (
            {"warmup_steps": 5, "warmup_epochs": 1}, ValueError,
            r"give either `warmup_steps` \(=5\) or `warmup_epochs` \(=1\), not both",
        ),
        ({"schedule": "cosin"}, ValueError, r"`schedule` \(='cosin'\) must be a Schedule or one of 'constant'"),
        ({"schedule": 3}, TypeError, r"`schedule` \(=3\) must be a Schedule or one of"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        PositionLRSchedule(**arguments)


def frozen():
    model = TinyModule()
    for layer in (model.net[0], model.net[2]):
        layer.offsets.requires_grad_(False)
    return model


def two_with_a_plain_second():
    model = TwoNets()
    model.two = TinyModule(convert=False)
    return model


@pytest.mark.parametrize(
    ("module", "arguments", "trainer", "message"),
    [
        (lambda: TinyModule(convert=False), {}, {}, "TinyModule has no active convolution; call convert_to_acu"),
        (frozen, {}, {}, "the positions of all layers have requires_grad=False; unfreeze some"),
        (TinyModule, {"optimizer_idx": 1}, {}, r"`optimizer_idx` \(=1\) does not exist; the number of optimizers is 1"),
        (two_with_a_plain_second, {"optimizer_idx": 1}, {}, "optimizer 1 holds no positions"),
        (lambda: TinyModule(torch.optim.LBFGS), {}, {}, "LBFGS takes one parameter group only"),
        (
            TinyModule, {"schedule": "lattice", "warmup_steps": 0}, {"max_epochs": -1},
            r"`schedule` \(=LatticeDecay\(.*\)\) needs a training with a known end; set the trainer's max_steps",
        ),
    ],
    ids=["plain", "frozen", "no such optimizer", "the other optimizer", "LBFGS", "no end"],
)  # fmt: skip
def test_what_cannot_work_stops_before_training(tmp_path, module, arguments, trainer, message):
    spy = Spy()
    with pytest.raises(RuntimeError, match=rf"PositionLRSchedule: {message}"):
        fit(module(), [spy, PositionLRSchedule(0.1, **arguments)], tmp_path, **trainer)
    assert spy.offsets == []


@pytest.mark.filterwarnings("ignore:RoundThenFinetune. after rounding all taps are where they started")
def test_a_schedule_that_needs_an_end_has_one_where_positions_are_rounded(tmp_path):
    spy = Spy()
    callbacks = [PositionLRSchedule(0.1, 0, schedule="linear"), RoundThenFinetune(at_step=4), spy]
    model = TinyModule()
    fit(model, callbacks, tmp_path, Stream(), max_epochs=1)
    factors = [positions / (0.1 * weights) for weights, positions in spy.rates]
    assert factors == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_positions(strategy):
    trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(RuntimeError, match=rf"PositionLRSchedule: {strategy.__name__} flattens parameters, .*FSDP2"):
        require_whole_positions(PositionLRSchedule(), trainer)


def test_two_that_serve_the_same_optimizer(tmp_path):
    for pair in ((None, None), (None, 0), (0, 0)):
        callbacks = [PositionLRSchedule(0.1, 0, optimizer_idx=index) for index in pair]
        with pytest.raises(
            RuntimeError, match="PositionLRSchedule: two of these callbacks train the positions of one optimizer"
        ):
            fit(TinyModule(), callbacks, tmp_path)
