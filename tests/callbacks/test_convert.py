"""ConvertToACU: somebody else's module, wherever it builds its layers and whoever makes its optimizer."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import TinyModule, fit, loader
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torchmetrics import Metric

from lightning_acu import ACUConv2d, convert_to_acu, fold_acu
from lightning_acu.callbacks import ConvertToACU, PositionLRSchedule
from lightning_acu.conv import acu_layers
from lightning_acu.saving.checkpoint import load_converted
from lightning_acu.surgery import NoEffectWarning

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def layers():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1))


class Base(pl.LightningModule):
    """Somebody else's module; subclasses say where its layers are built."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def forward(self, images):
        return self.net(images).mean((2, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def val_dataloader(self):
        return loader(batches=1)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        self.seen["classes"] = [type(self.net[0]), type(self.net[2])]
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.seen["held"] = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return optimizer

    @property
    def offsets(self):
        return torch.cat([self.net[0].offsets.detach(), self.net[2].offsets.detach()])


class InInit(Base):
    def __init__(self):
        super().__init__()
        self.net = layers()


class InInitWithHooks(InInit):
    """Whose hooks build nothing."""

    def setup(self, stage):
        self.stage = stage

    def configure_model(self):
        pass


class InSetup(Base):
    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = layers()


class InConfigureModel(Base):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = layers()


class InBoth(Base):
    """One layer in each hook."""

    def setup(self, stage):
        if not hasattr(self, "first"):
            self.first = nn.Conv2d(2, 4, 3, padding=1)

    def configure_model(self):
        if not hasattr(self, "last"):
            self.last = nn.Conv2d(4, 3, 3, padding=1)

    @property
    def net(self):
        return nn.Sequential(self.first, nn.Tanh(), self.last)


MODULES = [InInit, InInitWithHooks, InSetup, InConfigureModel, InBoth]


class Noting(pl.Callback):
    """Learning rates and positions at each step."""

    def __init__(self):
        self.rates, self.offsets = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.offsets.append(torch.cat([layer.offsets.detach() for _, layer in acu_layers(pl_module)]))


def plain_trainer(tmp_path, callbacks=None, **arguments):
    return pl.Trainer(default_root_dir=tmp_path, callbacks=callbacks or [ConvertToACU()], **(QUIET | arguments))


@pytest.mark.parametrize("schedule", [[], [PositionLRSchedule(1.0, warmup_steps=0)]], ids=["alone", "with schedule"])
@pytest.mark.parametrize("build", MODULES)
def test_converts_before_the_optimizer_is_made_and_positions_learn(tmp_path, build, schedule):
    module = build()
    fit(module, [ConvertToACU(), *schedule], tmp_path)
    assert module.seen["classes"] == [ACUConv2d, ACUConv2d]
    assert {id(layer.offsets) for _, layer in acu_layers(module)} <= module.seen["held"]
    assert module.offsets.abs().max() > (0.1 if schedule else 0)


@pytest.mark.parametrize("build", MODULES)
def test_the_output_stays_the_same(tmp_path, build):
    (images, _), *_ = loader()
    outputs = []
    for callbacks in ([], [ConvertToACU()]):
        torch.manual_seed(0)
        module = build()
        plain_trainer(tmp_path, callbacks or [pl.Callback()]).predict(module, loader(batches=1))
        outputs.append(module(images).detach())
    assert any(acu_layers(module))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", MODULES)
def test_the_hooks_are_the_modules_own_again_afterwards(tmp_path, build):
    module, convert = build(), ConvertToACU()
    fit(module, [convert], tmp_path)
    assert not {"setup", "configure_model"} & set(vars(module))
    net = module.net[0]
    fit(module, [convert, PositionLRSchedule(1.0, 0)], tmp_path)
    assert module.net[0] is net
    assert module.offsets.abs().max() > 0.1
    assert not {"setup", "configure_model"} & set(vars(module))


@pytest.mark.parametrize("callbacks", [1, 2])
@pytest.mark.parametrize("build", MODULES)
def test_the_hooks_are_the_modules_own_as_soon_as_they_are_called(tmp_path, build, callbacks):
    class Looks(build):
        def setup(self, stage):
            noted["in setup"] = "setup" in vars(self)
            super().setup(stage)

        def configure_model(self):
            noted["in configure_model"] = {"setup", "configure_model"} & set(vars(self))
            super().configure_model()

        def on_train_start(self):
            noted["in training"] = {"setup", "configure_model"} & set(vars(self))

    noted = {}
    fit(Looks(), [ConvertToACU(kernel_sizes=[3]) for _ in range(callbacks)], tmp_path)
    assert noted == {"in setup": False, "in configure_model": set(), "in training": set()}


def test_a_hook_of_the_users_own_on_the_instance_stays_there(tmp_path):
    module = InInit()
    module.setup = own = lambda stage: seen.append(stage)
    seen = []
    fit(module, [ConvertToACU(), ConvertToACU()], tmp_path)
    assert seen == ["fit"]
    assert vars(module)["setup"] is own


@pytest.mark.parametrize("build", [InInitWithHooks, InConfigureModel])
def test_copies_that_averaging_makes_have_their_own_hooks(tmp_path, build):
    weight_averaging = getattr(pl.callbacks, "WeightAveraging", None)
    if weight_averaging is None:
        pytest.skip("new in Lightning 2.6")
    average = weight_averaging()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
        fit(build(), [ConvertToACU(), average], tmp_path)
    copied = average._average_model.module
    assert type(copied.net[0]) is ACUConv2d
    assert not {"setup", "configure_model"} & set(vars(copied))


def test_an_exception_before_the_hooks_are_called_leaves_none(tmp_path):
    class Fails(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            assert {"setup", "configure_model"} <= set(vars(pl_module))
            raise ArithmeticError

    module = InBoth()
    with pytest.raises(ArithmeticError):
        fit(module, [ConvertToACU(), ConvertToACU(), Fails()], tmp_path)
    assert not {"setup", "configure_model"} & set(vars(module))


@pytest.mark.parametrize("build", [InSetup, InConfigureModel])
def test_two_of_them_convert_one_part_each_and_leave_the_hooks(tmp_path, build):
    module = build()
    fit(module, [ConvertToACU(["net.0"]), ConvertToACU(["net.2"], position_groups=3)], tmp_path)
    assert (module.net[0].position_groups, module.net[2].position_groups) == (1, 3)
    assert not {"setup", "configure_model"} & set(vars(module))


@pytest.mark.parametrize("hook", ["setup", "configure_model", "on_train_batch_start"])
def test_the_hooks_are_restored_after_an_exception(tmp_path, hook):
    class Fails(InBoth):
        failed = False

    def fail_once(self, *arguments, **keywords):
        if not type(self).failed:
            type(self).failed = True
            raise ArithmeticError
        return getattr(InBoth, hook)(self, *arguments, **keywords)

    setattr(Fails, hook, fail_once)
    module = Fails()
    with pytest.raises(ArithmeticError):
        fit(module, [ConvertToACU()], tmp_path)
    assert not {"setup", "configure_model"} & set(vars(module))
    fit(module, [ConvertToACU()], tmp_path)
    assert module.offsets.abs().max() > 0


def test_layers_that_are_active_already_stay(tmp_path):
    module = InInit()
    convert_to_acu(module.net, position_groups=1, fixed_centre=False)
    with torch.no_grad():
        module.net[0].offsets.fill_(0.25)
    kept = module.net[0].offsets
    plain_trainer(tmp_path).predict(module, loader(batches=1))
    assert module.net[0].offsets is kept
    assert module.net[0].fixed_tap is None
    assert (kept == 0.25).all()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("build", [InInit, InConfigureModel])
def test_positions_keep_their_precision(tmp_path, build, precision):
    class Noted(build):
        def on_train_start(self):
            self.types = self.net[0].weight.dtype, self.net[0].offsets.dtype

    module = Noted()
    data = loader(dtype=torch.float64 if precision == "64-true" else torch.float32)
    fit(module, [ConvertToACU(), PositionLRSchedule(1.0, 0)], tmp_path, data, precision=precision)
    expected = {"bf16-true": (torch.bfloat16, torch.float32), "64-true": (torch.float64,) * 2}
    assert module.types == expected.get(precision, (torch.float32,) * 2)
    assert module.offsets.abs().max() > 0.1


@pytest.mark.parametrize(("precision", "weights"), [("bf16-true", torch.bfloat16), ("32-true", torch.float32)])
def test_a_module_made_under_init_module(tmp_path, precision, weights):
    trainer = plain_trainer(
        tmp_path, [ConvertToACU(), PositionLRSchedule(1.0, 0)], precision=precision, max_epochs=1,
        enable_checkpointing=False,
    )  # fmt: skip
    with trainer.init_module():
        module = InInit()
    trainer.fit(module, loader())
    assert module.net[0].weight.dtype == weights
    assert module.net[0].offsets.dtype == torch.float32
    assert module.offsets.abs().max() > 0.1


# ---- LightningCLI


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(batches=1)


class ForCLI(InInit):
    """Without configure_optimizers, as ``--optimizer`` wants it."""

    configure_optimizers = pl.LightningModule.configure_optimizers


def cli(tmp_path, *arguments):
    trainer = [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
    trainer += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_checkpointing=false"]
    return LightningCLI(
        ForCLI, Data, args=["fit", *trainer, "--trainer.max_epochs=2", *arguments], save_config_callback=None,
        trainer_defaults={"callbacks": [Noting()]}, seed_everything_default=False,
    )  # fmt: skip


COSINE = ["--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=4", "--lr_scheduler.eta_min=0.05"]
CONVERT = ["--trainer.callbacks+=lightning_acu.callbacks.ConvertToACU", "--trainer.callbacks.kernel_sizes=[3]"]
SCHEDULE = [
    "--trainer.callbacks+=lightning_acu.callbacks.PositionLRSchedule", "--trainer.callbacks.warmup_steps=0",
    "--trainer.callbacks.multiplier=0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    """LightningCLI warns of one beside ``args``."""
    monkeypatch.setattr("sys.argv", ["script.py"])


ADAGRAD = pytest.param(
    ["--optimizer=Adagrad"],
    marks=pytest.mark.skipif(torch.__version__.startswith("2.9"), reason="its Adagrad takes no parameters later"),
)


@pytest.mark.parametrize("order", [CONVERT + SCHEDULE, SCHEDULE + CONVERT], ids=["convert first", "schedule first"])
@pytest.mark.parametrize("scheduler", [[], COSINE], ids=["no scheduler", "CosineAnnealingLR"])
@pytest.mark.parametrize(
    "optimizer", [["--optimizer=SGD", "--optimizer.momentum=0.9"], ["--optimizer=AdamW"], ADAGRAD],
    ids=lambda optimizer: optimizer[0],
)  # fmt: skip
def test_an_optimizer_that_the_command_line_made_before_gets_the_positions(tmp_path, optimizer, scheduler, order):
    made = cli(tmp_path, *optimizer, "--optimizer.lr=0.1", *scheduler, *order)
    (noting,) = [callback for callback in made.trainer.callbacks if isinstance(callback, Noting)]
    groups = made.trainer.optimizers[0].param_groups
    held = [{id(parameter) for parameter in group["params"]} for group in groups]
    offsets = {id(layer.offsets) for _, layer in acu_layers(made.model)}
    assert held[1] == offsets
    assert held[0] == {id(parameter) for parameter in made.model.parameters()} - offsets
    for weights, positions in noting.rates:
        assert positions == pytest.approx(0.5 * weights, rel=1e-12)
    assert len({weights for weights, _ in noting.rates}) == (2 if scheduler else 1)
    assert made.model.offsets.abs().max() > 0.1


def test_an_optimizer_that_the_command_line_made_before_gets_the_positions_without_a_schedule(tmp_path):
    made = cli(tmp_path, "--optimizer=SGD", "--optimizer.lr=0.1", *COSINE, *CONVERT)
    (group,) = made.trainer.optimizers[0].param_groups
    assert len(group["params"]) == 6
    assert made.model.offsets.abs().max() > 0


@pytest.mark.parametrize("written", ["dotted", "yaml"])
def test_every_argument_works_from_a_configuration(tmp_path, written):
    if written == "dotted":
        arguments = [
            *CONVERT,
            "--trainer.callbacks.target_modules=[net.0, net.2]",
            "--trainer.callbacks.exclude_modules=.*[.]0",
            "--trainer.callbacks.depthwise=false",
            "--trainer.callbacks.grouped=false",
            "--trainer.callbacks.position_groups=3",
            "--trainer.callbacks.fixed_centre=false",
            "--trainer.callbacks.backend=dense",
        ]
    else:
        (tmp_path / "config.yaml").write_text(
            "trainer:\n  callbacks:\n    - class_path: lightning_acu.callbacks.ConvertToACU\n      init_args:\n"
            "        kernel_sizes: [3, [3, 5]]\n        target_modules: [net.0, net.2]\n"
            "        exclude_modules: .*[.]0\n        depthwise: false\n        grouped: false\n"
            "        position_groups: 3\n        fixed_centre: false\n        backend: dense\n"
        )
        arguments = [f"--config={tmp_path / 'config.yaml'}"]
    made = cli(tmp_path, *arguments, "--optimizer=SGD", "--optimizer.lr=0.1")
    config = made.trainer.callbacks[0].config
    assert (config.depthwise, config.grouped, config.backend) == (False, False, "dense")
    assert type(made.model.net[0]) is nn.Conv2d
    assert made.model.net[2].position_groups == 3
    assert made.model.net[2].fixed_tap is None


def test_a_misspelt_argument_on_the_command_line_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(tmp_path, *CONVERT, "--trainer.callbacks.kernel=3", "--optimizer=SGD", "--optimizer.lr=0.1")
    assert "kernel" in capsys.readouterr().err


# ---- checkpoints


@pytest.fixture(params=MODULES, ids=lambda build: build.__name__)
def trained(request, tmp_path):
    """(how to make the module, its trained offsets, a checkpoint after 1 of 2 epochs)."""
    module = request.param()
    trainer = fit(module, [ConvertToACU(), PositionLRSchedule(1.0, 0)], tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    return request.param, module.offsets, tmp_path / "half.ckpt"


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_fresh_plain_module_takes_the_checkpoint(tmp_path, trained, stage):
    build, offsets, path = trained
    module = build()
    getattr(plain_trainer(tmp_path), stage)(module, loader(batches=1), ckpt_path=path)
    assert torch.equal(module.offsets, offsets)


def test_resume_equals_an_uninterrupted_run(tmp_path, trained):
    build, offsets, path = trained
    results = []
    for ckpt_path in (None, path):
        torch.manual_seed(0)
        module = build()
        callbacks = [ConvertToACU(), PositionLRSchedule(1.0, 0)]
        if ckpt_path is not None:
            fit(module, callbacks, tmp_path, ckpt_path=ckpt_path)
        else:
            fit(module, callbacks, tmp_path)
        results.append(module.offsets)
    assert torch.equal(*results)
    assert not torch.equal(results[0], offsets)


def test_load_from_checkpoint_wants_the_conversion_in_the_module(tmp_path):
    module = InInit()
    trainer = fit(module, [ConvertToACU()], tmp_path)
    trainer.save_checkpoint(path := tmp_path / "model.ckpt")
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "net\.0\.offsets"'):
        InInit.load_from_checkpoint(path)
    built = InInit()
    convert_to_acu(built.net)
    built.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(built.offsets, module.offsets)
    assert torch.equal(load_converted(InInit, path).offsets, module.offsets)

    class Converted(InInit):
        def __init__(self):
            super().__init__()
            convert_to_acu(self.net)

    assert torch.equal(Converted.load_from_checkpoint(path).offsets, module.offsets)


# ---- beside other callbacks


def averaging():
    kinds = [StochasticWeightAveraging(0.1, swa_epoch_start=1)]
    if hasattr(pl.callbacks, "EMAWeightAveraging"):  # new in Lightning 2.6
        kinds += [pl.callbacks.WeightAveraging(), pl.callbacks.EMAWeightAveraging(decay=0.5)]
    return kinds


@pytest.mark.parametrize("average", averaging(), ids=lambda callback: type(callback).__name__)
def test_before_an_averaging_callback_positions_are_averaged(tmp_path, average):
    noting, module = Noting(), InInit()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(swa_utils|lr_scheduler.step)")
        fit(module, [ConvertToACU(), average, PositionLRSchedule(1.0, 0), noting], tmp_path, max_epochs=3)
    copy = getattr(average._average_model, "module", average._average_model)
    assert [name for name, _ in acu_layers(copy)] == ["net.0", "net.2"]
    assert torch.equal(copy.offsets, module.offsets)  # which got them at the end
    assert module.offsets.abs().max() > 0.1
    assert not any(torch.equal(module.offsets, offsets) for offsets in noting.offsets)


@pytest.mark.parametrize("average", averaging(), ids=lambda callback: type(callback).__name__)
def test_behind_an_averaging_callback_is_an_error(tmp_path, average):
    with pytest.raises(
        RuntimeError,
        match=rf"has copied InInit before .*; ConvertToACU must be listed before {type(average).__name__} in",
    ):
        fit(InInit(), [average, ConvertToACU()], tmp_path)


@pytest.mark.skipif(not hasattr(pl.callbacks, "EMAWeightAveraging"), reason="new in Lightning 2.6")
def test_averaging_of_layers_that_configure_model_builds(tmp_path):
    module, average = InConfigureModel(), pl.callbacks.EMAWeightAveraging(decay=0.5)
    with pytest.warns(UserWarning, match="WeightAveraging callback with a model that overrides the configure_model"):
        fit(module, [ConvertToACU(), average, PositionLRSchedule(1.0, 0)], tmp_path)
    assert torch.equal(average._average_model.module.offsets, module.offsets)
    assert module.offsets.abs().max() > 0.1


@pytest.mark.parametrize("average", averaging(), ids=lambda callback: type(callback).__name__)
def test_an_average_of_layers_that_setup_builds_is_an_error_about_that(tmp_path, average):
    with pytest.raises(RuntimeError, match=r"has copied InSetup before its `setup` .* built the layers; build them in"):
        fit(InSetup(), [ConvertToACU(), average], tmp_path)


class Distance(Metric):
    """Stands for FID: a metric with a network inside."""

    def __init__(self):
        super().__init__()
        self.net = layers()
        self.add_state("total", torch.zeros(()))

    def update(self, images):
        self.total += self.net(images).mean()

    def compute(self):
        return self.total


@pytest.mark.parametrize("build", [InInit, InConfigureModel])
def test_convolutions_inside_metrics_stay(tmp_path, build):
    class Measured(build):
        def __init__(self):
            super().__init__()
            self.distance = Distance()
            self.more = nn.ModuleDict({"metrics": nn.ModuleList([Distance()])})
            self.distance_net = nn.Conv2d(2, 2, 3)  # whose name begins like a metric's

    module = Measured()
    plain_trainer(tmp_path).predict(module, loader(batches=1))
    assert [name for name, _ in acu_layers(module)] == (
        ["net.0", "net.2", "distance_net"] if build is InInit else ["distance_net", "net.0", "net.2"]
    )


def test_a_function_can_choose(tmp_path):
    module = InInit()
    convert = ConvertToACU(filter_fn=lambda conv, name: conv.out_channels == 3 and name == "net.2")
    plain_trainer(tmp_path, [convert]).predict(module, loader(batches=1))
    assert [name for name, _ in acu_layers(module)] == ["net.2"]


# ---- errors


def test_an_unknown_argument():
    with pytest.raises(TypeError, match="kernel_size'"):
        ConvertToACU(kernel_size=3)


@pytest.mark.parametrize("build", MODULES)
def test_nothing_converted_stops_before_training(tmp_path, build):
    class Never(build):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with (
        pytest.warns(NoEffectWarning, match=r"convert_to_acu converted nothing in Never: kernel size 3x3 not among"),
        pytest.raises(
            RuntimeError, match="ConvertToACU converted no convolution of Never: kernel size 3x3 not among kernel_sizes"
        ),
    ):
        fit(Never(), [ConvertToACU(kernel_sizes=[7])], tmp_path)


@pytest.mark.parametrize("build", [InInit, InSetup, InConfigureModel, InBoth])
def test_a_pattern_that_matches_nothing_warns_once_all_layers_are_there(tmp_path, build):
    with pytest.warns(NoEffectWarning, match=r"`exclude_modules`: 'stem' matches no convolution") as caught:
        plain_trainer(tmp_path, [ConvertToACU(exclude_modules=["stem"])]).predict(build(), loader(batches=1))
    assert len([warning for warning in caught if warning.category is NoEffectWarning]) == 1


@pytest.mark.parametrize("build", MODULES)
def test_a_pattern_that_matches_what_a_hook_builds_does_not_warn(tmp_path, build):
    names = ["first", "last"] if build is InBoth else ["net.0", "net.2"]
    module = build()
    plain_trainer(tmp_path, [ConvertToACU(names)]).predict(module, loader(batches=1))
    assert [name for name, _ in acu_layers(module)] == names


def test_a_class_of_lightnings_own_examples_works_as_well(tmp_path):
    """The module of the other tests, unconverted."""
    module = TinyModule(convert=False)
    fit(module, [ConvertToACU(), PositionLRSchedule(1.0, 0)], tmp_path)
    assert module.offsets.abs().max() > 0.1


def test_a_hook_that_the_instance_itself_had_is_there_again(tmp_path):
    module, calls = TinyModule(convert=False), []
    module.setup = own = lambda stage: calls.append(stage)
    fit(module, [ConvertToACU(), ConvertToACU()], tmp_path)
    assert module.setup is own
    assert calls == ["fit"]
    assert module.offsets is not None


def test_a_folded_model_stays_plain(tmp_path):
    module = InInit()
    trainer = plain_trainer(
        tmp_path, [ConvertToACU(), PositionLRSchedule(1.0, 0)], max_epochs=2, enable_checkpointing=False
    )
    trainer.fit(module, loader())
    fold_acu(module)
    trainer.predict(module, loader(batches=1))
    assert not list(acu_layers(module))
    with pytest.raises(RuntimeError, match=r"ConvertToACU converted no convolution of InInit: it was folded into"):
        trainer.fit(module, loader())
