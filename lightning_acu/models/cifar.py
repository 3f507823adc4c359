"""The networks of the paper's CIFAR experiments, and one for a quick start, in timm's registry.

==================  ================================================================================  ===============
name                what                                                                               parameters
==================  ================================================================================  ===============
``acu_plain``       1x1 conv 16; 3x3 48, 48; 96 (stride 2), 96; 192 (stride 2), 192; 1x1 1000;         855,162
                    global average; 10 classes
``acu_plain_d2``    the same with dilation 2 in conv3/x ("Base-D2")                                   855,162
``acu_plain_f5``    the same with 5x5 in conv3/x ("Base-F5")                                          1,739,898
``acu_resnet32``    3x3 16; 3 stages of 5 basic blocks with 16, 32, 64 channels; 10 classes           464,154
``acu_small``       3x3 8; 16 (stride 2); 32 (stride 2); global average; 10 classes; sees 9x9 pixels    6,418
==================  ================================================================================  ===============

All have plain convolutions; ``convert_to_acu`` turns them into the paper's active ones. Importing this module registers
them, as :mod:`lightning_acu.models` does; after that ``timm.create_model("acu_plain")`` works.

Module names are the paper's with a dot for the slash: conv3/2 is ``conv3.2``, its convolution ``conv3.2.conv``.

Source: Jeon & Kim, CVPR 2017, section 4.1, and the authors' released network; He et al., CVPR 2016, section 4.2.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeVar

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["CIFARResNet", "PlainNet", "SmallNet"]

#: Mean and standard deviation of CIFAR-10's training images.
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class ConvNormAct(nn.Module):
    """Convolution without bias that keeps the size at stride 1, batch norm, and ReLU unless ``act`` is False."""

    def __init__(
        self, in_chans: int, out_chans: int, kernel_size: int, stride: int = 1, dilation: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, dilation, bias=False)
        self.bn = nn.BatchNorm2d(out_chans)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, out_chans, H/stride, W/stride)."""
        return self.act(self.bn(self.conv(x)))


class _CIFARNet(nn.Module):
    """timm's interface, for all networks here. A subclass names its stages and calls ``_finish``."""

    #: Modules from the image to the features, in this order.
    stages: tuple[str, ...]
    #: How many of them, at the beginning, are not a stage of ``feature_info``.
    skipped = 0
    #: Names of the parameters of the first layer.
    stem: str
    grad_checkpointing = False

    def _finish(self, num_features: int, num_classes: int, in_chans: int, global_pool: str, drop_rate: float) -> None:
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = num_features
        self.drop_rate = drop_rate
        self.global_pool, self.fc = create_classifier(num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # MSRA's initialisation as in Caffe: variance 2 / fan_in.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer; 0 classes: no such layer. ``global_pool``: "avg", "max", ""; None: unchanged."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for timm's layer-wise learning rates: by stage, or by block."""
        by_block = [(r"^(?:conv|layer)(\d)\.(\d+)\.", None), (r"^conv4\.", (4,))]
        return {"stem": self.stem, "blocks": r"^(?:conv|layer)(\d)\." if coarse else by_block}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the outputs of the stages, and computes the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_features, H/4, W/4)."""
        saves = self.grad_checkpointing and self.training
        for name in self.stages:
            stage = getattr(self, name)
            x = checkpoint(stage, x, use_reentrant=False) if saves else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to class scores (N, num_classes), or with ``pre_logits`` to (N, num_features)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to class scores (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


_Network = TypeVar("_Network", bound=_CIFARNet)


class PlainNet(_CIFARNet):
    """The paper's plain network: a 1x1, six 3x3 and a 1x1 convolution, each with batch norm and ReLU, and a classifier.

    Args:
        num_classes: classes of the head; 0: features.
        in_chans: channels of the image.
        global_pool: "avg" as in the paper; "" gives maps.
        drop_rate: dropout before the head.
        kernel_size3: kernel size of the two convolutions conv3/1 and conv3/2; 5 in Base-F5.
        dilation3: dilation of the two; 2 in Base-D2.
        width: factor of the number of channels of all layers but the first, rounded to whole channels.

    Raises:
        ValueError: ``width`` leaves a layer without channels.
    """

    stages = ("conv1", "conv2", "conv3", "conv4")
    stem = r"^conv1\.0\."

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        kernel_size3: int = 3,
        dilation3: int = 1,
        width: float = 1.0,
    ) -> None:
        one, two, three, four = (round(width * channels) for channels in (48, 96, 192, 1000))
        if one < 1:
            raise ValueError(f"`width` (={width}) leaves no channel of conv1's 48; it must be above 1/96")
        super().__init__()
        self.conv1 = _named(ConvNormAct(in_chans, 16, 1), ConvNormAct(16, one, 3), ConvNormAct(one, one, 3), start=0)
        self.conv2 = _named(ConvNormAct(one, two, 3, stride=2), ConvNormAct(two, two, 3))
        self.conv3 = _named(
            ConvNormAct(two, three, kernel_size3, 2, dilation3), ConvNormAct(three, three, kernel_size3, 1, dilation3)
        )
        self.conv4 = ConvNormAct(three, four, 1)
        channels = {"conv1": one, "conv2": two, "conv3": three, "conv4": four}
        reductions = {"conv1": 1, "conv2": 2, "conv3": 4, "conv4": 4}
        self.feature_info = [
            {"num_chs": channels[stage], "reduction": reductions[stage], "module": stage} for stage in self.stages
        ]
        self._finish(four, num_classes, in_chans, global_pool, drop_rate)


class SmallNet(_CIFARNet):
    """Three 3x3 convolutions of 8, 16 and 32 channels, and a classifier of their averages over the image.

    It sees 9x9 pixels at a time (1 + 2 + 2 + 4), less than a digit: what it can learn depends on its reach.
    """

    stages = ("conv1", "conv2", "conv3")
    stem = r"^conv1\."

    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.feature_info: list[dict[str, Any]] = []
        before = in_chans
        for stage, channels, stride in (("conv1", 8, 1), ("conv2", 16, 2), ("conv3", 32, 2)):
            self.add_module(stage, ConvNormAct(before, channels, 3, stride))
            reduction = 2 * self.feature_info[-1]["reduction"] if self.feature_info else 1
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": stage})
            before = channels
        self._finish(32, num_classes, in_chans, global_pool, drop_rate)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (every second pixel, and zeros for new channels)."""

    def __init__(self, in_chans: int, out_chans: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, out_chans, 3, stride)
        self.conv2 = ConvNormAct(out_chans, out_chans, 3, act=False)
        self.act = nn.ReLU(inplace=True)
        self.stride = stride
        self.new_chans = out_chans - in_chans

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, out_chans, H/stride, W/stride)."""
        shortcut = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        if self.new_chans:
            before = self.new_chans // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_chans - before))
        return self.act(self.conv2(self.conv1(x)) + shortcut)


class CIFARResNet(_CIFARNet):
    """The residual network for CIFAR of He et al.: 6n + 2 layers, option A shortcuts.

    Args:
        blocks: n, the number of blocks in each of the three stages; 5 for ResNet-32.
        num_classes: classes of the head; 0: features.
        in_chans: channels of the image.
        global_pool: "avg" as in the paper; "" gives maps.
        drop_rate: dropout before the head.

    Raises:
        ValueError: ``blocks`` is below 1.
    """

    stages = ("conv1", "layer1", "layer2", "layer3")
    skipped = 1
    stem = r"^conv1\."

    def __init__(
        self,
        blocks: int = 5,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        if blocks < 1:
            raise ValueError(f"`blocks` (={blocks}) must be at least 1 for each of the three stages")
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, 16, 3)
        width = 16
        for stage, channels in enumerate((16, 32, 64), start=1):
            first = BasicBlock(width, channels, stride=1 if stage == 1 else 2)
            others = (BasicBlock(channels, channels) for _ in range(blocks - 1))
            setattr(self, f"layer{stage}", nn.Sequential(first, *others))
            width = channels
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": f"layer{stage}"}
            for stage, channels, reduction in ((1, 16, 1), (2, 32, 2), (3, 64, 4))
        ]
        self._finish(width, num_classes, in_chans, global_pool, drop_rate)


def _named(*layers: nn.Module, start: int = 1) -> nn.Sequential:
    """``layers`` in sequence, named by the paper's numbers."""
    return nn.Sequential(OrderedDict((str(number), layer) for number, layer in enumerate(layers, start)))


def _cfg(first_conv: str) -> dict[str, Any]:
    """What timm records of a network; no weights are published."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": _MEAN,
        "std": _STD,
        "first_conv": first_conv,
        "classifier": "fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "acu_plain.untrained": _cfg("conv1.0.conv"),
        "acu_plain_d2.untrained": _cfg("conv1.0.conv"),
        "acu_plain_f5.untrained": _cfg("conv1.0.conv"),
        "acu_resnet32.untrained": _cfg("conv1.conv"),
        "acu_small.untrained": _cfg("conv1.conv"),
    }
)


def _build(network: type[_Network], name: str, pretrained: bool, **kwargs: Any) -> _Network:
    """Build a network as timm does; ``features_only`` returns all stages."""
    stages = tuple(range(len(network.stages) - network.skipped))
    return build_model_with_cfg(network, name, pretrained, feature_cfg={"out_indices": stages}, **kwargs)


@register_model
def acu_plain(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """The plain network of the paper's CIFAR experiments."""
    return _build(PlainNet, "acu_plain", pretrained, **kwargs)


@register_model
def acu_plain_d2(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """The plain network with dilation 2 in conv3/x: Base-D2 of the paper's ablation."""
    return _build(PlainNet, "acu_plain_d2", pretrained, **{"dilation3": 2, **kwargs})


@register_model
def acu_plain_f5(pretrained: bool = False, **kwargs: Any) -> PlainNet:
    """The plain network with 5x5 convolutions in conv3/x: Base-F5 of the paper's ablation."""
    return _build(PlainNet, "acu_plain_f5", pretrained, **{"kernel_size3": 5, **kwargs})


@register_model
def acu_resnet32(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """The residual network of 32 layers for CIFAR."""
    return _build(CIFARResNet, "acu_resnet32", pretrained, **{"blocks": 5, **kwargs})


@register_model
def acu_small(pretrained: bool = False, **kwargs: Any) -> SmallNet:
    """Three 3x3 convolutions, for a quick start."""
    return _build(SmallNet, "acu_small", pretrained, **kwargs)
