"""A wrong argument of any public function, callback or data module gets an error that names it and its value."""

import math
import re

import pytest
import torch
from torch import nn

import lightning_acu
from lightning_acu import (
    ActiveShift2d,
    ACUConv2d,
    ConvertConfig,
    ImageClassifier,
    acu_conv2d,
    acu_layers,
    acu_state_dict,
    apply_dilations,
    callbacks,
    convert_to_acu,
    create_model,
    data,
    export_model,
    fold_acu,
    from_pretrained,
    load_acu,
    load_acu_state_dict,
    metrics,
    model_statistics,
    plot_shapes,
    push_to_hub,
    report_acu,
    round_acu,
    save_acu,
    save_pretrained,
    training,
    warm_up,
)

NAN, INF = math.nan, math.inf


def net(active=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    return convert_to_acu(model) if active else model


def call(**changed):
    """acu_conv2d with one argument changed."""
    good = {"input": torch.zeros(2, 3, 7, 6), "weight": torch.zeros(4, 3, 3, 3), "offsets": torch.zeros(9, 2)}
    return acu_conv2d(**(good | changed))


def layer(*arguments, **changed):
    return ACUConv2d(*(arguments or (4, 8, 3)), **changed)


def positions(points, **changed):
    return ACUConv2d.from_positions(4, 8, points, **changed)


def trainer(**changed):
    model = net()
    good = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "model": model, "multiplier": 0.1}
    return training.PositionTrainer(**(good | changed))


def folder(**changed):
    return data.ImageFolderDataModule("nowhere", **changed)


#: What is called, how, and what the message has to say: the argument, its value, and the nearest valid choice.
CASES = [
    # the operator
    (call, {"input": "images"}, "`input`"),
    (call, {"input": torch.zeros(3, 7)}, "`input`", "(3, 7)"),
    (call, {"weight": torch.zeros(4, 3, 3)}, "`weight`", "(4, 3, 3)"),
    (call, {"weight": [1.0]}, "`weight`"),
    (call, {"offsets": torch.zeros(8, 2)}, "`offsets`", "(8, 2)"),
    (call, {"offsets": torch.zeros(9, 2, dtype=torch.int64)}, "`offsets`", "int64"),
    (call, {"bias": torch.zeros(3)}, "`bias`", "(3,)"),
    (call, {"stride": 0}, "`stride` (=0)"),
    (call, {"stride": True}, "`stride` (=True)"),
    (call, {"stride": 1.5}, "`stride` (=1.5)"),
    (call, {"stride": 2**62}, "`stride`", str(2**62)),
    (call, {"padding": -1}, "`padding` (=-1)"),
    (call, {"padding": "sane"}, "`padding` (='sane')", "did you mean 'same'?"),
    (call, {"padding": 2**40}, "`padding`", str(2**40)),
    (call, {"dilation": (1, 2, 3)}, "`dilation` (=(1, 2, 3))"),
    (call, {"dilation": -1}, "`dilation` (=-1)"),
    (call, {"groups": (1, 2)}, "`groups` (=(1, 2))"),
    (call, {"groups": 2}, "`groups` (=2)"),
    (call, {"groups": 0}, "`groups` (=0)"),
    (call, {"backend": "cyton"}, "`backend` (='cyton')", "did you mean 'cython'?"),
    # layers
    (layer, (4, 8, (3,)), "`kernel_size` (=(3,))"),
    (layer, (4, 8, "3"), "`kernel_size` (='3')"),
    (layer, (4, 8, 0), "`kernel_size` (=0)"),
    (layer, (4, 8, 3.0), "`kernel_size` (=3.0)"),
    (layer, (-4, 8, 3), "`in_channels` (=-4)"),
    (layer, ("4", 8, 3), "`in_channels` (='4')"),
    (layer, (4, 0, 3), "`out_channels` (=0)"),
    (layer, {"stride": True}, "`stride` (=True)"),
    (layer, {"stride": 0}, "`stride` (=0)"),
    (layer, {"padding": 2**40}, "`padding`", str(2**40)),
    (layer, {"padding": -1}, "`padding` (=-1)"),
    (layer, {"padding": "sane"}, "`padding` (='sane')", "did you mean 'same'?"),
    (layer, {"dilation": "2"}, "`dilation` (='2')"),
    (layer, {"groups": 3}, "`groups` (=3)"),
    (layer, {"groups": (1, 2)}, "`groups` (=(1, 2))"),
    (layer, {"padding_mode": "zero"}, "`padding_mode` (='zero')", "did you mean 'zeros'?"),
    (layer, {"position_groups": 3}, "`position_groups` (=3)"),
    (layer, {"position_groups": "channel"}, "`position_groups` (='channel')", "'channels'"),
    (layer, {"position_groups": NAN}, "`position_groups` (=nan)"),
    (layer, {"backend": "dens"}, "`backend` (='dens')", "did you mean 'dense'?"),
    (positions, ([("a", "b")],), "`positions` (=[('a', 'b')])"),
    (positions, ([],), "`positions`"),
    (positions, ([(0, NAN)],), "`positions`", "nan"),
    (positions, ([(0, 1, 2)],), "`positions`"),
    (positions, (5,), "`positions` (=5)"),
    (ActiveShift2d, (0,), "`channels` (=0)"),
    (ActiveShift2d, ("8",), "`channels` (='8')"),
    (ActiveShift2d, {"channels": 4, "radius": NAN}, "`radius` (=nan)"),
    (ActiveShift2d, {"channels": 4, "radius": -1}, "`radius` (=-1)"),
    # surgery
    (convert_to_acu, (5,), "`model`", "5"),
    (convert_to_acu, (net(False),), {"kernel_sizes": []}, "`kernel_sizes` (=[])"),
    (convert_to_acu, (net(False),), {"kernel_sizes": [0]}, "`kernel_sizes` has 0"),
    (convert_to_acu, (net(False),), {"kernel_sizes": "3"}, "`kernel_sizes` has '3'"),
    (convert_to_acu, (net(False),), {"kernel_sizes": [2.5]}, "`kernel_sizes` has 2.5"),
    (convert_to_acu, (net(False),), {"target_modules": 5}, "`target_modules` (=5)"),
    (convert_to_acu, (net(False),), {"target_modules": "("}, "`target_modules` (='(')"),
    (convert_to_acu, (net(False),), {"target_modules": [3]}, "`target_modules` (=[3])"),
    (convert_to_acu, (net(False),), {"exclude_modules": 5}, "`exclude_modules` (=5)"),
    (convert_to_acu, (net(False),), {"filter_fn": 5}, "`filter_fn` (=5)"),
    (convert_to_acu, (net(False),), {"position_groups": 3}, "`position_groups` (=3)"),
    (convert_to_acu, (net(False),), {"backend": "auot"}, "`backend` (='auot')", "did you mean 'auto'?"),
    (convert_to_acu, (net(False),), {"preset": "c23"}, "`preset` (='c23')", "did you mean 'C23'?"),
    (convert_to_acu, (net(False),), {"on_unsupported": "eror"}, "`on_unsupported` (='eror')", "did you mean 'error'?"),
    (ConvertConfig(preset="c23").apply, (net(False),), "`preset` (='c23')", "did you mean 'C23'?"),
    (report_acu, (5,), "`model`", "5"),
    (warm_up, (5, torch.zeros(1, 3, 8, 8)), "`model`", "5"),
    (warm_up, (net(), [1]), "`example_input` (=[1])"),
    (report_acu, (net(),), {"input_size": (3, 8)}, "`input_size` (=(3, 8))"),
    (report_acu, (net(),), {"input_size": 8}, "`input_size` (=8)"),
    (report_acu, (net(),), {"input_size": (3, -8, 8)}, "`input_size` (=(3, -8, 8))"),
    (round_acu, (5,), "`model`", "5"),
    (round_acu, (net(),), {"to": "pixel"}, "`to` (='pixel')", "did you mean 'pixels'?"),
    (fold_acu, (5,), "`model`", "5"),
    (fold_acu, (net(),), {"form": "singel"}, "`form` (='singel')", "did you mean 'single'?"),
    (fold_acu, (net(),), {"runtime": "onnx"}, "`runtime` (='onnx')"),
    (apply_dilations, (net(False), {"nothing": (2, 2)}), "nothing"),
    (apply_dilations, (net(False), 5), "`dilations` (=5)"),
    (acu_layers, (5,), "`model`", "5"),
    (model_statistics, (5,), "`model`", "5"),
    # models, files, pictures
    (create_model, (5,), "`model` (=5)"),
    (create_model, ("resnet_18",), "`model` (='resnet_18')", "did you mean 'resnet18'"),
    (create_model, ("",), "`model` (='')"),
    (create_model, ("resnet18",), {"num_classes": -3}, "`num_classes` (=-3)"),
    (create_model, ("resnet18",), {"num_classes": "3"}, "`num_classes` (='3')"),
    (create_model, ("resnet18",), {"in_chans": 0}, "`in_chans` (=0)"),
    (create_model, ("torchvision/resnet18",), {"num_classes": -3}, "`num_classes` (=-3)"),
    (ImageClassifier, {"model": 5}, "`model` (=5)"),
    (ImageClassifier, {"model": "test_resnet", "num_classes": -1}, "`num_classes` (=-1)"),
    (ImageClassifier, {"model": "test_resnet", "num_classes": 0}, "`num_classes` (=0)"),
    (ImageClassifier, {"model": "test_resnet", "label_smoothing": 2.0}, "`label_smoothing` (=2.0)"),
    (ImageClassifier, {"model": "test_resnet", "label_smoothing": NAN}, "`label_smoothing` (=nan)"),
    (ImageClassifier, {"model": "test_resnet", "convert": 5}, "`convert` (=5)"),
    (ImageClassifier, {"model": "test_resnet", "convert": {"presett": "all"}}, "presett", "did you mean 'preset'?"),
    (ImageClassifier, {"model": "test_resnet", "lr_scheduler_interval": "steps"}, "did you mean 'step'?"),
    (ImageClassifier, {"model": "test_resnet", "compile_mode": "defualt"}, "did you mean 'default'?"),
    (save_acu, (5, "net.pt"), "`model`", "5"),
    (save_acu, (net(), "net.txt"), "net.txt", ".safetensors"),
    (load_acu, ("nowhere.pt",), "nowhere.pt"),
    (acu_state_dict, (5,), "`model`", "5"),
    (load_acu_state_dict, (5, {}), "`model`", "5"),
    (load_acu_state_dict, (net(), 5), "`state` (=5)"),
    (save_pretrained, (5, "folder"), "`model`", "5"),
    (from_pretrained, ("nowhere/at/all",), "nowhere/at/all"),
    (push_to_hub, (5, "someone/net"), "`model`", "5"),
    (export_model, (5, "net.onnx"), "`model`", "5"),
    (export_model, (net(), "net.onxx"), "`to` (='onxx')", "did you mean 'onnx'?"),
    (export_model, (net(), "net.pt2"), {"input_size": (3, 8)}, "`input_size` (=(3, 8))"),
    (export_model, (net(), "net.pt2"), {"input_size": (3, 0, 8)}, "`input_size` (=(3, 0, 8))"),
    (export_model, (net(), "net.pt2"), {"form": "autp"}, "`form` (='autp')", "did you mean 'auto'?"),
    (plot_shapes, (5,), "`model_or_shapes` (=5)"),
    (plot_shapes, ([],), "`model_or_shapes` (=[])"),
    (plot_shapes, (net(),), {"reach": NAN}, "`reach` (=nan)"),
    (plot_shapes, (net(),), {"reach": "wide"}, "`reach` (='wide')"),
    (metrics.position_metrics().update, (5,), "`model`", "5"),
    # training
    (trainer, {"optimizer": 5}, "`optimizer` (=5)"),
    (trainer, {"model": 5}, "`model`", "5"),
    (trainer, {"multiplier": NAN}, "`multiplier` (=nan) must be finite"),
    (trainer, {"multiplier": INF}, "`multiplier` (=inf) must be finite"),
    (trainer, {"multiplier": -1}, "`multiplier` (=-1)"),
    (trainer, {"multiplier": "atuo"}, "`multiplier` (='atuo')", "'auto'"),
    (trainer, {"warmup_steps": 2.5}, "`warmup_steps` (=2.5)"),
    (trainer, {"warmup_steps": -1}, "`warmup_steps` (=-1)"),
    (trainer, {"total_steps": 0}, "`total_steps` (=0)"),
    (trainer, {"schedule": "cosin", "total_steps": 9}, "`schedule` (='cosin')", "did you mean 'cosine'?"),
    (trainer, {"schedule": 5}, "`schedule` (=5)"),
    (trainer, {"normalize": "gradients"}, "`normalize` (='gradients')", "did you mean 'gradient'?"),
    (trainer, {"max_displacement": NAN}, "`max_displacement` (=nan)"),
    (trainer, {"round_at": -0.5, "total_steps": 9}, "`round_at` (=-0.5)"),
    (trainer, {"round_to": "dilations", "round_at": 0.5, "total_steps": 9}, "did you mean 'dilation'?"),
    (trainer, {"collision": "separated", "round_at": 0.5, "total_steps": 9}, "did you mean 'separate'?"),
    (callbacks.ConvertToACU, {"kernel_size": 3}, "'kernel_size'", "did you mean 'kernel_sizes'?"),
    (callbacks.PositionLRSchedule, {"multiplier": NAN}, "`multiplier` (=nan) must be finite"),
    (callbacks.PositionLRSchedule, {"multiplier": INF}, "`multiplier` (=inf) must be finite"),
    (callbacks.PositionLRSchedule, {"multiplier": None}, "`multiplier` (=None)"),
    (callbacks.PositionLRSchedule, {"warmup_steps": -1}, "`warmup_steps` (=-1)"),
    (callbacks.PositionLRSchedule, {"warmup_steps": NAN}, "`warmup_steps` (=nan)"),
    (callbacks.PositionLRSchedule, {"weight_decay": INF}, "`weight_decay` (=inf)"),
    (callbacks.PositionLRSchedule, {"max_displacement": "far"}, "`max_displacement` (='far')"),
    (callbacks.PositionLRSchedule, {"schedule": "latice"}, "`schedule` (='latice')", "did you mean 'lattice'?"),
    (callbacks.PositionLRSchedule, {"normalize": "momntum"}, "`normalize` (='momntum')", "did you mean 'momentum'?"),
    (callbacks.RoundThenFinetune, {"at_fraction": 1.5}, "`at_fraction` (=1.5)"),
    (callbacks.RoundThenFinetune, {"at_fraction": NAN}, "`at_fraction` (=nan)"),
    (callbacks.RoundThenFinetune, {"at_fraction": 0.5, "finetune_lr": INF}, "`finetune_lr` (=inf)"),
    (callbacks.RoundThenFinetune, {"at_fraction": 0.5, "finetune_lr": "0.1"}, "`finetune_lr` (='0.1')"),
    (
        callbacks.RoundThenFinetune,
        {"at_fraction": 0.5, "to": "dilatoin"},
        "`to` (='dilatoin')",
        "did you mean 'dilation'?",
    ),
    (callbacks.RoundThenFinetune, {"at_fraction": 0.5, "collision": "eror"}, "did you mean 'error'?"),
    (callbacks.OffsetLogger, {"every_n_steps": 0}, "`every_n_steps` (=0)"),
    (callbacks.OffsetLogger, {"every_n_steps": NAN}, "`every_n_steps` (=nan)"),
    (callbacks.OffsetLogger, {"every_n_steps": "often"}, "`every_n_steps` (='often')"),
    (callbacks.evaluate_stages, (None, None, None), {"method": "tset"}, "`method` (='tset')", "did you mean 'test'?"),
    # data
    (data.DigitsDataModule, {"batch_size": 0}, "`batch_size` (=0)"),
    (data.DigitsDataModule, {"batch_size": 1.5}, "`batch_size` (=1.5)"),
    (data.DigitsDataModule, {"num_workers": -1}, "`num_workers` (=-1)"),
    (data.DigitsDataModule, {"num_workers": NAN}, "`num_workers` (=nan)"),
    (data.DigitsDataModule(val_size=NAN).setup, (), "`val_size` (=nan)"),
    (data.DigitsDataModule(val_size=-1).setup, (), "`val_size` (=-1)"),
    (data.DigitsDataModule(test_size=5000).setup, (), "`test_size` (=5000)"),
    (data.DigitsDataModule(test_size="many").setup, (), "`test_size` (='many')"),
    (data.CIFARDataModule, {"num_classes": 20}, "`num_classes` (=20)"),
    (data.CIFARDataModule, {"preprocessing": "whitten"}, "`preprocessing` (='whitten')", "did you mean 'whiten'?"),
    (data.ArrayDataModule, {"path": "nowhere.npz", "crop_padding": -1}, "`crop_padding` (=-1)"),
    (data.ArrayDataModule("nowhere.npz").setup, (), "nowhere.npz"),
    (data.Places365DataModule, {"image_size": 0}, "`image_size` (=0)"),
    (data.Places365DataModule, {"num_classes": 0}, "`num_classes` (=0)"),
    (folder, {"image_size": -1}, "`image_size` (=-1)"),
    (folder, {"mean": [0.5]}, "`mean` (=[0.5])"),
    (folder, {"std": [0.5, 0.5, NAN]}, "`std` (=[0.5, 0.5, nan])"),
    (folder, {"interpolation": "bicubik"}, "`interpolation` (='bicubik')", "did you mean 'bicubic'?"),
    (folder, {"crop_pct": NAN}, "`crop_pct` (=nan)"),
    (folder, {"transforms_of": "resnet_18"}, "`transforms_of` (='resnet_18')", "did you mean 'resnet18'?"),
    (folder, {"test_size": 0.2}, "`test_size` (=0.2)"),
    (folder().setup, (), "`train` (='train')", "nowhere"),
]


def unpacked(case):
    """(function, positional, keywords, what the message has to say)."""
    function, *rest = case
    positional = next((part for part in rest if isinstance(part, tuple)), ())
    keywords = next((part for part in rest if isinstance(part, dict)), {})
    return function, positional, keywords, [part for part in rest if isinstance(part, str)]


def name_of(case):
    function, _, _, said = unpacked(case)
    return re.sub(r"\W+", "-", f"{getattr(function, '__qualname__', function)}-{said[0]}").strip("-")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_message_names_the_argument_its_value_and_the_nearest_choice(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, positional, keywords, said = unpacked(case)
    with pytest.raises((TypeError, ValueError, FileNotFoundError, OSError)) as caught:
        function(*positional, **keywords)
    for text in said:
        assert text in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_every_public_function_and_class_is_in_the_table():
    functions = [getattr(case[0], "__self__", case[0]) for case in CASES]  # the objects of methods
    called = {getattr(each, "__name__", type(each).__name__) for each in functions}
    called |= {"acu_conv2d", "ACUConv2d", "PositionTrainer", "ImageFolderDataModule"}  # by the helpers above
    public = {name for name in lightning_acu.__all__ if callable(getattr(lightning_acu, name))}
    public |= {name for room in (callbacks, data) for name in room.__all__ if callable(getattr(room, name))}
    left_out = {
        "FoldedConv2d",  # made by a fold, from arguments that are right already
        "CheckpointAfterRounding",  # Lightning's ModelCheckpoint checks its arguments
        "ImageDataModule",  # abstract, as is the next; the others are their subclasses
        "InMemoryDataModule",
        "DeviceLoader",  # tests/data/test_device_loader.py and test_whitening.py have tables of their own
        "ZCAWhitening",
        "global_contrast_normalize",
    }
    assert public - left_out - called == set()
