"""The census (scripts/census.py) of a sample: every class of convolution, every trap of a family, both libraries."""

from importlib.util import find_spec

import pytest
import timm
import torch
from helpers.census_model import MERGING, build, examine

from lightning_acu.surgery.rules import find_rule

pytestmark = pytest.mark.slow

SAMPLE = [
    "resnet18",
    "resnet50d",
    "resnext50_32x4d",
    "seresnet18",
    "ecaresnet26t",
    "resnetaa50",
    "res2net50_14w_8s",
    "skresnet18",
    "gernet_s",
    "regnetx_002",
    "regnety_002",
    "densenet121",
    "dla34",
    "dpn48b",
    "vgg11",
    "hardcorenas_a",
    "hrnet_w18_small",
    "xception41",
    "cspresnet50",
    "selecsls42",
    "tresnet_m",
    "inception_v3",
    "hgnet_tiny",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "mixnet_s",
    "efficientnet_b0",
    "fbnetc_100",
    "lcnet_050",
    "tf_efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "tf_mixnet_s",
    "tf_mobilenetv3_small_minimal_100",
    "tf_efficientnet_cc_b0_4e",
    "resnetv2_50x1_bit",
    "vit_small_r26_s32_224",
    "nf_regnet_b0",
    "nfnet_l0",
    "dm_nfnet_f0",
    "coat_lite_tiny",
    "levit_128s",
    "levit_conv_128s",
    "repvgg_a0",
    "mobileone_s0",
    "fastvit_t8",
    "repvit_m0_9",
    "efficientvit_m0",
    "efficientvit_b0",
    "tiny_vit_5m_224",
    "shvit_s1",
    "ghostnet_050",
    "ghostnetv3_050",
    "repghostnet_050",
    "lcnetv2_base",
    "iformer_t",
    "efficientvim_m1",
    "nextvit_small",
    "csatv2",
    "convnext_atto_ols",
    "pvt_v2_b0",
    "mobilevit_xxs",
    "edgenext_xx_small",
    "coatnet_pico_rw_224",
    "botnet26t_256",
    "visformer_tiny",
    "efficientformerv2_s0",
    "fasternet_t0",
    "starnet_s050",
    "inception_next_atto",
    "swiftformer_xs",
    "mambaout_femto",
    "samvit_base_patch16",
    "test_resnet",
    "test_efficientnet",
    "torchvision/resnet18",
    "torchvision/squeezenet1_0",
    "torchvision/googlenet",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/mnasnet0_5",
    "torchvision/efficientnet_b0",
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn",
    "torchvision/quantized_mobilenet_v2",
]

#: Modules of timm whose methods merge convolutions, as the design notes of this project list them.
FAMILIES = [
    "byobnet",
    "efficientvim",
    "efficientvit_msra",
    "fastvit",
    "ghostnet",
    "iformer",
    "lcnetv2",
    "levit",
    "nextvit",
    "repghost",
    "repvit",
    "shvit",
    "tiny_vit",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: Older versions of timm, which are supported too, lack some.
KNOWN = {name for name in SAMPLE if name.startswith("torchvision/") or timm.is_model(name)}


@pytest.mark.filterwarnings("ignore")  # of models that are built and called in their own ways
@pytest.mark.parametrize("name", [name for name in SAMPLE if name in KNOWN])
def test_conversion_and_fold_keep_the_output(name):
    result = examine(name)
    assert result.status == "ok", result
    assert result.converted > 0
    assert result.merging in ("", "right right", "refused right", "refused refused", "right refused")


@pytest.mark.filterwarnings("ignore")
def test_the_sample_has_every_class_of_convolution_and_every_family_that_merges():
    assert len(KNOWN) >= 60
    classes, families = set(), set()
    for name in KNOWN:
        with torch.device("meta"):
            model = build(name)
        convs = [module for module in model.modules() if find_rule(module)]
        classes |= {type(conv).__name__ for conv in convs if conv.kernel_size in ((3, 3), (5, 5))}
        families |= {
            type(module).__module__.rpartition(".")[2]
            for module in model.modules()
            if any(callable(getattr(type(module), method, None)) for method in MERGING)
        }
    assert classes == {
        "CondConv2d", "Conv2d", "Conv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "StdConv2d", "StdConv2dSame"
    }  # fmt: skip
    assert {family for family in FAMILIES if find_spec(f"timm.models.{family}")} <= families
