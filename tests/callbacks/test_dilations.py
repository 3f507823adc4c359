"""RoundThenFinetune(to="dilation") under a Trainer: resume, what is promised, errors."""

import pytest
import torch
from helpers.tiny import TinyModule, fit
from lightning.pytorch.callbacks import Callback, WeightAveraging

from lightning_acu import ACUConv2d, report_acu
from lightning_acu.callbacks import PositionLRSchedule, RoundThenFinetune


def callbacks(**arguments):
    arguments = {"at_step": 9, "keep": False, "to": "dilation"} | arguments
    return [PositionLRSchedule(4.0, warmup_steps=1, schedule="dilation"), RoundThenFinetune(**arguments)]


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def train(tmp_path, stop=3, ckpt_path=None, **arguments):
    torch.manual_seed(0)
    model = TinyModule()
    return model, fit(model, [*callbacks(**arguments), StopAfter(stop)], tmp_path, ckpt_path=ckpt_path, max_epochs=3)


@pytest.mark.filterwarnings("ignore:RoundThenFinetune. training ended at step")
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("stop", [1, 2])
def test_resume_before_and_after_rounding_equals_an_uninterrupted_run(tmp_path, monkeypatch, stop, fold):
    whole, _ = train(tmp_path, fold_after_rounding=fold)
    found = report_acu(whole).dilations
    assert set(found) == {"net.0", "net.2"}
    assert set(found.values()) != {(1, 1)}
    _, trainer = train(tmp_path, stop, fold_after_rounding=fold)
    trainer.save_checkpoint(path := tmp_path / "stopped.ckpt")
    if fold and stop == 2:
        monkeypatch.setattr("lightning_acu.conv.acu_conv2d", None)  # it is not needed any more
    resumed, _ = train(tmp_path, ckpt_path=path, fold_after_rounding=fold)
    assert torch.equal(resumed.offsets, whole.offsets)
    assert torch.equal(resumed.weights, whole.weights)


def test_a_checkpoint_of_the_other_kind_is_an_error(tmp_path):
    _, trainer = train(tmp_path, 2)
    trainer.save_checkpoint(path := tmp_path / "stopped.ckpt")
    with pytest.raises(RuntimeError, match=r"`to` is 'pixels', but .* positions were rounded to 'dilation'"):
        train(tmp_path, ckpt_path=path, to="pixels")
    state = torch.load(path)
    del state["callbacks"]["RoundThenFinetune"]["rounded_to"]  # as versions before saved it
    torch.save(state, path)
    with pytest.raises(RuntimeError, match=r"`to` is 'dilation', but .* positions were rounded to 'pixels'"):
        train(tmp_path, ckpt_path=path)


class Changes(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 11:
            with torch.no_grad():
                pl_module.net[2].offsets[3] += 1


def test_positions_that_leave_the_grid_are_named(tmp_path):
    message = "After this training:\n.*positions of net.2 are not on the grid of a dilation, although .* at step 9"
    with pytest.warns(UserWarning, match=message):
        fit(TinyModule(), [*callbacks(), Changes()], tmp_path)


def test_averages_get_the_same_grids(tmp_path):
    class Ema(WeightAveraging):
        def __init__(self):
            super().__init__(avg_fn=lambda average, now, count: average * 0.9 + now * 0.1)

    model = TinyModule()
    fit(model, [Ema(), *callbacks()], tmp_path)  # its weights are the average at the end
    assert set(report_acu(model).dilations) == {"net.0", "net.2"}


@pytest.mark.parametrize("which", ["schedule", "to"])
def test_free_shapes_are_refused_before_training(tmp_path, which):
    model = TinyModule()
    model.net[2] = ACUConv2d.from_positions(4, 3, [(0.5, 1.0), (-1.0, 0.0)])
    schedule, rounding = callbacks()
    with pytest.raises(RuntimeError, match=r"net\.2: it has a free shape"):
        fit(model, [schedule if which == "schedule" else rounding], tmp_path)
    with pytest.raises(ValueError, match=r"`to` \(='grid'\) must be 'pixels' or 'dilation'"):
        RoundThenFinetune(at_step=1, to="grid")


def test_layers_that_keep_their_dilation_are_said(tmp_path):
    with pytest.warns(UserWarning, match="because each layer is nearest to the dilation that it had; raise the `mult"):
        fit(TinyModule(), callbacks()[1:], tmp_path)
