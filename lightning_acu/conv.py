""":class:`ACUConv2d`: an ``nn.Conv2d`` whose taps sit at learned positions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .checks import check_finite_offsets, refuse_peft, require_module
from .dilation import RoundTo, check_round_to, dilated_offsets, grid_dilations, nearest_dilations
from .folded import FoldedConv2d, padding_layer
from .forms import fold_in_form
from .functional import acu_conv2d
from .geometry import ConvGeometry, Padding, check_convolution, pair, resolve_padding
from .grid_fold import SplitConv2d, conv2d_as_plain, fold_onto_grids
from .ops import check_backend
from .plain import (
    CONFIGURATION,
    PositionGroups,
    check_own_parameters,
    check_plain,
    number_of_position_groups,
)
from .rounding import round_offsets
from .sharded import copy_whole_, like_sharded, whole

__all__ = ["ACUConv2d", "acu_layers", "check_finite", "check_grids"]

torch.fx.wrap("acu_conv2d")  # torch.fx (torchvision's create_feature_extractor) records the call, not what is inside
torch.fx.wrap("conv2d_as_plain")
torch.fx.wrap("whole")  # asks what kind of tensor it has, which torch.fx does not know while it traces

#: Precisions in which small steps of a position are lost.
_HALF = (torch.float16, torch.bfloat16)

_FROM_PLAIN = (
    "`state_dict` is that of a plain model: it has no offsets for some active convolutions, whose taps stay where "
    "they start"
)
_FROM_PLAIN_TOO_LATE = (
    "`state_dict` is that of a plain model: it has no offsets for some active convolutions whose taps have moved. With "
    "strict=True torch raises an error for the missing keys; with strict=False the taps stay where they are. To load "
    "it, call reset_parameters() of these layers first, which moves the taps back to where they start"
)


class ACUConv2d(nn.Conv2d):
    """``nn.Conv2d`` plus ``offsets``; see :func:`lightning_acu.functional.acu_conv2d` for the formula.

    ``weight`` and ``bias`` keep the names and shapes of ``nn.Conv2d``, and only ``offsets`` is new: a 1-D parameter of
    P*K*2 numbers, (dy, dx) in pixels for each tap of each position group, in raster order; zero at first, when the
    layer computes exactly what the plain one does. It stays in float32 when the layer goes to half or bfloat16
    (``.to``, ``.half()``), in which small steps would be lost. A plain layer's state_dict loads, with a warning, as
    long as the taps are where they start.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in ``nn.Conv2d``. With a ``padding_mode`` other than "zeros" the image is padded by ``padding`` in that
            mode; beyond that there are zeros.
        position_groups: P sets of positions; output channel co uses set ``co * P // out_channels``. Divides
            ``out_channels``; independent of ``groups``. "channels": one set for each input channel of a depthwise
            layer (``groups == in_channels``); the attribute is then that number.
        fixed_centre: the centre tap of an odd kernel stays where it is, as in the paper: 8 taps move in a 3x3.
            Its two numbers in ``offsets`` are stored, ignored, and get zero gradients.
        backend: "auto" or the name of one, as in :func:`lightning_acu.functional.acu_conv2d`.

    Under FSDP2 everything that reads positions is a collective operation: call it on every process.

    Raises:
        ValueError: an invalid argument; the message names it and its value.
    """

    offsets: nn.Parameter
    position_groups: int
    backend: str
    #: The tap that stays where it is, if there is one.
    fixed_tap: int | None
    #: Where the taps of a free shape start, (dy, dx) in pixels; None: on the grid.
    start: tuple[tuple[float, float], ...] | None
    #: (dy, dx) of the plain convolution that the layer computes as; None: as an active one. See ``compute_as_plain``.
    plain_dilation: tuple[int, int] | None = None

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
        position_groups: PositionGroups = 1,
        fixed_centre: bool = True,
        backend: str = "auto",
    ) -> None:
        refuse_peft(type(self), "leave active convolutions out of target_modules, or fold the model first")
        check_convolution(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )  # fmt: skip
        self._add_offsets(position_groups, fixed_centre, backend)

    @classmethod
    def from_conv2d(
        cls, conv: nn.Conv2d, *, position_groups: PositionGroups = 1, fixed_centre: bool = True, backend: str = "auto"
    ) -> Self:
        """An active convolution that computes what ``conv`` does and shares its ``weight`` and ``bias``.

        Raises:
            TypeError: ``conv`` is not exactly a ``plain_class``; a subclass may compute something else.
            ValueError: its weight or bias is recomputed from other parameters, or an argument is invalid.
        """
        check_plain(conv, cls.plain_class)
        check_own_parameters(conv)
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
        position_groups: PositionGroups = 1,
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
            ValueError: its weight or bias is recomputed from other parameters, or an argument is invalid.
        """
        if exact:
            check_plain(conv, cls.plain_class)
        check_own_parameters(conv)
        number_of_position_groups(position_groups, conv)
        check_backend(backend)
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
        position_groups: PositionGroups = 1,
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
            TypeError: ``positions`` are not numbers.
            ValueError: ``positions`` is not (K, 2) with K >= 1, or not finite; or another argument is invalid.
        """
        try:
            taps = torch.as_tensor(positions, dtype=torch.float64, device="cpu").detach()
        except (TypeError, ValueError) as error:
            raise TypeError(f"`positions` (={positions!r}) must be (dy, dx) in pixels for each tap: {error}") from error
        if taps.ndim != 2 or taps.shape[-1] != 2 or not len(taps):
            raise ValueError(
                f"`positions` (={positions!r}) must be (K, 2) with K >= 1 taps, got shape {tuple(taps.shape)}"
            )
        if not taps.isfinite().all():
            raise ValueError(f"`positions` (={taps.tolist()}) must be finite")
        check_convolution(in_channels, out_channels, 1, stride, groups=groups)
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
            self.offsets.copy_(taps.expand(self.position_groups, -1, -1).flatten())
        return self

    def _add_offsets(self, position_groups: PositionGroups, fixed_centre: bool, backend: str) -> None:
        self.position_groups = number_of_position_groups(position_groups, self)
        self.backend = check_backend(backend)
        self.start = None
        odd = all(k % 2 for k in self.kernel_size)
        self.fixed_tap = self.geometry.taps // 2 if fixed_centre and odd else None
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        size = self.position_groups * self.geometry.taps * 2
        with torch.inference_mode(False):  # they have to be able to learn afterwards
            offsets = torch.zeros(size, dtype=dtype, device=self.weight.device)
            # A frozen convolution stays frozen.
            self.offsets = nn.Parameter(offsets, requires_grad=self.weight.requires_grad)

    @property
    def geometry(self) -> ConvGeometry:
        """The geometry that the operator sees (for other padding modes: after the padding)."""
        kernel_size, stride, dilation = map(pair, (self.kernel_size, self.stride, self.dilation))
        padding: Padding = self.padding if self.padding_mode == "zeros" else 0
        sides = resolve_padding(padding, kernel_size, stride, dilation)
        return ConvGeometry(kernel_size, stride, sides, dilation, self.groups)

    def active_offsets(self) -> Tensor:
        """(P, K, 2), differentiable: ``offsets`` as the layer uses them, with the fixed tap at zero."""
        offsets = whole(self.offsets).view(self.position_groups, -1, 2)
        if self.fixed_tap is None:  # (a view asks for a gradient even where none is recorded)
            return offsets if torch.is_grad_enabled() else offsets.detach()
        before, _, after = offsets.split([self.fixed_tap, 1, self.geometry.taps - self.fixed_tap - 1], dim=1)
        return torch.cat((before, offsets.new_zeros(self.position_groups, 1, 2), after), dim=1)

    @property
    def positions(self) -> Tensor:
        """(P, K, 2), detached: (dy, dx) of each tap in pixels from the centre of the kernel."""
        (kh, kw), (dh, dw) = pair(self.kernel_size), pair(self.dilation)
        offsets = self.active_offsets().detach()
        return offsets + self._grid(offsets) - offsets.new_tensor([(kh - 1) / 2 * dh, (kw - 1) / 2 * dw])

    def starting_offsets(self, device: torch.device | None = None) -> Tensor:
        """(P, K, 2): ``active_offsets`` before any training; on ``device``, by default that of ``offsets``."""
        shape = (self.position_groups, self.geometry.taps, 2)
        start = ((0.0, 0.0),) if self.start is None else self.start
        return torch.tensor(start, dtype=self.offsets.dtype, device=device or self.offsets.device).expand(shape)

    @property
    def displacement(self) -> Tensor:
        """(P, K, 2), detached: how far each tap has moved from where it started, (dy, dx) in pixels."""
        return self.active_offsets().detach() - self.starting_offsets()

    @property
    def movable(self) -> Tensor:
        """(K,) bool: True for the taps that can move."""
        movable = torch.ones(self.geometry.taps, dtype=torch.bool, device=self.offsets.device)
        if self.fixed_tap is not None:
            movable[self.fixed_tap] = False
        return movable

    def _grid(self, like: Tensor) -> Tensor:
        """(K, 2): the regular grid from its first tap, in pixels."""
        (kh, kw), (dh, dw) = pair(self.kernel_size), pair(self.dilation)
        return like.new_tensor([(i * dh, j * dw) for i in range(kh) for j in range(kw)])

    @torch.no_grad()
    def round_(self, separate: bool = False, *, to: RoundTo = "pixels") -> Self:
        """Move every tap to the nearest whole pixel (ties to even), or all to the nearest dilated grid, in place.

        Args:
            separate: where taps of one position group would end on one pixel, give each its own instead: the nearest
                such arrangement, by the sum of squared distances. On dilated grids taps never meet.
            to: "pixels"; or "dilation": each position group becomes a plain dilated convolution of the same kernel
                size, output size and centre, at the dilations (dy, dx) >= 1 nearest to its taps by least squares.
                Each tap moves to the point of that grid with its own index, and weights stay, so that the fold is one
                ``nn.Conv2d`` of the original size. See :mod:`lightning_acu.dilation` for even kernels.

        Raises:
            ModuleNotFoundError: ``separate`` and taps that would meet, and SciPy is not installed.
            ValueError: positions are not finite, or on the meta device with ``separate`` or ``to="dilation"``; they are
                parametrized, and the parametrization cannot give whole pixels; ``to`` is neither; or it is "dilation"
                and the layer has a free shape, which no dilated grid has.
        """
        check_round_to("to", to)
        offsets = self.active_offsets()
        check_finite_offsets([("", offsets)])
        if to == "dilation":
            self.check_has_grid()
            if offsets.is_meta:
                raise ValueError("`offsets` are on the meta device, without values to round with `to`='dilation'")
            moved = dilated_offsets(nearest_dilations(offsets, self.geometry), self.geometry).to(offsets.dtype)
        else:
            stored = whole(self.offsets).view_as(offsets)
            moved = round_offsets(stored, self._grid(stored), self.fixed_tap, separate)
        self._set_offsets(moved.flatten())
        return self

    def check_has_grid(self) -> None:
        """Check that the layer has a regular grid that its taps can be rounded to, as dilations need.

        Raises:
            ValueError: it has a free shape (``from_positions``), dilation 0, or a single tap that can move: a shift,
                which no dilation keeps.
        """
        if self.geometry.taps == 1 and self.fixed_tap is None:
            raise ValueError(
                "it has one tap, a shift, which no dilation keeps; round to whole pixels (`to`='pixels'), or leave it "
                "as it is when you convert (`exclude_modules`)"
            )
        if self.start is not None or 0 in pair(self.dilation):
            raise ValueError(
                "it has a free shape (ACUConv2d.from_positions), which no dilated convolution has; round it to whole "
                "pixels with `to`='pixels'"
            )

    @property
    def grid_dilations(self) -> list[tuple[int, int]] | None:
        """(dy, dx) for each position group if all taps are exactly on plain dilated grids; else None.

        Under FSDP2 a collective operation.
        """
        offsets = self.active_offsets().detach()
        if self.start is not None or offsets.is_meta:
            return None
        return grid_dilations(offsets, self.geometry)

    def compute_as_plain(self) -> bool:
        """From now on compute by ``F.conv2d``, at the dilation that the taps are on; returns whether there is one.

        The same function, up to float rounding, at the speed of ``nn.Conv2d``, for taps that are to move no more: after
        ``round_(to="dilation")``, in training too. Parameters and state_dict stay as they are, and positions get
        gradients of zero. Setting positions ends it (``round_``, ``reset_parameters``) or, if they are loaded, finds
        the dilation anew; positions that are written otherwise are not noticed.

        Position groups on grids of different dilations have no such convolution: False, and nothing changes.
        """
        groups = self.grid_dilations
        self.plain_dilation = groups[0] if groups and len(set(groups)) == 1 else None
        return self.plain_dilation is not None

    @torch.no_grad()
    def _set_offsets(self, value: Tensor) -> None:
        """Write ``value`` into ``offsets``, through their parametrization if they have one."""
        self.plain_dilation = None
        if not parametrize.is_parametrized(self, "offsets"):
            copy_whole_(self.offsets, value)
            return
        own: Any = self.parametrizations["offsets"]  # type: ignore[index]
        before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
        why: Exception | None = None
        try:
            self.offsets = value  # type: ignore[assignment]
        except Exception as error:  # no inverse, or one that does not take such values
            why = error
        if why is not None or not torch.equal(self.offsets, value):
            own.load_state_dict(before)
            kinds = ", ".join(type(parametrization).__name__ for parametrization in own)
            raise ValueError(
                f"`offsets` are parametrized by {kinds}, which cannot give the positions to set exactly; call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'offsets') first"
            ) from why

    def reset_parameters(self) -> None:
        """``nn.Conv2d``'s initialisation, and the taps back to where they start."""
        super().reset_parameters()
        if hasattr(self, "offsets"):  # nn.Conv2d calls this before there are any
            self._set_offsets(self.starting_offsets().flatten())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the precision of ``offsets``, and initialise them when they leave the meta device (``to_empty``)."""
        offsets = self._parameters.get("offsets")  # None where a parametrization computes them
        was_meta = offsets is not None and offsets.is_meta
        kept = [offsets] if offsets is not None else []
        if parametrize.is_parametrized(self, "offsets"):
            own: Any = self.parametrizations["offsets"]  # type: ignore[index]
            kept = [*own.parameters(), *own.buffers()]
        kept_ids = {id(each) for tensor in kept for each in (tensor, tensor.grad)}

        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return tensor.to(applied.device) if id(tensor) in kept_ids and applied.dtype in _HALF else applied

        super()._apply(keep_precision, recurse)
        if was_meta and not self.offsets.is_meta:
            copy_whole_(self.offsets, self.starting_offsets().flatten())
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Also load a plain layer's state, if the taps are where they start; load ``offsets`` in float32 at least."""
        key, weight = f"{prefix}offsets", state_dict.get(f"{prefix}weight")
        given = state_dict.get(key)
        if isinstance(given, Tensor) and given.dtype in _HALF:
            state_dict[key] = given.detach().float()
        elif key not in state_dict and isinstance(weight, Tensor) and "offsets" in self._parameters:
            if self.offsets.is_meta:  # they have no values yet
                state_dict[key] = like_sharded(self.starting_offsets(weight.device).flatten(), self.offsets)
            elif not self.displacement.any():  # (the stored numbers of a fixed tap do not count)
                state_dict[key] = self.offsets.detach()
            warnings.warn(_FROM_PLAIN if key in state_dict else _FROM_PLAIN_TOO_LATE, stacklevel=2)
        super()._load_from_state_dict(state_dict, prefix, *others)
        if self.plain_dilation is not None:
            self.compute_as_plain()

    def fold(self, form: str = "auto") -> nn.Conv2d | FoldedConv2d:
        """The same function as plain convolutions, exactly, at any positions; the layer itself is not changed.

        One ``nn.Conv2d`` of the original kernel size if the taps are on a plain dilated grid (with different dilations
        for each position group: a :class:`~lightning_acu.grid_fold.SplitConv2d`); a larger one if they lie close
        together; else a :class:`~lightning_acu.folded.FoldedConv2d`, a sum of small ones.

        Args:
            form: "auto", as above, or another of :data:`lightning_acu.forms.FORMS`.

        Raises:
            ValueError: ``offsets`` are not finite or on the meta device, or a hook recomputes the weight (old weight
                norm, pruning); an unknown ``form``, or taps too far apart for it.
        """
        # (a parametrized weight is computed when it is read, and one in a buffer is its own)
        if not parametrize.is_parametrized(self) and "weight" not in self._buffers:
            check_own_parameters(self)
        if self.offsets.is_meta or self.weight.is_meta:
            raise ValueError(
                "its weight or offsets are on the meta device, without values to fold; give it values first: "
                'model.to_empty(device="cpu"), then load_state_dict'
            )
        with torch.enable_grad():  # a parametrized weight asks for gradients only where they are recorded
            trainable, bias = self.weight.requires_grad, self.bias
        weight = self.effective_weight().detach().requires_grad_(trainable)
        return self._fold(weight, self.active_offsets().detach(), bias, form).train(self.training)

    def fold_without_numbers(self, form: str = "auto", *, moved: bool = True) -> nn.Conv2d | FoldedConv2d:
        """:meth:`fold` with its parameters on the meta device, to count what it computes.

        Args:
            form: as in :meth:`fold`.
            moved: False: at the positions where the taps started.
        """
        offsets = self.active_offsets().detach() if moved else self.starting_offsets()
        bias = None if self.bias is None else self.bias.to("meta")
        return self._fold(self.weight.detach().to("meta"), offsets, bias, form)

    def _fold(self, weight: Tensor, offsets: Tensor, bias: Tensor | None, form: str) -> nn.Conv2d | FoldedConv2d:
        arguments = weight, offsets, bias, self.geometry, self._padding_layer()
        folded = fold_onto_grids(*arguments) if form in ("auto", "single") else None
        if folded is None or (form == "single" and isinstance(folded, SplitConv2d)):
            folded = fold_in_form(*arguments, form)
        if type(folded) is FoldedConv2d and len(folded.convs) == 1 and isinstance(folded.convs[0], nn.Conv2d):
            folded = self._merge_padding(folded)
        return folded

    def __prepare_scriptable__(self) -> NoReturn:
        """torch.jit.script calls this before it compiles; better than its message about a type annotation."""
        raise RuntimeError(
            "torch.jit.script cannot compile active convolutions: use torch.jit.trace, which can, or "
            "lightning_acu.fold_acu(model) first"
        )

    def effective_weight(self) -> Tensor:
        """(C_out, C_in/groups, kh, kw), differentiable: the numbers at the taps; subclasses may standardise them."""
        return self.weight

    def _padding_layer(self) -> nn.Module | None:
        """The layer that pads the image first, in a fold; None if the convolution's own zero padding does."""
        return padding_layer(self)

    def _merge_padding(self, folded: FoldedConv2d) -> nn.Conv2d | FoldedConv2d:
        """The one convolution of ``folded`` with its own padding, if that equals the padding layer; else ``folded``."""
        (conv,), (sides,) = folded.convs, folded.sides
        assert isinstance(conv, nn.Conv2d)
        if any(sides) or (conv.kernel_size, conv.dilation) != (self.geometry.kernel_size, self.geometry.dilation):
            return folded
        for name in ("padding", "padding_mode", "_reversed_padding_repeated_twice"):
            setattr(conv, name, getattr(self, name))
        return conv

    def forward(self, input: Tensor) -> Tensor:
        """(N, C_in, H, W) or (C_in, H, W) to (N, C_out, H_out, W_out)."""
        return self._conv_forward(input, self.effective_weight(), self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        input, padding = self._pad(input)
        if self.plain_dilation is not None:
            return conv2d_as_plain(
                input, weight, self.offsets, bias, self.stride, padding, self.dilation, self.groups, self.plain_dilation
            )
        return acu_conv2d(
            input, weight, self.active_offsets(), bias, self.stride, padding, self.dilation, self.groups,
            backend=self.backend,
        )  # fmt: skip

    def _pad(self, input: Tensor) -> tuple[Tensor, Padding]:
        """The image, padded unless by zeros, and the zero padding that is left to the operator."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def extra_repr(self) -> str:
        """That of ``nn.Conv2d``, and the arguments of this class that differ from their defaults."""
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


def acu_layers(model: nn.Module) -> Iterator[tuple[str, ACUConv2d]]:
    """(qualified name, layer) of every active convolution in ``model``, a shared one once.

    Raises:
        TypeError: ``model`` is not a module.
    """
    require_module(model)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ACUConv2d))


@torch.no_grad()
def check_finite(layers: Iterable[tuple[str, ACUConv2d]]) -> None:
    """Check that all positions of ``layers``, (name, layer), are finite; under FSDP2 a collective operation.

    Raises:
        ValueError: some are nan or inf; the message names the layers and taps.
    """
    check_finite_offsets((name, layer.active_offsets()) for name, layer in layers)


def check_grids(layers: Iterable[tuple[str, ACUConv2d]]) -> None:
    """Check that all ``layers``, (name, layer), have a regular grid, as rounding to dilations needs.

    Raises:
        ValueError: some do not; the message names the first.
    """
    for name, layer in layers:
        try:
            layer.check_has_grid()
        except ValueError as error:
            raise ValueError(f"{name or 'the layer'}: {error}") from None
