"""Where and how the gradients of positions are changed."""

import copy
import functools
import gc
import pickle
import weakref

import lightning.pytorch as pl
import pytest
import torch
from helpers.tiny import TinyModule, fit, loader
from lightning.pytorch.callbacks import LearningRateFinder
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune
from lightning_acu.callbacks._gate import GradientGate

_GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def run(tmp_path, module, *, schedule=True, transform=None, **arguments):
    torch.manual_seed(0)
    module = module()
    seen = []

    class Seen(PositionLRSchedule):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            seen.append([None if layer.offsets.grad is None else layer.offsets.grad.clone() for layer in layers])

    layers = (module.net[0], module.net[2])
    callbacks = [Seen(1.0, warmup_steps=0)] if schedule else []
    fit(module, callbacks, tmp_path, max_epochs=1, **arguments)
    return module, seen


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_every_tap_has_a_unit_gradient_at_the_step_even_under_clipping(tmp_path, clip):
    _, seen = run(tmp_path, TinyModule, gradient_clip_val=clip)
    for gradients in seen[1:]:
        for gradient in gradients:
            length = gradient.view(9, 2).norm(dim=-1)
            torch.testing.assert_close(length, torch.tensor([1.0] * 4 + [0.0] + [1.0] * 4))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_weights_are_clipped_as_if_there_were_no_offsets(tmp_path, algorithm):
    """With positions kept still, weights train exactly as in the plain network."""
    arguments = {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": algorithm}
    torch.manual_seed(0)
    plain = TinyModule(convert=False)
    fit(plain, [], tmp_path, **arguments)
    torch.manual_seed(0)
    active = TinyModule()
    fit(active, [PositionLRSchedule(multiplier=0, warmup_steps=0)], tmp_path, **arguments)
    torch.testing.assert_close(active.weights, plain.weights, rtol=0, atol=1e-7)


def test_normalised_once_after_accumulation(tmp_path):
    """Four small batches are one large one, also for the normalised gradient (float64: rounding would drift)."""
    results = []
    for size, accumulate in ((2, 4), (8, 1)):
        torch.manual_seed(0)
        module = TinyModule().double()
        data = loader(size, 24 // size, torch.float64)
        fit(
            module,
            [PositionLRSchedule(0.5, 0)],
            tmp_path,
            data,
            accumulate_grad_batches=accumulate,
            precision="64-true",
        )
        results.append((module.offsets, module.weights))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert results[0][0].abs().max() > 0.1


def test_the_gate_goes_with_its_last_transform():
    module = TinyModule()

    def keep(trainer, optimizer, layers):
        pass

    def drop(trainer, optimizer, layers):
        pass

    GradientGate.add(module, keep)
    GradientGate.add(module, drop)
    assert GradientGate.of(module).transforms == [keep, drop]
    GradientGate.remove(module, keep)
    GradientGate.remove(module, keep)
    GradientGate.remove(module, drop)
    assert GradientGate.of(module) is None
    assert not {"configure_gradient_clipping", "clip_gradients", "on_before_optimizer_step"} & set(vars(module))


def test_a_clipping_hook_of_the_users_own_still_runs(tmp_path):
    calls = []

    class Own(TinyModule):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            calls.append(gradient_clip_val)
            assert self.net[0].offsets.grad is None  # positions are set aside meanwhile
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    run(tmp_path, Own, gradient_clip_val=0.5)
    assert calls == [0.5] * 6


def test_a_training_that_failed_leaves_nothing_behind(tmp_path):
    """Lightning calls no teardown after an exception; a stale warm-up would freeze the next training."""

    class Fails(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 2 and not self.failed:
                self.failed = True
                raise ArithmeticError

    module = Fails()
    module.failed = False
    with pytest.raises(ArithmeticError):
        fit(module, [PositionLRSchedule(1.0, warmup_steps=5), RoundThenFinetune(at_step=6)], tmp_path)
    assert GradientGate.of(module) is None
    fit(module, [PositionLRSchedule(1.0, warmup_steps=0)], tmp_path)
    assert module.offsets.abs().max() > 0.1


def test_a_search_for_a_learning_rate_that_failed_leaves_nothing_to_the_next_training(tmp_path):
    """It takes all callbacks off the trainer: they hear of no exception in its steps."""

    class Fails(TinyModule):
        def on_train_batch_start(self, batch, batch_idx):
            if self.failing and batch_idx == 2:
                raise ArithmeticError

    module = Fails(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    module.lr, module.failing = 0.1, True
    hooks = [dict(before) for before in _GLOBAL_HOOKS]
    finder = LearningRateFinder(num_training_steps=5)
    with pytest.raises(ArithmeticError):
        fit(module, [PositionLRSchedule(1.0, warmup_steps=0), finder], tmp_path)
    start = module.offsets.detach().clone()
    module.failing = False
    fit(module, [PositionLRSchedule(1.0, warmup_steps=0)], tmp_path)
    assert (module.offsets - start).abs().max() > 0.1
    assert GradientGate.of(module) is None
    assert [dict(now) for now in _GLOBAL_HOOKS] == hooks


def test_hooks_on_all_optimizers_do_not_keep_a_module_alive():
    module = TinyModule()
    GradientGate.add(module, lambda *arguments: None)
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.5).step()
    assert parameter.item() == 0.5


@pytest.mark.parametrize("duplicate", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_a_module_copied_in_training_learns_in_the_next(tmp_path, duplicate):
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            if trainer.global_step == 3:
                copies.append(duplicate(pl_module))

    model = TinyModule(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    fit(model, [PositionLRSchedule(1.0, warmup_steps=11), Copy()], tmp_path)
    fit(copies[0], [PositionLRSchedule(1.0, warmup_steps=0)], tmp_path)
    assert copies[0].offsets.abs().max() > 0.1
    assert GradientGate.of(copies[0]) is None
