"""State dicts between plain, converted and folded models: what loads, and what says why not."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers.oracle import assert_close
from safetensors.torch import load_file, save_file
from timm import create_model
from timm.utils import ModelEmaV3
from torch import nn

from lightning_acu import ACUConv2d, ImageClassifier, acu_layers, convert_to_acu, fold_acu

PLAIN_INTO_CONVERTED = r"loaded the state_dict of a plain model: it has no 'stem\.offsets'"


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


def test_a_plain_state_dict_loads_and_the_warning_says_which_positions_it_lacks(net, other, image):
    convert_to_acu(net)
    with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED + ".* and 1 more; those taps stay on th") as seen:
        result = net.load_state_dict(other.state_dict())
    assert seen[0].filename == __file__
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_close(net.eval()(image), other(image))
    assert all(not layer.offsets.any() for _, layer in acu_layers(net))


def test_without_strict_the_result_lists_the_positions_as_torch_does(net, other, image, move):
    move(convert_to_acu(net))
    before = {name: layer.offsets.clone() for name, layer in acu_layers(net)}
    result = net.load_state_dict(other.state_dict(), strict=False)
    assert set(result.missing_keys) == {f"{name}.offsets" for name in before}
    assert result.unexpected_keys == []
    assert all(torch.equal(layer.offsets, before[name]) for name, layer in acu_layers(net))
    assert torch.equal(net.stem.weight, other.stem.weight)


def test_a_plain_state_dict_is_refused_where_positions_have_moved(net, other):
    convert_to_acu(net)
    with torch.no_grad():
        net.layer2.xconv1.offsets[3] = 1e-3
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"it has no 'layer2.xconv1.offsets', and the positions here have moved"):
        net.load_state_dict(other.state_dict())
    assert equal(net.state_dict(), before)


def test_what_a_fixed_centre_has_stored_is_no_moved_position(net, other, image):
    convert_to_acu(net)
    with torch.no_grad():
        net.stem.offsets.view(-1, 2)[net.stem.fixed_tap] = 0.7
    with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED):
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
        with pytest.raises(RuntimeError, match=message) as caught:
            net.load_state_dict(state)
        assert "offsets" not in str(caught.value)


def test_positions_of_another_number_of_groups_are_torchs_error(net, move):
    state = move(convert_to_acu(copy.deepcopy(net), position_groups=2)).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for stem.offsets"):
        convert_to_acu(net).load_state_dict(state)


def test_a_converted_state_dict_does_not_fit_a_folded_model(net, move):
    state = copy.deepcopy(move(convert_to_acu(net), 0.4).state_dict())
    fold_acu(net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"positions for 'stem\.offsets'.*This model was folded: load into a conv"):
        net.load_state_dict(state)
    assert equal(net.state_dict(), before)


def test_a_converted_state_dict_does_not_fit_one_converted_in_part(net, move):
    state = move(convert_to_acu(copy.deepcopy(net))).state_dict()
    convert_to_acu(net, target_modules=["stem"])
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"'layer1.1.conv1.offsets'.*Convert this model in the same way first"):
        net.load_state_dict(state)
    assert equal(net.state_dict(), before)
    result = net.load_state_dict(state, strict=False)
    assert "layer1.1.conv1.offsets" in result.unexpected_keys
    assert torch.equal(net.stem.offsets, state["stem.offsets"])


def test_a_state_dict_converted_in_part_loads_into_one_converted_whole(net, image, move):
    partly = move(convert_to_acu(copy.deepcopy(net), target_modules=["stem"])).eval()
    convert_to_acu(net)
    with pytest.warns(UserWarning, match=r"it has no 'layer1.1.conv1.offsets', 'layer1.1.conv10.offsets', 'layer2"):
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
    with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED):
        net.load_state_dict(state, assign=True)
    assert net.stem.weight.data_ptr() == state["stem.weight"].data_ptr()
    assert not net.stem.weight.requires_grad
    assert isinstance(net.stem.offsets, nn.Parameter)
    assert net.stem.offsets.requires_grad
    assert_close(net.eval()(image), other(image))


def test_plain_numbers_assigned_to_a_model_on_the_meta_device_leave_its_taps_on_the_grid(net, other, image):
    convert_to_acu(net.to("meta"))
    with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED):
        net.load_state_dict(other.state_dict(), assign=True)
    assert isinstance(net.stem.offsets, nn.Parameter)
    assert_close(net.eval()(image), other(image))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_loads_into_itself_and_not_into_the_original(net, other, image, clone):
    convert_to_acu(net)
    before = copy.deepcopy(net.state_dict())
    twin = clone(net)
    with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED):
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
        with pytest.raises(RuntimeError, match="the positions here have moved"):
            holder.module.load_state_dict(other.state_dict())
        for _, layer in acu_layers(holder.module):
            nn.init.zeros_(layer.offsets)
        with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED):
            holder.module.load_state_dict(other.state_dict())
        assert_close(holder.module.eval()(image), other(image))


def test_a_convolution_as_the_root_loads_too():
    plain, active, image = nn.Conv2d(2, 4, (3, 5)), nn.Conv2d(2, 4, (3, 5)), torch.randn(2, 2, 9, 8)
    state = plain.state_dict()
    with pytest.warns(UserWarning, match="it has no 'offsets'"):
        convert_to_acu(active, kernel_sizes=[(3, 5)]).load_state_dict(state)
    assert torch.equal(active(image), plain(image))
    nn.init.uniform_(active.offsets)
    with pytest.raises(RuntimeError, match="'offsets', and the positions here have moved"):
        active.load_state_dict(state)
    with pytest.raises(RuntimeError, match="positions for 'offsets', which are plain"):
        fold_acu(copy.deepcopy(active)).load_state_dict(active.state_dict())


def test_a_shared_module_loads_under_all_its_names():
    plain, active = (create_model("coat_lite_tiny", num_classes=3).eval() for _ in range(2))
    convert_to_acu(active)
    shared = [name for name, _ in active.named_modules(remove_duplicate=False) if name.endswith("crpe.conv_list.0")]
    assert len(shared) > len({active.get_submodule(name) for name in shared})
    with pytest.warns(UserWarning, match=r"it has no '.*and \d+ more; those taps"):
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
    with pytest.warns(UserWarning, match=PLAIN_INTO_CONVERTED):
        net.load_state_dict(load_file(tmp_path / "net.safetensors"))
    assert_close(net.eval()(image), other(image))


def test_an_image_classifier_says_what_its_network_lacks():
    source = ImageClassifier("test_resnet", num_classes=3, convert={"kernel_sizes": [3]})
    plain = ImageClassifier("test_resnet", num_classes=3)
    with pytest.raises(RuntimeError, match=r"positions for 'model\..*offsets'.*plain convolutions here"):
        plain.load_state_dict(source.state_dict())
    with pytest.warns(UserWarning, match=r"it has no 'model\..*offsets'"):
        source.load_state_dict(plain.state_dict())
    assert any(isinstance(module, ACUConv2d) for module in source.modules())
    assert equal({k: v for k, v in source.state_dict().items() if "offsets" not in k}, plain.state_dict())
