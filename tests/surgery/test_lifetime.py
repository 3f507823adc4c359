"""Surgery leaves nothing behind on the user's objects: models are freed at once, pickles name public things only."""

import copy
import gc
import pickle
import pickletools
import weakref

import pytest
import torch
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, create_model, fold_acu
from lightning_acu.surgery import MergingGuard

pytestmark = pytest.mark.slow


def perturbed(name):
    model = convert_to_acu(create_model(name, num_classes=2))
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -0.7, 0.7)
    return model


MAKE = {
    "converted": lambda: perturbed("test_resnet"),
    "torchvision": lambda: perturbed("torchvision/resnet18"),
    "folded": lambda: fold_acu(perturbed("test_resnet")),
    "merging": lambda: perturbed("mobileone_s0"),
    "merging and folded": lambda: fold_acu(perturbed("repvgg_a0")),
    "copied": lambda: copy.deepcopy(perturbed("repvgg_a0")),
    "unpickled": lambda: pickle.loads(pickle.dumps(fold_acu(perturbed("repvgg_a0")))),
}
models = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@pytest.fixture
def without_collector():
    """No garbage collection: only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@models
def test_a_model_is_freed_as_soon_as_it_is_deleted(make, without_collector):
    model = make()
    parts = [weakref.ref(module) for module in model.modules()]
    del model
    assert all(part() is None for part in parts)


def test_a_model_is_freed_while_its_copy_lives_on(without_collector):
    model = perturbed("repvgg_a0")
    twin, parts = copy.deepcopy(model), [weakref.ref(module) for module in model.modules()]
    del model
    assert all(part() is None for part in parts)
    with pytest.raises(RuntimeError, match=r"reparameterize\(\) merges weights of active convolutions \(stem\."):
        twin.stem.reparameterize()


@models
def test_a_pickle_names_no_private_function(make):
    strings = {argument for _, argument, _ in pickletools.genops(pickle.dumps(make())) if isinstance(argument, str)}
    ours = {text for text in strings if text.startswith("lightning_acu")}
    assert ours <= {"lightning_acu.conv", "lightning_acu.folded", "lightning_acu.surgery.guards"}
    assert not {"_load", "_refuse", "_merge_if_equal"} & strings


@models
def test_nothing_but_guards_stands_in_front_of_a_method(make):
    for module in make().modules():
        ours = {name: value for name, value in vars(module).items() if callable(getattr(type(module), name, None))}
        assert all(isinstance(value, MergingGuard) for value in ours.values())


def test_a_guard_whose_module_is_gone_says_so():
    block = nn.Sequential(nn.Conv2d(2, 2, 3))
    guard = MergingGuard(block, "fuse")
    del block
    with pytest.raises(ReferenceError, match=r"the module of this guarded fuse\(\) does not exist any more"):
        guard()


def test_converted_models_are_saved_whole(tmp_path):
    model, image = perturbed("test_resnet").eval(), torch.randn(1, 3, 32, 32)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(image), model(image))
