"""The rules for timm's own convolution classes; registered if timm is installed."""

from __future__ import annotations

from timm.layers import CondConv2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

from ..timm_convs import ACUConv2dSame, ACUScaledStdConv2d, ACUScaledStdConv2dSame, ACUStdConv2d, ACUStdConv2dSame
from .rules import register_rule, why_not_adoptable

__all__ = []  # type: ignore[var-annotated]


@register_rule(Conv2dSame, ACUConv2dSame.adopt)
def _conv2d_same(conv: Conv2dSame) -> str | None:
    """Timm's Conv2dSame: TensorFlow's "SAME" padding, by the size of the image."""
    return why_not_adoptable(conv)


@register_rule(StdConv2d, ACUStdConv2d.adopt)
def _std_conv2d(conv: StdConv2d) -> str | None:
    """Timm's StdConv2d: the weight is standardised in the forward pass."""
    return why_not_adoptable(conv)


@register_rule(StdConv2dSame, ACUStdConv2dSame.adopt)
def _std_conv2d_same(conv: StdConv2dSame) -> str | None:
    """Timm's StdConv2dSame: standardised, with "SAME" padding."""
    return why_not_adoptable(conv)


@register_rule(ScaledStdConv2d, ACUScaledStdConv2d.adopt)
def _scaled_std_conv2d(conv: ScaledStdConv2d) -> str | None:
    """Timm's ScaledStdConv2d, of the NFNets: standardised, then scaled by a learned gain."""
    return why_not_adoptable(conv)


@register_rule(ScaledStdConv2dSame, ACUScaledStdConv2dSame.adopt)
def _scaled_std_conv2d_same(conv: ScaledStdConv2dSame) -> str | None:
    """Timm's ScaledStdConv2dSame: standardised and scaled, with "SAME" padding."""
    return why_not_adoptable(conv)


@register_rule(CondConv2d)
def _cond_conv2d(conv: CondConv2d) -> str | None:
    """Timm's CondConv2d cannot be converted."""
    return "its kernel is mixed from several experts for every image, but positions are shared by all images"
