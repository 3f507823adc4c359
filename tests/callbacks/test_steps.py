"""Steps that do not come by Lightning's hooks."""

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import Spy, TinyModule, fit
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune

UNCOUNTED = "SGD takes steps that Lightning does not see"


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as github.com/davda54/sam has it: an optimizer within an optimizer."""

    def __init__(self, params, rho=0.05, **arguments):
        super().__init__(params, {"rho": rho, **arguments})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **arguments)
        self.param_groups = self.base_optimizer.param_groups

    def held(self):
        return [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        norm = torch.stack([p.grad.norm() for p, _ in self.held()]).norm()
        for p, _ in self.held():
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad * (0.05 / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for p, _ in self.held():
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()


class Manual(TinyModule):
    """Takes its steps in a way of its own, and notes the positions after each."""

    def __init__(self, way, convert=True):
        makers = {"sam": SAM, "sam with closure": SAM}
        super().__init__(lambda p: makers.get(way, torch.optim.SGD)(p, lr=0.1, momentum=0.9), convert=convert)
        self.automatic_optimization = False
        self.way, self.seen, self.seen_weights = way, [], []

    def training_step(self, batch, batch_idx):
        def backward():
            optimizer.zero_grad()
            self.manual_backward(super(Manual, self).training_step(batch, batch_idx))

        optimizer = self.optimizers(use_pl_optimizer=self.way == "seen")
        backward()
        if self.way == "sam":
            optimizer.first_step(zero_grad=True)
            backward()
            optimizer.second_step(zero_grad=True)
        elif self.way in ("sam with closure", "closure"):
            optimizer.step(backward)
        else:
            optimizer.step()
        self.seen.append(self.offsets)
        self.seen_weights.append(self.weights)


WAYS = ["raw", "sam", "sam with closure"]


@pytest.mark.filterwarnings(f"ignore:{UNCOUNTED}")
@pytest.mark.parametrize("way", WAYS)
def test_positions_keep_still_in_the_warm_up_and_after_rounding(tmp_path, way):
    model = Manual(way)
    rounding = RoundThenFinetune(at_epoch=2)
    fit(model, [PositionLRSchedule(1.0, warmup_epochs=1), rounding], tmp_path, max_epochs=4)
    assert all((offsets == 0).all() for offsets in model.seen[:6])
    assert model.seen[11].abs().max() > 0.1
    assert not torch.equal(model.seen[11], model.seen[11].round())
    assert torch.equal(model.offsets, model.seen[11].round())
    assert all(torch.equal(offsets, model.offsets) for offsets in model.seen[12:])
    assert not torch.equal(model.seen_weights[12], model.seen_weights[-1])


@pytest.mark.filterwarnings(f"ignore:{UNCOUNTED}")
def test_a_step_of_the_optimizer_itself_is_the_one_that_lightning_sees(tmp_path):
    """Bit for bit: gradients are normalised and clipped neither more nor less often."""
    seen = []
    for way in ("seen", "raw"):
        torch.manual_seed(0)
        model = Manual(way)
        fit(model, [PositionLRSchedule(1.0, warmup_epochs=1)], tmp_path)
        seen.append((model.offsets, model.weights))
    assert all(map(torch.equal, *seen))
    assert seen[0][0].abs().max() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_it_is_said_once_that_such_steps_are_not_counted(tmp_path, way):
    model = Manual(way)
    with pytest.warns(UserWarning, match=rf"{UNCOUNTED} .*SAM\).*`warmup_epochs` and `at_epoch`") as caught:
        trainer = fit(model, [PositionLRSchedule(1.0, warmup_steps=3)], tmp_path, max_epochs=1)
    assert sum(UNCOUNTED in str(warning.message) for warning in caught) == 1
    assert trainer.global_step == 0
    assert (model.offsets == 0).all()


def test_a_closure_that_nobody_can_look_into_is_an_error(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"SGD.step\(closure\) computed the gradients .* compute the gradients first"
    ):
        fit(Manual("closure"), [PositionLRSchedule(1.0, warmup_epochs=1)], tmp_path)


def test_an_optimizer_of_something_else_is_nobodys_business(tmp_path):
    class Other(pl.Callback):
        """As in a probe of features, which is trained beside the model."""

        def on_train_batch_end(self, *_):
            probe, optimizer = self.probe, self.optimizer
            optimizer.step(lambda: probe(torch.ones(2)).sum().backward())
            optimizer.step()

    other = Other()
    other.probe = torch.nn.Linear(2, 1)
    other.optimizer = torch.optim.SGD(other.probe.parameters(), lr=0.1)
    model = TinyModule()
    fit(model, [PositionLRSchedule(1.0, warmup_steps=0), other], tmp_path)
    assert model.offsets.abs().max() > 0.1


@pytest.mark.filterwarnings(f"ignore:{UNCOUNTED}")
def test_two_optimizers_of_which_one_is_stepped_past_lightning(tmp_path):
    """The one that Lightning sees holds no positions."""

    class Both(Manual):
        def configure_optimizers(self):
            self.head = torch.nn.Parameter(torch.zeros(3))
            return [torch.optim.SGD([self.head], lr=0.1), torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)]

        def training_step(self, batch, batch_idx):
            one, two = self.optimizers()
            one.zero_grad(), two.zero_grad()
            self.manual_backward(TinyModule.training_step(self, batch, batch_idx) + self.head.square().sum())
            one.step()
            two.optimizer.step()
            self.seen.append(self.offsets)

    model = Both("raw")
    fit(model, [PositionLRSchedule(1.0, warmup_epochs=1)], tmp_path)
    assert all((offsets == 0).all() for offsets in model.seen[:6])
    way = (model.seen[6] - model.seen[5]).view(18, 2).norm(dim=-1)
    assert way[[0, 1, 2, 3, 5]].tolist() == pytest.approx([0.1] * 5)  # a unit gradient times the learning rate


class Lookahead(torch.optim.Optimizer):
    """timm's, in short: every second step goes half of the way."""

    def __init__(self, params, **arguments):
        self.base = torch.optim.SGD(params, **arguments)
        self.defaults, self.param_groups, self.state = self.base.defaults, self.base.param_groups, self.base.state
        self.count = 0
        super().__init__(self.param_groups, self.defaults)
        self.base.param_groups = self.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        loss, self.count = self.base.step(closure), self.count + 1
        if self.count % 2 == 0:
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.copy_(self.state[p].get("slow", p).lerp(p, 0.5))
                self.state[p]["slow"] = p.clone()
        return loss


def test_an_optimizer_around_an_optimizer_under_lightning(tmp_path):
    spy, model = Spy(), TinyModule(lambda p: Lookahead(p, lr=0.1, momentum=0.9))
    fit(model, [PositionLRSchedule(1.0, warmup_steps=3), RoundThenFinetune(at_step=9), spy], tmp_path)
    assert all((offsets == 0).all() for offsets in spy.offsets[:4])
    assert spy.offsets[8].abs().max() > 0.1
    assert all(torch.equal(offsets, spy.offsets[9]) for offsets in [*spy.offsets[9:], model.offsets])


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind(tmp_path, fails):
    class Fails(TinyModule):
        def on_train_batch_end(self, *_):
            if fails:
                raise ArithmeticError

    before = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    try:
        fit(Fails(), [PositionLRSchedule(1.0, warmup_steps=0), RoundThenFinetune(at_step=6, keep=False)], tmp_path)
    except ArithmeticError:
        assert fails
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == before
