""":class:`ACUConv2d`: an ``nn.Conv2d`` whose taps sit at learned positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .folded import FoldedConv2d, fold_conv2d, padding_layer
from .functional import acu_conv2d
from .geometry import Padding
from .ops import check_backend
from .taps import PositionedConv2d

__all__ = ["CONFIGURATION", "ACUConv2d", "acu_layers", "recomputed_parameter"]

torch.fx.wrap("acu_conv2d")  # torch.fx (torchvision's create_feature_extractor) records the call, not what is inside


class ACUConv2d(PositionedConv2d):
    """``nn.Conv2d`` plus ``offsets``; see :func:`lightning_acu.functional.acu_conv2d` for the formula.

    ``weight`` and ``bias`` keep the names and shapes of ``nn.Conv2d``, so that a plain layer's state_dict loads and
    only ``offsets`` is new. ``offsets`` is a 1-D parameter of P*K*2 numbers, (dy, dx) in pixels for each tap of each
    position group, in raster order; zero at first, when the layer computes exactly what the plain one does. It stays
    in float32 when the layer goes to half or bfloat16 (``.to``, ``.half()``), where small steps would be lost.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``nn.Conv2d``. With a ``padding_mode`` other than "zeros" the image is padded by ``padding`` in that
            mode; beyond that there are zeros.
        position_groups: P sets of positions; output channel co uses set ``co * P // out_channels``. Divides
            ``out_channels``; independent of ``groups``.
        fixed_centre: the centre tap of an odd kernel stays where it is, as in the paper: 8 taps move in a 3x3.
            Its two numbers in ``offsets`` are stored, ignored, and get zero gradients.
        backend: "auto" or the name of one, as in :func:`lightning_acu.functional.acu_conv2d`.

    Raises:
        ValueError: an argument that does not fit; the message names it and its value.
    """

    backend: str

    #: The class that ``adopt`` and ``from_conv2d`` take, exactly.
    plain_class: ClassVar[type[nn.Conv2d]] = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        position_groups: int = 1,
        fixed_centre: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        self._add_offsets(position_groups, fixed_centre, backend)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, *, position_groups: int = 1, fixed_centre: bool = True, backend: str = "auto"
    ) -> Self:
        """An active convolution that computes what ``conv`` does and shares its ``weight`` and ``bias``.

        Raises:
            TypeError: ``conv`` is not exactly a ``plain_class``: a subclass may compute something else.
            ValueError: its weight or bias is recomputed from other parameters, or an argument does not fit.
        """
        _check_plain(conv, cls)
        _check_own_parameters(conv)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.__dict__.update({k: v for k, v in conv.__dict__.items() if k in CONFIGURATION})
        for name, parameter in conv._parameters.items():  # registered also where there is no bias, as in nn.Conv2d
            new.register_parameter(name, parameter)
        new.train(conv.training)
        new._add_offsets(position_groups, fixed_centre, backend)
        return new

    @classmethod
    def adopt(
        cls,
        conv: nn.Conv2d,
        *,
        position_groups: int = 1,
        fixed_centre: bool = True,
        backend: str = "auto",
        exact: bool = True,
    ) -> Self:
        """Turn ``conv`` itself into an active convolution, by changing its class.

        The object and its parameters keep their identity, and with it optimizers, hooks and shared references.

        Args:
            conv: the layer to change.
            position_groups, fixed_centre, backend: as in the class.
            exact: refuse subclasses of ``plain_class``; False for one whose ``forward`` is known to do what that of
                ``plain_class`` does.

        Raises:
            TypeError: ``conv`` is not exactly a ``plain_class``.
            ValueError: its weight or bias is recomputed from other parameters, or an argument does not fit.
        """
        if exact:
            _check_plain(conv, cls)
        _check_own_parameters(conv)
        _check_configuration(conv.out_channels, position_groups, backend)
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv._add_offsets(position_groups, fixed_centre, backend)
        return conv

    @classmethod
    def from_positions(
        cls,
        in_channels: int,
        out_channels: int,
        positions: Tensor | Sequence[Sequence[float]],
        stride: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        position_groups: int = 1,
        fixed_centre: bool = True,
        backend: str = "auto",
    ) -> Self:
        """A layer of any shape: a 4-tap cross, a ring, 24 taps.

        ``weight`` is (out_channels, in_channels/groups, 1, K), and the output has the size of a 1x1 convolution's:
        ``ceil(H / stride)``. The positions are where training starts; ``offsets`` holds them from the first.

        Args:
            positions: (K, 2), (dy, dx) of each tap in pixels from the output pixel.
            fixed_centre: a tap given at exactly (0, 0) stays there.
            in_channels, out_channels, stride, groups, bias, device, dtype, position_groups, backend: as in the class.

        Raises:
            ValueError: ``positions`` is not (K, 2) with K >= 1, or not finite.
        """
        taps = torch.as_tensor(positions, dtype=torch.float64).detach().cpu()
        if taps.ndim != 2 or taps.shape[-1] != 2 or not len(taps):
            raise ValueError(f"`positions` must be (K, 2) with K >= 1 taps, got shape {tuple(taps.shape)}")
        if not taps.isfinite().all():
            raise ValueError(f"`positions` (={taps.tolist()}) must be finite")
        _check_configuration(out_channels, position_groups, backend)
        self = cls.__new__(cls)
        # Dilation 0 puts the whole 1 x K grid on the output pixel: the offsets are the positions.
        nn.Conv2d.__init__(
            self, in_channels, out_channels, (1, len(taps)), stride, 0, (1, 0), groups, bias, "zeros", device, dtype
        )
        self._add_offsets(position_groups, False, backend)
        self.start = tuple((y, x) for y, x in taps.tolist())
        centre = (taps == 0).all(-1).nonzero().flatten().tolist()
        self.fixed_tap = centre[0] if fixed_centre and centre else None
        with torch.no_grad():
            self.offsets.copy_(taps.expand(position_groups, -1, -1).flatten())
        return self

    def _add_offsets(self, position_groups: int, fixed_centre: bool, backend: str) -> None:
        _check_configuration(self.out_channels, position_groups, backend)
        self.position_groups = position_groups
        self.backend = backend
        self.start = None
        odd = all(k % 2 for k in self.kernel_size)
        self.fixed_tap = self.geometry.taps // 2 if fixed_centre and odd else None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        size = position_groups * self.geometry.taps * 2
        # A frozen convolution stays frozen.
        offsets = torch.zeros(size, dtype=dtype, device=self.weight.device)
        self.offsets = nn.Parameter(offsets, requires_grad=self.weight.requires_grad)

    def fold(self) -> nn.Conv2d | FoldedConv2d:
        """The same function in plain convolutions, exactly, at any positions; the layer itself stays as it is.

        One ``nn.Conv2d`` where the taps lie close together (the original kernel size and dilation where they are on
        such a grid), else a :class:`~lightning_acu.folded.FoldedConv2d`, a sum of small ones.

        Raises:
            ValueError: ``offsets`` are not finite, or a hook recomputes the weight (old weight norm, pruning).
        """
        if not parametrize.is_parametrized(self):  # then self.weight is computed when it is read
            _check_own_parameters(self)
        weight = self.effective_weight().detach().requires_grad_(self.weight.requires_grad)
        offsets = self.active_offsets().detach()
        folded = fold_conv2d(weight, offsets, self.bias, self.geometry, self._padding_layer())
        if isinstance(folded, FoldedConv2d) and len(folded.convs) == 1:
            folded = self._merge_padding(folded)
        return folded.train(self.training)

    def effective_weight(self) -> Tensor:
        """(C_out, C_in/groups, kh, kw), differentiable: the numbers at the taps; subclasses may standardise them."""
        return self.weight

    def _padding_layer(self) -> nn.Module | None:
        """What pads the image first, in a fold; None where zeros of the convolution's own do."""
        return padding_layer(self)

    def _merge_padding(self, folded: FoldedConv2d) -> nn.Conv2d | FoldedConv2d:
        """One convolution that pads by itself, where a fold of one with a padding layer comes to that."""
        (conv,), (sides,) = folded.convs, folded.sides
        assert isinstance(conv, nn.Conv2d)
        if any(sides) or (conv.kernel_size, conv.dilation) != (self.kernel_size, self.dilation):
            return folded
        for name in ("padding", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(conv, name, getattr(self, name))
        return conv

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to (N, C_out, H_out, W_out)."""
        return self._conv_forward(input, self.effective_weight(), self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._pad(input)
        return acu_conv2d(
            input, weight, self.active_offsets(), bias, self.stride, padding, self.dilation, self.groups,
            backend=self.backend,
        )  # fmt: skip

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        """The image, padded where zeros are not what is wanted, and the zeros that the operator adds around it."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def extra_repr(self) -> str:
        """``nn.Conv2d``'s, and what differs from the defaults here."""
        text = super().extra_repr()
        if self.start is not None:  # the 1 x K kernel and its dilation are how the layer is stored, not what it is
            text = f"{self.in_channels}, {self.out_channels}, taps={len(self.start)}, stride={self.stride}"
            text += f", groups={self.groups}" if self.groups != 1 else ""
            text += ", bias=False" if self.bias is None else ""
        if self.position_groups != 1:
            text += f", position_groups={self.position_groups}"
        if self.fixed_tap is None and (self.start is None and all(k % 2 for k in self.kernel_size)):
            text += ", fixed_centre=False"
        return text + (f", backend={self.backend!r}" if self.backend != "auto" else "")


#: What makes a convolution what it is, besides its parameters: nn.Conv2d's attributes and those of timm's classes.
CONFIGURATION = (
    frozenset(vars(nn.Conv2d(1, 1, 1, device="meta"))) - frozenset(vars(nn.Module())) - {"weight", "bias"}
) | {"eps", "gain_init", "same_pad", "scale"}


def acu_layers(model: nn.Module) -> Iterator[tuple[str, ACUConv2d]]:
    """(qualified name, layer) of every active convolution in ``model``, a shared one once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ACUConv2d))


def _check_plain(conv: nn.Module, cls: type[ACUConv2d]) -> None:
    if type(conv) is not cls.plain_class:
        raise TypeError(
            f"`conv` (={type(conv).__name__}) must be exactly a {cls.plain_class.__name__}: a subclass may compute "
            "otherwise; convert_to_acu knows which classes it can convert"
        )


def recomputed_parameter(conv: nn.Module) -> str | None:
    """The one of "weight", "bias" and "gain" that is no parameter of the layer's own but computed from others, if any.

    Weight norm, spectral norm and pruning do that, in hooks or by parametrization.
    """
    return next((n for n in ("weight", "bias", "gain") if n not in conv._parameters and hasattr(conv, n)), None)


def _check_own_parameters(conv: nn.Module) -> None:
    if (name := recomputed_parameter(conv)) is not None:
        raise ValueError(
            f"the {name} of this {type(conv).__name__} is recomputed from other parameters "
            "(weight norm, spectral norm or pruning); remove that first"
        )


def _check_configuration(out_channels: int, position_groups: int, backend: str) -> None:
    if position_groups < 1 or out_channels % position_groups:
        raise ValueError(f"`position_groups` (={position_groups}) must divide `out_channels` (={out_channels})")
    check_backend(backend)
