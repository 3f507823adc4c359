"""Files of save_acu that are damaged or made to harm: a ValueError names the field, and little memory is taken."""

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lightning_acu import acu_layers, convert_to_acu, create_model
from lightning_acu.saving import acu_state_dict, load_acu, load_acu_state_dict, save_acu
from lightning_acu.saving.limits import BuildLimit, TooLargeError

pytestmark = pytest.mark.slow


def network():
    torch.manual_seed(0)
    model = convert_to_acu(create_model("test_resnet", num_classes=3), position_groups=2, kernel_sizes=3).eval()
    for _, layer in acu_layers(model):
        nn.init.uniform_(layer.offsets, -1, 1)
    return model


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What a file of save_acu holds."""
    path = tmp_path_factory.mktemp("content") / "model.pt"
    save_acu(network(), path, num_classes=3)
    return torch.load(path)


def changed(content, change):
    """A copy of ``content``, changed."""
    record, state = json.loads(json.dumps(content["lightning_acu"])), dict(content["state_dict"])
    change(record, state)
    return {"lightning_acu": record, "state_dict": state}


def layer(**values):
    return lambda record, state: record["layers"][0].update(values)


def kwargs(**values):
    return lambda record, state: record["architecture"]["kwargs"].update(values)


def positions(change):
    def changing(record, state):
        key = record["layers"][0]["name"] + ".offsets"
        state[key] = change(state[key].clone())

    return changing


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record, state: record.update(format_version=-5), "`format_version` of 1 or more"),
        (lambda record, state: record.update(format_version=0), "`format_version` of 1 or more"),
        (lambda record, state: record.update(format_version=True), "`format_version` of 1 or more"),
        (lambda record, state: record.update(format_version="1"), "`format_version` of 1 or more"),
        (lambda record, state: record.update(architecture=None), r"`architecture` \(=None\) must be of type dict"),
        (lambda record, state: record["architecture"].update(kwargs=None), r"`architecture.kwargs` \(=None\)"),
        (lambda record, state: record["architecture"].update(name=["a"]), r"`architecture.name` \(=\['a'\]\)"),
        (lambda record, state: record["architecture"].pop("name"), "`architecture.name` is missing"),
        (lambda record, state: record.update(layers={}), r"`layers` \(=\{\}\) must be of type list"),
        (lambda record, state: record.update(layers=[3]), r"`layers\[0\]` \(=3\) must be a dict"),
        (lambda record, state: record.update(aliases=None), r"`aliases` \(=None\) must be of type dict"),
        (lambda record, state: record.update(aliases={"fc.bias": 3}), r"`aliases.fc.bias` \(=3\)"),
        (lambda record, state: record.update(aliases={"fc.bias": "no"}), r"`aliases.fc.bias` \(='no'\) is not in"),
        (lambda record, state: record.update(buffer_dtypes={"a": "torch.load"}), r"`buffer_dtypes.a` \(='torch.load'"),
        (lambda record, state: record.update(buffer_dtypes={"a": None}), r"`buffer_dtypes.a` \(=None\)"),
        (layer(fixed_tap=99), r"`fixed_tap` \(=99\) of .* must be less than its number of taps \(=9\)"),
        (layer(fixed_tap="x"), r"`layers\[0\].fixed_tap` \(='x'\)"),
        (layer(fixed_tap=-1), r"`layers\[0\].fixed_tap` \(=-1\)"),
        (layer(fixed_tap=1.5), r"`layers\[0\].fixed_tap` \(=1.5\)"),
        (layer(fixed_tap=True), r"`layers\[0\].fixed_tap` \(=True\)"),
        (layer(start=[[0, NAN]] * 9), r"`layers\[0\].start` .* must be pairs of finite numbers"),
        (layer(start=[[0, INF]] * 9), r"`layers\[0\].start` .* must be pairs of finite numbers"),
        (layer(start=[[0, 1, 2]] * 9), r"`layers\[0\].start` .* must be pairs"),
        (layer(start=[None] * 9), r"`layers\[0\].start` .* must be pairs"),
        (layer(start="abc"), r"`layers\[0\].start` \(='abc'\)"),
        (layer(start=[[0, 1]] * 8), r"`start` of .* has 8 positions for 9 taps"),
        (layer(start=[]), r"`start` of .* has 0 positions for 9 taps"),
        (layer(position_groups=0), r"`layers\[0\].position_groups` \(=0\)"),
        (layer(position_groups=10**9), r"`position_groups` \(=1000000000\)"),
        (layer(position_groups=None), r"`layers\[0\].position_groups` \(=None\)"),
        (layer(backend=7), r"`layers\[0\].backend` \(=7\)"),
        (layer(name=None), r"`layers\[0\].name` \(=None\)"),
        (kwargs(num_classes=10**12), "many more tensors, or larger ones, than the file holds"),
        (kwargs(num_classes=-3), "does not fit"),
        (kwargs(num_classes="three"), "fails"),
        (kwargs(in_chans=[3]), "fails"),
        (kwargs(layers=[100000] * 4), "many more tensors, or larger ones, than the file holds"),
        (kwargs(channels=[2**20] * 4), "many more tensors, or larger ones, than the file holds"),
        (positions(torch.Tensor.half), r"the positions '.*offsets' of `layers\[0\]` are in torch.float16"),
        (positions(torch.Tensor.bfloat16), "are in torch.bfloat16"),
        (positions(torch.Tensor.long), "are in torch.int64"),
        (positions(lambda p: p.fill_(NAN)), r"the positions '.*offsets' of `layers\[0\]` are not finite"),
        (positions(lambda p: torch.cat([p[1:], p.new_tensor([INF])])), "are not finite"),
        (positions(lambda p: p[1:]), "size mismatch"),
        (positions(lambda p: p.to("meta")), r"`state_dict\['.*offsets'\]` .*meta\) must hold real numbers"),
        (positions(lambda p: p.to_sparse()), "is damaged or was not written by save_acu"),
        (positions(lambda p: p.to(torch.complex64)), r"\(torch.complex64, .*\) must hold real numbers"),
        (positions(lambda p: 3), r"`state_dict\['.*offsets'\]` \(a int\) must be a tensor"),
        (lambda r, s: s.pop(r["layers"][0]["name"] + ".offsets"), "the file has no '.*offsets'"),
        (lambda r, s: s.update({3: torch.zeros(1)}), r"`state_dict\[3\]` \(a Tensor\) must be a tensor with a name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change, message, content, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(changed(content, change), path)
    with pytest.raises(ValueError, match=rf"(?s)`path` \(='.*model.pt'\).*{message}"):
        load_acu(path)


@pytest.mark.parametrize("value", [None, [], 7, {"a": 3}])
def test_the_state_dict_is_one(value, content, tmp_path):
    torch.save(changed(content, lambda *_: None) | {"state_dict": value}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is damaged or was not written by save_acu"):
        load_acu(tmp_path / "model.pt")


def test_a_tensor_that_repeats_one_number_does_not_raise_the_limit(content, tmp_path):
    def change(record, state):
        state["fc.weight"] = torch.zeros(1).expand(10**9, 64)
        record["architecture"]["kwargs"].update(num_classes=10**9)

    torch.save(changed(content, change), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="many more tensors, or larger ones, than the file holds"):
        load_acu(tmp_path / "model.pt")


HOSTILE = """
import json, resource, sys, torch, lightning_acu, timm
from lightning_acu.saving import load_acu
from safetensors.torch import save_file
save_file({"a": torch.zeros(1)}, "small.safetensors", metadata={"lightning_acu": json.dumps({
    "format_version": 1, "layers": [], "aliases": {}, "buffer_dtypes": {}, "versions": {},
    "architecture": {"name": "resnet50", "kwargs": json.loads(sys.argv[1])}})})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load_acu("small.safetensors")
except ValueError as error:
    print("than the file holds" in str(error))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(
    "kwargs", [{"layers": [100000] * 4}, {"num_classes": 10**10}, {"layers": [3, 4, 10**15, 3]}], ids=str
)
def test_two_kilobytes_do_not_exhaust_the_memory(kwargs, tmp_path):
    command = [sys.executable, "-c", HOSTILE, json.dumps(kwargs)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    message, megabytes = done.stdout.splitlines()
    assert message == "True"
    assert int(megabytes) < 700


def test_the_limit_counts_tensors_and_bytes_before_they_are_made():
    with pytest.raises(TooLargeError), BuildLimit([torch.zeros(10)]):
        torch.zeros(2**40)
    for make in (lambda: torch.linspace(0, 1, 2**32), lambda: torch.zeros(1).new_empty(2**20, 2**20)):
        with pytest.raises(TooLargeError), BuildLimit([]):
            make()
    with pytest.raises(TooLargeError), BuildLimit([]):
        list(map(torch.zeros, [1] * 10_000))
    boundless = [torch.zeros(1).expand(2**40), torch.empty(2**40, device="meta")]
    with pytest.raises(TooLargeError), BuildLimit(boundless):
        torch.zeros(2**32)
    with BuildLimit([]):
        torch.stack([torch.zeros(3), torch.ones(3)]).sum().item()
    torch.zeros(1)  # outside of it there is none


@pytest.fixture
def little_memory():
    """Whatever a file asks for, this process may take 4 GB more, and must not have taken 1 GB."""
    limits, pages = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**32, limits[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for suffix in ("pt", "safetensors"):
        save_acu(network(), folder / f"model.{suffix}", num_classes=3)
    return {suffix: (folder / f"model.{suffix}").read_bytes() for suffix in ("pt", "safetensors")}


def loads_or_says_why(path):
    why = ""
    try:
        model = load_acu(path)
    except ValueError as error:
        why = str(error)
    else:
        assert all(offsets.isfinite().all() for offsets in acu_state_dict(model).values())
    assert not why or "`path`" in why


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch's own, of odd pickles
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.usefixtures("little_memory")
@FUZZ
@given(data=st.data())
def test_flipped_and_missing_bytes(suffix, data, files, tmp_path):
    content = bytearray(files[suffix])
    # Most of a file is weights; the record and what describes the tensors are at its start and end.
    place = st.one_of(st.integers(0, 4000), st.integers(0, len(content) - 1), st.integers(-4000, -1))
    for where in data.draw(st.lists(place, min_size=0, max_size=4)):
        content[where] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
    (tmp_path / f"model.{suffix}").write_bytes(bytes(content[:cut]))
    loads_or_says_why(tmp_path / f"model.{suffix}")


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from([10**6, 10**12, -1, 2**63, 0.5, 1e300, NAN, INF, ""]),
    st.sampled_from(["x", "auto", "torch.float32", "conv1", "fc.bias", [], {}, [1, 2], [[0, 0]] * 9, {"a": 1}]),
)  # fmt: skip


def places(value, path=()):
    """Every place in a record: of fields, items, and fields that are not there yet."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2]
        for key, part in items:
            yield (*path, key)
            yield from places(part, (*path, key))
        if isinstance(value, dict):
            yield (*path, "new")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.usefixtures("little_memory")
@FUZZ
@given(data=st.data())
def test_changed_fields_of_the_record(data, content, tmp_path):
    copy = changed(content, lambda *_: None)
    record = copy["lightning_acu"]
    for *outer, key in data.draw(st.lists(st.sampled_from(list(places(record))), min_size=1, max_size=3)):
        inner = record
        try:
            for step in outer:
                inner = inner[step]
            if data.draw(st.integers(0, 3)) == 0:
                del inner[key]
            else:
                inner[key] = data.draw(ODD)
        except (KeyError, TypeError, IndexError):  # an earlier change took the place away
            continue
    metadata = {"lightning_acu": json.dumps(record)}
    state = {key: value.clone() for key, value in copy["state_dict"].items()}
    save_file(state, tmp_path / "model.safetensors", metadata=metadata)
    loads_or_says_why(tmp_path / "model.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.usefixtures("little_memory")
@FUZZ
@given(data=st.data())
def test_positions_alone_from_somebody_else(data):
    model = network()
    before = {key: value.clone() for key, value in acu_state_dict(model).items()}
    state = dict(before)
    values = [
        None, 3, "x", [], torch.zeros(2), torch.zeros(()), torch.zeros(0), torch.zeros(6, 6), torch.full((36,), NAN),
        torch.zeros(36).half(), torch.full((36,), 1e76, dtype=torch.float64), torch.zeros(36).to_sparse(),
        *(torch.zeros(36, dtype=dtype) for dtype in (torch.complex64, torch.bool, torch.int32)),
        torch.zeros(36, device="meta"),
    ]  # fmt: skip
    for key in data.draw(
        st.lists(st.sampled_from([*before, "new.offsets", "fc.offsets", "offsets", "", 7]), min_size=1)
    ):
        state[key] = data.draw(st.sampled_from(values))
    why = ""
    try:
        load_acu_state_dict(model, state, strict=data.draw(st.booleans()))
    except (ValueError, TypeError) as error:
        why = str(error)
    after = acu_state_dict(model)
    assert all(value.isfinite().all() for value in after.values())
    if why:
        assert "`state`" in why
        assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_planted_link_is_replaced_and_not_followed(suffix, tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "models"
    folder.mkdir()
    victim.write_text("untouched")
    path = folder / f"model.{suffix}"
    for name in (path.name, f".{path.name}.{os.getpid()}.tmp", f"{path.name}.tmp"):
        (folder / name).symlink_to(victim)
    save_acu(network(), path, num_classes=3)
    assert victim.read_text() == "untouched"
    assert not path.is_symlink()
    load_acu(path)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_threads_that_save_to_one_path_do_not_disturb_each_other(suffix, tmp_path):
    path, model, failed = tmp_path / f"model.{suffix}", network(), []

    def save():
        try:
            for _ in range(3):
                save_acu(model, path, num_classes=3)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    load_acu(path)


def test_positions_that_are_not_finite_are_not_saved(tmp_path):
    model = network()
    with torch.no_grad():
        next(acu_layers(model))[1].offsets[3] = NAN
    with pytest.raises(ValueError, match=r"has positions that are not finite \(.+\), which no file can bring back"):
        save_acu(model, tmp_path / "model.pt", num_classes=3)
    assert not list(Path(tmp_path).iterdir())
