"""State dicts between plain, converted and folded models: what loads wherever the layers sit, and what does not."""

import contextlib
import copy
import pickle
import re
import warnings

import pytest
import torch
from helpers.oracle import assert_close
from safetensors.torch import load_file, save_file
from timm import create_model
from timm.utils import ModelEmaV3
from torch import nn

from lightning_acu import ACUConv2d, ImageClassifier, acu_layers, convert_to_acu, fold_acu, round_acu

FROM_PLAIN = "`state_dict` is that of a plain model: it has no offsets for .* whose taps stay where they start"
TOO_LATE = r"`state_dict` is that of a plain model: .* whose taps have moved.*call reset_parameters\(\)"


@pytest.fixture
def other(net):
    """A plain network like ``net`` with other numbers in everything."""
    twin = copy.deepcopy(net)
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return twin.eval()


def equal(state, other):
    return list(state) == list(other) and all(torch.equal(value, other[key]) for key, value in state.items())


def test_a_plain_state_dict_loads_with_one_warning_for_all_layers(net, other, image):
    convert_to_acu(net)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        result = net.load_state_dict(other.state_dict())
    assert [warning.category for warning in seen] == [UserWarning]
    assert re.match(FROM_PLAIN, str(seen[0].message))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_close(net.eval()(image), other(image))
    assert all(not layer.offsets.any() for _, layer in acu_layers(net))


def test_without_strict_the_result_lists_the_positions_as_torch_does(net, other, image, move):
    move(convert_to_acu(net))
    before = {name: layer.offsets.clone() for name, layer in acu_layers(net)}
    with pytest.warns(UserWarning, match=TOO_LATE):
        result = net.load_state_dict(other.state_dict(), strict=False)
    assert set(result.missing_keys) == {f"{name}.offsets" for name in before}
    assert result.unexpected_keys == []
    assert all(torch.equal(layer.offsets, before[name]) for name, layer in acu_layers(net))
    assert torch.equal(net.stem.weight, other.stem.weight)


def test_a_plain_state_dict_is_refused_where_positions_have_moved(net, other):
    convert_to_acu(net)
    with torch.no_grad():
        net.layer2.xconv1.offsets[3] = 1e-3
    before = net.layer2.xconv1.offsets.clone()
    with (
        pytest.warns(UserWarning, match=TOO_LATE),
        pytest.warns(UserWarning, match=FROM_PLAIN),  # the other layers, which have taken theirs
        pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "layer2.xconv1.offsets"\. *$'),
    ):
        net.load_state_dict(other.state_dict())
    assert torch.equal(net.layer2.xconv1.offsets, before)


def test_reset_layers_take_a_plain_state_dict_again_as_the_warning_says(net, other, image, move):
    for _, layer in acu_layers(move(convert_to_acu(net))):
        layer.reset_parameters()
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(other.state_dict())
    assert_close(net.eval()(image), other(image))


def test_what_a_fixed_centre_has_stored_is_no_moved_position(net, other, image):
    convert_to_acu(net)
    with torch.no_grad():
        net.stem.offsets.view(-1, 2)[net.stem.fixed_tap] = 0.7
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(other.state_dict())
    assert_close(net.eval()(image), other(image))


@pytest.mark.parametrize("moved", [False, True])
def test_other_missing_and_unexpected_keys_are_still_torchs_errors(net, other, move, moved):
    convert_to_acu(net)
    without, extra, smaller = (other.state_dict() for _ in range(3))
    del without["layer1.0.conv1.bias"]
    extra["layer9.weight"] = torch.zeros(2)
    smaller["stem.weight"] = smaller["stem.weight"][:3]
    if moved:  # of a converted model: torch alone
        full = move(copy.deepcopy(net)).state_dict()
        positions = {key: value for key, value in full.items() if key.endswith("offsets")}
        for state in (without, extra, smaller):
            state.update(positions)
    for state, message in (
        (without, r'Missing key\(s\) in state_dict: "layer1.0.conv1.bias"\.'),
        (extra, r'Unexpected key\(s\) in state_dict: "layer9.weight"'),
        (smaller, "size mismatch for stem.weight"),
    ):
        expected = contextlib.nullcontext() if moved else pytest.warns(UserWarning, match=FROM_PLAIN)
        with expected, pytest.raises(RuntimeError, match=message) as caught:
            net.load_state_dict(state)
        assert "offsets" not in str(caught.value)


def test_positions_of_another_number_of_groups_are_torchs_error(net, move):
    state = move(convert_to_acu(copy.deepcopy(net), position_groups=2)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for stem.offsets"):
        convert_to_acu(net).load_state_dict(state)


def test_a_converted_state_dict_does_not_fit_a_folded_model(net, move):
    state = copy.deepcopy(move(convert_to_acu(net), 0.4).state_dict())
    fold_acu(net)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "stem\.offsets", '):
        net.load_state_dict(state)


def test_a_converted_state_dict_does_not_fit_one_converted_in_part(net, move):
    state = move(convert_to_acu(copy.deepcopy(net))).state_dict()
    convert_to_acu(net, target_modules=["stem"])
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "layer1\.1\.conv1\.offsets", '):
        net.load_state_dict(state)
    result = net.load_state_dict(state, strict=False)
    assert "layer1.1.conv1.offsets" in result.unexpected_keys
    assert torch.equal(net.stem.offsets, state["stem.offsets"])


def test_a_state_dict_converted_in_part_loads_into_one_converted_whole(net, image, move):
    partly = move(convert_to_acu(copy.deepcopy(net), target_modules=["stem"])).eval()
    convert_to_acu(net)
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(partly.state_dict())
    assert_close(net.eval()(image), partly(image))


@pytest.mark.parametrize("assign", [False, True])
def test_a_converted_model_loads_into_a_converted_one_without_a_word(net, image, move, assign):
    source = move(convert_to_acu(copy.deepcopy(net), position_groups=2)).eval()
    convert_to_acu(net, position_groups=2)
    assert net.load_state_dict(source.state_dict(), assign=assign).missing_keys == []
    assert torch.equal(net.eval()(image), source(image))


def test_assign_takes_the_plain_tensors_themselves(net, other, image):
    convert_to_acu(net)
    net.stem.weight.requires_grad_(False)
    state = other.state_dict()
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(state, assign=True)
    assert net.stem.weight.data_ptr() == state["stem.weight"].data_ptr()
    assert not net.stem.weight.requires_grad
    assert isinstance(net.stem.offsets, nn.Parameter)
    assert net.stem.offsets.requires_grad
    assert_close(net.eval()(image), other(image))


def test_plain_numbers_assigned_to_a_model_on_the_meta_device_leave_its_taps_on_the_grid(net, other, image):
    convert_to_acu(net.to("meta"))
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(other.state_dict(), assign=True)
    assert isinstance(net.stem.offsets, nn.Parameter)
    assert_close(net.eval()(image), other(image))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_loads_into_itself_and_not_into_the_original(net, other, image, clone):
    convert_to_acu(net)
    before = copy.deepcopy(net.state_dict())
    twin = clone(net)
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        twin.load_state_dict(other.state_dict())
    assert_close(twin.eval()(image), other(image))
    assert equal(net.state_dict(), before)
    del net  # a copy lives without the original
    assert_close(clone(twin)(image), other(image))


def test_averages_of_a_converted_model_load_and_are_loaded(net, other, image, move):
    average = torch.optim.swa_utils.AveragedModel(convert_to_acu(net))
    ema = ModelEmaV3(net, decay=0.5)
    move(net, 0.5)
    ema.update(net)
    average.update_parameters(net)
    assert_close(ema.module.stem.offsets, net.stem.offsets / 2)
    assert torch.equal(average.module.stem.offsets, net.stem.offsets)  # the first of an average
    for holder in (ema, average):
        twin = copy.deepcopy(holder)
        nn.init.zeros_(twin.module.stem.offsets)
        twin.load_state_dict(holder.state_dict())
        assert torch.equal(twin.module.stem.offsets, holder.module.stem.offsets)
        with pytest.warns(UserWarning, match=TOO_LATE), pytest.raises(RuntimeError, match=r'Missing.*"stem\.offsets"'):
            holder.module.load_state_dict(other.state_dict())
        for _, layer in acu_layers(holder.module):
            nn.init.zeros_(layer.offsets)
        with pytest.warns(UserWarning, match=FROM_PLAIN):
            holder.module.load_state_dict(other.state_dict())
        assert_close(holder.module.eval()(image), other(image))


def test_a_convolution_as_the_root_loads_too():
    plain, active, image = nn.Conv2d(2, 4, (3, 5)), nn.Conv2d(2, 4, (3, 5)), torch.randn(2, 2, 9, 8)
    state = plain.state_dict()
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        convert_to_acu(active, kernel_sizes=[(3, 5)]).load_state_dict(state)
    assert torch.equal(active(image), plain(image))
    nn.init.uniform_(active.offsets)
    with pytest.warns(UserWarning, match=TOO_LATE), pytest.raises(RuntimeError, match=r'Missing.*: "offsets"'):
        active.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected.*: "offsets"'):
        fold_acu(copy.deepcopy(active)).load_state_dict(active.state_dict())


def test_a_shared_module_loads_under_all_its_names():
    plain, active = (create_model("coat_lite_tiny", num_classes=3).eval() for _ in range(2))
    convert_to_acu(active)
    shared = [name for name, _ in active.named_modules(remove_duplicate=False) if name.endswith("crpe.conv_list.0")]
    assert len(shared) > len({active.get_submodule(name) for name in shared})
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        active.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(active(image), plain(image))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        active.load_state_dict(copy.deepcopy(active).state_dict())


def test_files_keep_positions_and_are_read_without_executing_anything(net, image, move, tmp_path):
    source = move(convert_to_acu(copy.deepcopy(net))).eval()
    torch.save(source.state_dict(), tmp_path / "net.pt")
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    for state in (torch.load(tmp_path / "net.pt", weights_only=True), load_file(tmp_path / "net.safetensors")):
        twin = convert_to_acu(copy.deepcopy(net))
        twin.load_state_dict(state)
        assert torch.equal(twin.eval()(image), source(image))


def test_the_plain_state_dict_from_files_loads_with_its_warning(net, other, image, tmp_path):
    save_file(other.state_dict(), tmp_path / "net.safetensors")
    convert_to_acu(net)
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert_close(net.eval()(image), other(image))


def test_an_image_classifier_says_what_its_network_lacks():
    source = ImageClassifier("test_resnet", num_classes=3, convert={"kernel_sizes": [3]})
    plain = ImageClassifier("test_resnet", num_classes=3)
    with pytest.raises(RuntimeError, match=r'Unexpected.*"model\..*offsets"'):
        plain.load_state_dict(source.state_dict())
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        source.load_state_dict(plain.state_dict())
    assert any(isinstance(module, ACUConv2d) for module in source.modules())
    assert equal({k: v for k, v in source.state_dict().items() if "offsets" not in k}, plain.state_dict())


class Holder(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.nets = nn.ModuleDict({"student": net})


@pytest.mark.parametrize(
    "wrap",
    [
        Holder,
        nn.Sequential,
        nn.DataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda net: Holder(nn.Sequential(net)),
    ],
    ids=["attribute", "Sequential", "DataParallel", "compiled", "average", "nested"],
)
def test_a_plain_state_dict_loads_wherever_the_model_sits(net, other, image, wrap):
    plain, active = wrap(copy.deepcopy(other)), wrap(convert_to_acu(net))
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        active.load_state_dict(plain.state_dict())
    loaded = [module for module in active.modules() if "stem" in module._modules][-1]  # (an average has a copy)
    assert_close(loaded.eval()(image), other(image))


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


def test_a_plain_state_dict_loads_under_ddp(net, other, image, process_group):
    plain, active = (nn.parallel.DistributedDataParallel(model) for model in (other, convert_to_acu(net)))
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        active.load_state_dict(plain.state_dict())
    assert_close(net.eval()(image), other(image))


@pytest.mark.parametrize("assign", [False, True])
def test_a_sharded_model_from_the_meta_device_takes_a_plain_state_dict(other, image, process_group, assign):
    with torch.device("meta"):
        empty = nn.Sequential(copy.deepcopy(other).to("meta"), ACUConv2d.from_positions(4, 2, [(0, 0.5), (1, -1)]))
    convert_to_acu(empty)
    plain = nn.Sequential(other, nn.Conv2d(4, 2, (1, 2)).double())
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(empty, mesh=mesh)
    sharded = torch.distributed.fsdp.fully_shard(copy.deepcopy(plain), mesh=mesh).state_dict()
    if not assign:
        empty.to_empty(device="cpu")
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        empty.load_state_dict(sharded, assign=assign)
    assert empty[0].stem.offsets.full_tensor().eq(0).all()
    assert empty[1].offsets.full_tensor().tolist() == [0, 0.5, 1, -1]
    assert torch.equal(empty[0].stem.weight.full_tensor(), other.stem.weight)


@pytest.mark.parametrize("free", [False, True])
def test_a_layer_that_leaves_the_meta_device_empty_has_its_taps_where_they_start(free):
    def make(device):
        if free:
            return ACUConv2d.from_positions(2, 4, [(-1, 0), (0, 1.5)], position_groups=2, device=device)
        return ACUConv2d(2, 4, (1, 2), position_groups=2, device=device)

    empty = nn.Sequential(make("meta"))
    empty.to_empty(device="cpu")
    assert torch.equal(empty[0].offsets, make("cpu").offsets)
    plain = nn.Conv2d(2, 4, (1, 2))
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        empty.load_state_dict(nn.Sequential(plain).state_dict())
    assert torch.equal(empty[0].weight, plain.weight)
    assert empty[0].offsets.requires_grad


def test_a_plain_state_dict_loads_into_a_model_converted_on_the_meta_device_and_made_empty(net, other, image):
    convert_to_acu(net.to("meta"), position_groups=2).to_empty(device="cpu")
    with pytest.warns(UserWarning, match=FROM_PLAIN):
        net.load_state_dict(other.state_dict())
    assert_close(net.eval()(image), other(image))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_in_half_precision_become_float32(dtype, assign, move):
    layer, other = (ACUConv2d(2, 4, 3, dtype=dtype) for _ in range(2))
    state = {key: value.to(dtype) for key, value in move(other).state_dict().items()}
    layer.load_state_dict(state, assign=assign)
    assert layer.offsets.dtype == torch.float32
    assert torch.equal(layer.offsets, state["offsets"].float())
    assert layer.weight.dtype == dtype
    assert isinstance(layer.offsets, nn.Parameter)
    assert layer.offsets.requires_grad
    layer(torch.randn(1, 2, 6, 7, dtype=dtype)).sum().backward()
    assert layer.offsets.grad is not None


def test_positions_that_a_parametrization_computes_are_left_to_it(move):
    class Bounded(nn.Module):
        def forward(self, x):
            return x.tanh()

    layer = move(ACUConv2d(2, 4, 3))
    nn.utils.parametrize.register_parametrization(layer, "offsets", Bounded())
    twin = copy.deepcopy(layer)
    nn.init.zeros_(twin.parametrizations.offsets.original)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.offsets, layer.offsets)
    assert twin.half().weight.dtype == torch.float16


@pytest.mark.parametrize("lowered", [False, True], ids=["float32 model", "bfloat16 model"])
def test_a_plain_state_in_half_precision_that_is_assigned_leaves_positions_in_float32(net, other, image, lowered):
    model = convert_to_acu(net.float())
    if lowered:
        model.bfloat16()
    with pytest.warns(UserWarning, match="of a plain model"):
        model.load_state_dict(other.bfloat16().state_dict(), assign=True)
    assert {layer.offsets.dtype for _, layer in acu_layers(model)} == {torch.float32}
    assert {layer.weight.dtype for _, layer in acu_layers(model)} == {torch.bfloat16}
    assert torch.equal(model.eval()(image.bfloat16()), other.eval()(image.bfloat16()))
    model.bfloat16().load_state_dict(model.half().state_dict(), assign=True)
    assert {layer.offsets.dtype for _, layer in acu_layers(model)} == {torch.float32}


def test_a_model_on_the_meta_device_is_not_folded_nor_separated(net, other, image, active):
    model = convert_to_acu(net.to("meta"))
    names = active(model)
    with pytest.raises(ValueError, match=r"stem: .* on the meta device, without values.*to_empty"):
        fold_acu(model)
    with pytest.raises(ValueError, match="`offsets` are on the meta device"):
        round_acu(model, separate=True)
    assert active(model) == names
    model.to_empty(device="cpu")
    with pytest.warns(UserWarning, match="of a plain model"):
        model.load_state_dict(other.state_dict())
    assert_close(fold_acu(model.eval())(image), other.eval()(image))
