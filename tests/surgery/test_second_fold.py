"""What a review found: marks and neighbours of a layer outlive its fold, and traced models say what they are."""

import copy

import pytest
import torch
from helpers.oracle import assert_close
from timm.utils import reparameterize_model
from torch import nn

from lightning_acu import ACUConv2d, acu_layers, convert_to_acu, create_model, fold_acu, round_acu


@pytest.mark.slow
def test_a_second_fold_remembers_that_the_first_one_changed_the_kernel():
    torch.manual_seed(0)
    model = create_model("repvgg_a0", num_classes=3).eval()
    for sizes in ((3,), (5,)):  # the second time what the first fold made
        convert_to_acu(model, kernel_sizes=sizes)
        with torch.no_grad():
            for _, layer in acu_layers(model):
                layer.offsets.uniform_(-0.7, 0.7) if sizes == (3,) else layer.offsets.zero_()
        fold_acu(model)
        assert "reparameterize" in vars(model.stages[0][0])  # the guard that tries it on a copy
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    try:
        model = reparameterize_model(model)
    except RuntimeError as error:
        assert "because the fold of" in str(error)  # noqa: PT017 (either is fine, but nothing else)
    assert_close(model(x), expected, 1e-4)


def test_what_others_have_put_on_a_layer_outlives_its_fold():
    conv = nn.Conv2d(3, 4, 3)
    conv.register_buffer("gate", torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1), persistent=False)
    conv.adapter, conv.note = nn.Conv2d(4, 4, 1), "mine"
    conv.register_forward_hook(lambda module, args, output: module.adapter(output * module.gate))
    model, x = convert_to_acu(nn.Sequential(conv), target_modules=["0"]), torch.randn(2, 3, 8, 9)
    nn.init.uniform_(conv.offsets, -0.7, 0.7)
    expected, keys = model(x), set(model.state_dict())
    fold_acu(model)
    assert_close(model(x), expected, 1e-5)
    assert set(model.state_dict()) == keys - {"0.offsets"}
    assert conv.note == "mine"


def test_a_model_that_torch_fx_traced_from_active_layers_says_so():
    model = convert_to_acu(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    traced = torch.fx.symbolic_trace(model)
    for surgery in (convert_to_acu, fold_acu, round_acu):
        with pytest.raises(TypeError, match=r"torch\.fx traced from active convolutions"):
            surgery(nn.Sequential(traced, nn.Conv2d(4, 4, 3)))
    plain = convert_to_acu(torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3))))
    assert len(list(acu_layers(plain))) == 1


def test_free_shapes_on_the_meta_device_start_where_they_start():
    def make(device=None):
        return nn.Sequential(ACUConv2d.from_positions(3, 4, [(-1, 0), (0, 1.5), (2, 0)], device=device))

    model, empty, x = make(), make("meta"), torch.randn(2, 3, 8, 9)
    convert_to_acu(copy.deepcopy(model))
    convert_to_acu(empty)
    state = {key: value for key, value in model.state_dict().items() if "offsets" not in key}
    with pytest.warns(UserWarning, match="of a plain model"):
        empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), model(x))
