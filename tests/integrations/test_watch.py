"""Models that are converted, and optimizers whose positions are trained, whatever code makes them."""

import pytest
import timm
import timm.optim
import timm.utils
import torch
import torchvision
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_acu import acu_layers, convert_to_acu
from lightning_acu.integrations.watch import ScriptWatch
from lightning_acu.surgery import NoEffectWarning

POSITIONS = {"multiplier": 100.0, "warmup_steps": 1, "round_at": 3}


def make(**arguments):
    return timm.create_model("test_resnet", num_classes=3, in_chans=1, zero_init_last=False, **arguments)


def step(model, *optimizers):
    model(torch.rand(2, 1, 32, 32)).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def offsets(model):
    return [layer.offsets.detach().clone() for _, layer in acu_layers(model)]


def test_a_script_needs_no_word_about_positions(capsys):
    with ScriptWatch({"exclude_modules": ["conv1.0"]}, POSITIONS) as watch:
        model = make()
        optimizer = create_optimizer_v2(model, "adamw", lr=0.01, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=10)
        step(model, optimizer)
        assert not any(value.any() for value in offsets(model))
        scheduler.step()
        step(model, optimizer)
        assert all(value.any() for value in offsets(model))
        step(model, optimizer)
        assert all(torch.equal(value, value.round()) for value in offsets(model))
    watch.check_and_report()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "lightning_acu: create_model made a ResNet: 9 of 15 2-D convolutions are active"
    assert second == "lightning_acu: AdamW trains positions of 9 layers: still until step 1, rounded after step 3"
    assert third.startswith("lightning_acu: after step 3 of AdamW taps of 9 layers are ")
    assert third.endswith(" at most; they are on whole pixels")


@pytest.mark.parametrize(
    ("positions", "end"),
    [
        ({"warmup_steps": 5}, "they did not learn: their warm-up lasts until step 5"),
        ({"round_at": 7}, "they are NOT rounded: that would have been after step 7"),
        ({}, "they are not rounded"),
    ],
)
def test_what_did_not_happen_is_said_at_the_end(capsys, positions, end):
    with ScriptWatch(positions=positions) as watch:
        model = make()
        step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    watch.check_and_report()
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"; {end}")


def test_an_optimizer_that_takes_no_step_is_mentioned(capsys):
    with ScriptWatch() as watch:
        torch.optim.SGD(make().parameters(), lr=0.1)  # as torchvision's train.py --test-only
    watch.check_and_report()
    assert capsys.readouterr().err.splitlines()[-1].endswith("; it took no step")


def test_only_the_first_process_says_something(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with ScriptWatch() as watch:
        make()
    watch.check_and_report()
    assert not capsys.readouterr().err


def test_an_optimizer_before_any_converted_model_is_an_error():
    net = nn.Linear(2, 2)
    with ScriptWatch(), pytest.raises(RuntimeError, match=r"SGD was made and no model has been converted: .*timm\."):
        torch.optim.SGD(net.parameters(), lr=0.1)


def test_a_model_in_which_nothing_can_be_converted_is_an_error(capsys):
    with ScriptWatch() as watch:
        with pytest.warns(NoEffectWarning, match="kernel size 16x16 not among"):
            model = timm.create_model("test_vit")
        with pytest.raises(RuntimeError, match="none of those had convolutions to convert"):
            torch.optim.SGD(model.parameters(), lr=0.1)
    assert "made a VisionTransformer: 0 of 1 2-D convolutions are active" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="the script ended and no model has been converted"):
        watch.check_and_report()


def test_an_optimizer_of_something_else_is_mentioned(capsys):
    with ScriptWatch() as watch:
        make()
        torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    watch.check_and_report()
    *_, line, end = capsys.readouterr().err.splitlines()
    assert line == "lightning_acu: SGD holds no weights of converted models; it trains no positions"
    assert end.endswith("no optimizer held weights of a converted model, so no positions were trained")


def test_an_optimizer_around_another_leaves_positions_to_that(capsys, monkeypatch):
    lookahead = timm.optim.Lookahead  # torch changes its step, when its zero_grad is called
    monkeypatch.setattr(lookahead, "step", lookahead.step)
    with ScriptWatch(positions=POSITIONS) as watch:
        model = make()
        optimizer = create_optimizer_v2(model, "lookahead_sgd", lr=0.02)
        for _ in range(8):  # Lookahead moves weights after the sixth
            step(model, optimizer)
    watch.check_and_report()
    assert len(watch.trainers) == 1
    assert all(torch.equal(value, value.round()) for value in offsets(model))
    with torch.no_grad():
        next(layer for _, layer in acu_layers(model)).offsets += 0.25
    watch.check_and_report()
    *_, good, moved = capsys.readouterr().err.splitlines()
    assert good.endswith("they are on whole pixels")
    assert moved.endswith("they were rounded, but something has MOVED them since")


@pytest.mark.parametrize("fold_after_rounding", [False, True])
def test_positions_that_are_rounded_to_dilations(capsys, fold_after_rounding):
    positions = POSITIONS | {"round_to": "dilation", "fold_after_rounding": fold_after_rounding}
    with ScriptWatch(positions=positions) as watch:
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(4):
            step(model, optimizer)
    watch.check_and_report()
    layers = [layer for _, layer in acu_layers(model)]
    assert all(layer.grid_dilations for layer in layers)
    assert all((layer.plain_dilation is not None) == fold_after_rounding for layer in layers)
    with torch.no_grad():
        layers[0].offsets[0] += 1  # to a whole pixel, but off the grid
    watch.check_and_report()
    *_, good, moved = capsys.readouterr().err.splitlines()
    assert good.endswith("they are on the grids of dilations")
    assert moved.endswith("they were rounded, but something has MOVED them since")


def test_a_wrong_argument_is_an_error_when_the_optimizer_is_made():
    with ScriptWatch(positions={"round_at": 0.5}), pytest.raises(ValueError, match=r"`round_at` .*`total_steps`"):
        create_optimizer_v2(make(), "sgd", lr=0.1)


def test_two_models_in_one_optimizer():
    with ScriptWatch(positions={"multiplier": 20.0}) as watch:
        one, other = make(), torchvision.models.get_model("resnet18", num_classes=2)
        optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
        other(torch.rand(2, 3, 32, 32)).square().sum().backward()
        step(one, optimizer)
    assert len(watch.trainers) == 1
    assert len(watch.trainers[0].report()) == 10 + 16
    assert all(value.any() for value in offsets(one))
    assert all(value.any() for value in offsets(other))


def test_weight_decay_of_positions_is_zero_whoever_makes_the_groups():
    """torchvision's references put what is not in a norm layer with the decayed, timm what has more than one axis."""

    def references(model):  # utils.set_weight_decay(model, 0.1, norm_weight_decay=0.0)
        norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
        return [
            {"params": [p for p in model.parameters() if id(p) not in norms], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
        ]

    with ScriptWatch():
        for make_optimizer in (
            lambda model: torch.optim.SGD(references(model), lr=0.1),
            lambda model: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
            lambda model: create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1),
            lambda model: create_optimizer_v2(model, "lamb", lr=0.1, weight_decay=0.1, layer_decay=0.5),
        ):
            model = make()
            ids = {id(layer.offsets) for _, layer in acu_layers(model)}
            groups = make_optimizer(model).param_groups
            decays = [(g["weight_decay"], len(g["params"])) for g in groups if any(id(p) in ids for p in g["params"])]
            assert sum(count for _, count in decays) == 10
            assert {decay for decay, _ in decays} == {0.0}


@pytest.mark.parametrize("first", ["average", "optimizer"])
@pytest.mark.parametrize("kind", ["timm's", "one that drifts"])
def test_averages_have_the_rounded_positions_whenever_they_are_used(first, kind):
    class Drifting(AveragedModel):  # as in torchvision's references; d * 3 + (1 - d) * 3 is not always 3
        def __init__(self, model):
            super().__init__(model, avg_fn=lambda average, value, count: 0.9 * average + (1 - 0.9) * value)

    with ScriptWatch(positions=POSITIONS):
        model = make()
        if first == "average":
            average = timm.utils.ModelEmaV3(model, decay=0.9) if kind == "timm's" else Drifting(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        if first == "optimizer":
            average = timm.utils.ModelEmaV3(model, decay=0.9) if kind == "timm's" else Drifting(model)
        update = average.update if kind == "timm's" else average.update_parameters
        for _ in range(3):
            step(model, optimizer)
            update(model)
        assert max(value.abs().max() for value in offsets(model)) >= 1
        for _ in range(20):
            update(model)
        state = {name: value for name, value in average.state_dict().items() if name.endswith("offsets")}
        assert all(torch.equal(a, b) for a, b in zip(state.values(), offsets(model), strict=True))
        update(model)
        average(torch.rand(2, 1, 32, 32))
        assert all(torch.equal(a, b) for a, b in zip(offsets(average), offsets(model), strict=True))


def test_a_checkpoint_of_a_converted_model_loads_into_create_model(tmp_path):
    trained = convert_to_acu(make())
    for _, layer in acu_layers(trained):
        nn.init.uniform_(layer.offsets, -1, 1)
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    with ScriptWatch():
        model = make(checkpoint_path=tmp_path / "trained.pt")
    assert all(torch.equal(a, b) for a, b in zip(offsets(model), offsets(trained), strict=True))


def test_teachers_of_timms_tasks_stay_plain():
    distillation = pytest.importorskip("timm.task.distillation")
    with ScriptWatch():
        assert timm.create_model is not distillation.create_model


def test_everything_is_as_before_afterwards():
    def names():
        return timm.create_model, timm.models.create_model, torchvision.models.get_model, torch.optim.SGD.__init__

    before = names()
    with ScriptWatch():
        assert all(one is not other for one, other in zip(names(), before, strict=True))
    assert names() == before
    optimizer = torch.optim.SGD(convert_to_acu(make()).parameters(), lr=0.1)
    assert len(optimizer.param_groups) == 1
