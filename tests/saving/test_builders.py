"""Models that are neither timm's nor torchvision's in files: by a function that builds them, or into a given model."""

import copy
import functools
import json
import sys

import pytest
import torch
from helpers import own_models
from helpers.own_models import Net, build, build_list
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, create_model, fold_acu
from lightning_acu.saving import load_acu, save_acu, save_pretrained
from lightning_acu.saving.checkpoint import load_any

IMAGE = torch.linspace(-1, 1, 2 * 3 * 12 * 17).view(2, 3, 12, 17)


def converted(model):
    """Layers converted in two ways, every tap between pixels, norms with statistics; in eval mode."""
    convert_to_acu(model, target_modules=["stem"], position_groups=2)
    convert_to_acu(model, target_modules=["depthwise"], kernel_sizes=[(3, 5)], fixed_centre=False)
    torch.manual_seed(0)
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    model.train()(IMAGE)
    return model.eval()


@pytest.fixture
def model():
    return converted(Net(width=12, classes=4))


@pytest.fixture
def path(model, tmp_path):
    save_acu(model, tmp_path / "model.pt", builder=build, kwargs={"width": 12, "classes": 4})
    return tmp_path / "model.pt"


def same(model, loaded):
    state = loaded.state_dict()
    equal = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    return equal and torch.equal(model(IMAGE), loaded(IMAGE))


def how(model):
    return [
        (name, type(layer), layer.position_groups, layer.fixed_tap, layer.start) for name, layer in acu_layers(model)
    ]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("builder", [build, Net, "helpers.own_models:build"], ids=["function", "class", "name"])
def test_a_model_of_ones_own_comes_back(builder, suffix, model, tmp_path):
    path = tmp_path / f"model{suffix}"
    save_acu(model, path, builder=builder, kwargs={"width": 12}, classes=4)
    for arguments in (
        {"builder": build},
        {"trust_builder": True},
        {"model": Net(12, 4).eval()},
        {"model": converted(Net(12, 4))},
    ):
        loaded = load_acu(path, **arguments)
        assert how(loaded) == how(model)
        assert same(model, loaded)
        assert not loaded.training
    assert len(how(model)) == 3
    assert same(model, load_any(path, trust=True))


def test_a_builder_makes_format_2_and_a_name_format_1(path, tmp_path):
    content = torch.load(path)["lightning_acu"]
    assert content["format_version"] == 2
    assert content["architecture"] == {"builder": "helpers.own_models:build", "kwargs": {"width": 12, "classes": 4}}
    save_acu(convert_to_acu(create_model("test_resnet")), tmp_path / "named.pt")
    assert torch.load(tmp_path / "named.pt")["lightning_acu"]["format_version"] == 1  # which version 0.1 reads


HOSTILE = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def build(**kwargs):
    Path(__file__).with_name("called").touch()
"""


@pytest.fixture
def hostile(path, tmp_path, monkeypatch):
    """A file with a builder that leaves files where it is imported or called."""
    (tmp_path / "their_hostile_module.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(path)
    content["lightning_acu"]["architecture"]["builder"] = "their_hostile_module:build"
    torch.save(content, tmp_path / "hostile.pt")
    yield tmp_path / "hostile.pt"
    sys.modules.pop("their_hostile_module", None)


def test_a_builder_that_a_file_names_is_not_imported(hostile, model):
    imported, called = hostile.with_name("imported"), hostile.with_name("called")
    for load in (load_acu, load_any):
        with pytest.raises(ValueError, match=r"'their_hostile_module:build' builds.*Nothing was. Pass .*trust_builder"):
            load(hostile)
    assert same(model, load_acu(hostile, builder=build))
    assert same(model, load_acu(hostile, model=Net(12, 4).eval()))
    assert "their_hostile_module" not in sys.modules
    assert not imported.exists()
    with pytest.raises(ValueError, match=r"it returned a NoneType, not an nn.Module"):
        load_acu(hostile, trust_builder=True)
    assert imported.exists()
    assert called.exists()


@pytest.mark.parametrize("name", ["os.system", "os:", ":system", "os:system()", "os:a b", "", "os;x:y", "1:2", "a:b:c"])
def test_a_name_of_another_form_is_damage(name, path):
    content = torch.load(path)
    content["lightning_acu"]["architecture"]["builder"] = name
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"(?s)is damaged .*`architecture.builder` .* must have the form"):
        load_acu(path, trust_builder=True)


def test_builders_that_no_file_can_name(model, tmp_path):
    path = tmp_path / "model.pt"
    kwargs = {"width": 12, "classes": 4}

    def local(**kwargs):
        return Net(**kwargs)

    for builder in (lambda **kwargs: Net(**kwargs), local, own_models.build_lambda, Net(12).forward):
        with pytest.raises(ValueError, match=r"`builder` \(=.*\) cannot be found by that name, .* top level"):
            save_acu(model, path, builder=builder, kwargs=kwargs)
    with pytest.raises(TypeError, match=r"give arguments as `kwargs`, not in a functools\.partial"):
        save_acu(model, path, builder=functools.partial(Net, width=12))
    with pytest.raises(ValueError, match=r'must have the form "package.module:function"'):
        save_acu(model, path, builder="helpers.own_models.build", kwargs=kwargs)
    for name in ("no_such_package:build", "helpers.own_models:no_such"):
        with pytest.raises(ValueError, match=f"the builder '{name}' cannot be imported"):
            save_acu(model, path, builder=name, kwargs=kwargs)
    with pytest.raises(ValueError, match=r"it returned a list, not an nn.Module"):
        save_acu(model, path, builder=build_list)
    with pytest.raises(TypeError, match=r"both say how to build the model"):
        save_acu(model, path, builder=build, name="resnet18")
    with pytest.raises(TypeError, match=r"`width` \(=<.*>\) cannot be saved as JSON"):
        save_acu(model, path, builder=build, kwargs={"width": object()})
    with pytest.raises(ValueError, match=r"does not state its architecture; .*builder=\"package.module:function\""):
        save_acu(model, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("save", [save_acu, save_pretrained])
def test_arguments_of_a_builder_that_are_no_dict(save, model, tmp_path):
    with pytest.raises(TypeError, match=r"`kwargs` \(=\[5\]\) must be a dict of arguments by name, not a list"):
        save(model, tmp_path / "model.pt", builder=build, kwargs=[5])


def test_what_the_builder_builds_is_compared(model, tmp_path):
    for kwargs, message in (
        ({}, r"helpers.own_models:Net\(\) builds: the out_channels of stem is 8 there"),
        ({"width": 12, "classes": 4, "stride": 2}, r"the stride of stem is \(2, 2\) there|stride of stem is 2 there"),
        ({"depth": 3}, r"helpers.own_models:Net\(depth=3\) fails: .*unexpected keyword"),
    ):
        with pytest.raises(ValueError, match=message):
            save_acu(model, tmp_path / "model.pt", builder=Net, kwargs=kwargs)
    assert not list(tmp_path.iterdir())


def test_one_way_to_a_model(path):
    for arguments in ({"builder": build, "trust_builder": True}, {"model": Net(), "builder": build}):
        with pytest.raises(TypeError, match=r"exclude each other"):
            load_acu(path, **arguments)
    with pytest.raises(TypeError, match=r"`builder` \(='helpers.own_models:build'\) must be the function itself"):
        load_acu(path, builder="helpers.own_models:build")
    with pytest.raises(TypeError, match=r"must be an nn.Module, got type"):
        load_acu(path, model=Net)


def test_a_given_model_keeps_its_parameters_and_how_it_is_run(path, model):
    given = Net(12, 4).to(torch.float64).train()
    parameters = {name: id(parameter) for name, parameter in given.named_parameters()}
    assert load_acu(path, model=given) is given
    assert given.training
    assert {name: id(p) for name, p in given.named_parameters() if name in parameters} == parameters
    assert given.stem.weight.dtype == torch.float64
    torch.testing.assert_close(given.eval()(IMAGE.double()), model(IMAGE).double(), rtol=1e-5, atol=1e-6)
    assert not list(acu_layers(fold_acu(given)))
    half = load_acu(path, model=Net(12, 4).bfloat16())
    assert half.stem.offsets.dtype == torch.float32
    assert torch.equal(half.stem.offsets, model.stem.offsets)


def replaced(name, module):
    def change(model):
        model.set_submodule(name, module)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("stem", nn.Identity()), "stem should be a convolution to convert, but is a Identity"),
        (replaced("stem", nn.Conv2d(3, 12, 3, 2, 1)), r"the stride of stem is \[2, 2\] in the model and \[1, 1\]"),
        (replaced("stem", nn.Conv2d(3, 12, 5, 1, 1)), r"the kernel_size of stem is \[5, 5\] in the model"),
        (replaced("depthwise", nn.Conv2d(12, 12, (3, 5), padding=(1, 2))), "the groups of depthwise is 1 in the model"),
        (replaced("stem", nn.Conv2d(3, 13, 3, padding=1)), r"`position_groups` \(=2\) must divide"),
        (replaced("head", nn.Linear(6, 7)), r"shape of head.\w+ is \(7.*\) in the model and \(4.*\) in the file"),
        (replaced("head", nn.Identity()), "the model does not have head.bias, head.weight"),
        (replaced("more", nn.Linear(2, 3)), "the file does not have more.bias, more.weight"),
        (
            lambda m: convert_to_acu(m, target_modules=["stem"]),
            "the position_groups of stem is 1 in the model and 2 in the file",
        ),
        (
            lambda m: convert_to_acu(m, target_modules=["depthwise"], kernel_sizes=[(3, 5)]),
            "the fixed_tap of depthwise is 7 in the model and None in the file",
        ),
        (
            lambda m: m.set_submodule("more", convert_to_acu(nn.Conv2d(1, 1, 3))),
            "active in the model, but plain in the file: more",
        ),
        (lambda m: fold_acu(converted(m)), "stem should be a convolution to convert, but is a ReshapedConv2d"),
        (lambda m: m.to("meta"), "tensors on the meta device"),
        (
            lambda m: m.register_load_state_dict_pre_hook(lambda module, state, *_: state.pop("norm.bias")),
            r"Missing key\(s\) in state_dict: \"norm.bias\"",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_not_changed(change, message, path):
    model = Net(12, 4)
    change(model)
    kinds, values = [type(m) for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"(?s)`path` .* does not fit `model` \(=Net\), which was not.*{message}"):
        load_acu(path, model=model)
    assert [type(m) for m in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    state = model.state_dict()
    assert state.keys() == values.keys()
    assert all(torch.equal(value, state[key]) for key, value in values.items() if not value.is_meta)


@pytest.mark.slow
def test_wrapped_models_are_refused(path):
    for wrapped, message in (
        (nn.DataParallel(Net(12, 4)), r"is a DataParallel; load into model\.module"),
        (torch.compile(Net(12, 4)), r"is a OptimizedModule; load into model\._orig_mod"),
    ):
        with pytest.raises(TypeError, match=message):
            load_acu(path, model=wrapped)


def test_a_named_architecture_loads_into_a_given_model_too(tmp_path):
    model = convert_to_acu(create_model("test_resnet", num_classes=3)).eval()
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    save_acu(model, tmp_path / "model.safetensors")
    for arguments in ({"model": create_model("test_resnet", num_classes=3).eval()}, {"builder": own_resnet}):
        assert same(model, load_acu(tmp_path / "model.safetensors", **arguments))


def own_resnet(num_classes, in_chans):
    return create_model("test_resnet", num_classes=num_classes, in_chans=in_chans)


ODD = st.sampled_from([None, True, -1, 0, 3, 10**12, 0.5, "", "x", "os:system", [], {}, [1, 2], [[0, 0]] * 9, {"a": 1}])


def places(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_records_load_or_change_nothing(data, path, tmp_path):
    content = torch.load(path)
    record = content["lightning_acu"] = json.loads(json.dumps(content["lightning_acu"]))
    for *outer, key in data.draw(st.lists(st.sampled_from(list(places(record))), min_size=1, max_size=2)):
        try:
            inner = functools.reduce(lambda value, step: value[step], outer, record)
            inner[key] = data.draw(ODD)
        except (KeyError, TypeError, IndexError):  # an earlier change took the place away
            continue
    torch.save(content, tmp_path / "changed.pt")
    given = Net(12, 4).eval()
    before = copy.deepcopy(given)
    why = ""
    try:
        load_acu(tmp_path / "changed.pt", model=given)
    except ValueError as error:
        why = str(error)
    assert given(IMAGE).isfinite().all()
    if why:
        assert "`path`" in why
        assert how(given) == how(before)
        assert same(before, given)
