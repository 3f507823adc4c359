"""The geometry of a convolution: kernel size, stride, padding, dilation and groups, and what follows from them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from .choices import did_you_mean, one_of

__all__ = [
    "LIMIT",
    "STRIDE_LIMIT",
    "ConvGeometry",
    "Padding",
    "check_convolution",
    "integers",
    "pair",
    "resolve_padding",
    "same_padding",
    "same_sides",
]

#: Paddings, dilations and sides of images are less, in pixels: positions are clamped there.
LIMIT = 2**20

#: Strides are less: beyond any image, and a sum of some of them is still an int64.
STRIDE_LIMIT = 2**40

#: int, (rows, columns), (left, right, top, bottom) as in ``F.pad``, "same" or "valid".
Padding = int | Sequence[int] | str


@dataclass(frozen=True)
class ConvGeometry:
    """Everything about a 2-D convolution except its weights. Pairs are (rows, columns).

    ``padding`` is (top, left, bottom, right), in pixels; the sides may differ, as "same" needs for even kernels.
    ``dilation`` may be 0: all taps of that axis then share one grid point, and their offsets alone place them.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """K, the number of taps."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def shrinkage(self) -> tuple[int, int]:
        """(rows, columns) by which a stride-1 output is smaller than the input: ``dilation * (k - 1) - padding``."""
        (kh, kw), (dh, dw), (top, left, bottom, right) = self.kernel_size, self.dilation, self.padding
        return dh * (kh - 1) - top - bottom, dw * (kw - 1) - left - right

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Output (height, width) for an input of ``size`` (height, width); below 1 if the kernel does not fit."""
        (height, width), (lost_y, lost_x), (sy, sx) = size, self.shrinkage, self.stride
        return (height - lost_y - 1) // sy + 1, (width - lost_x - 1) // sx + 1

    def grid(self) -> list[tuple[int, int]]:
        """The K regular tap positions in raster order: (row, column) in pixels from input pixel ``output * stride``."""
        (kh, kw), (dh, dw), (top, left, _, _) = self.kernel_size, self.dilation, self.padding
        return [(i * dh - top, j * dw - left) for i in range(kh) for j in range(kw)]


def integers(name: str, value: int | Sequence[int], limit: int = LIMIT) -> tuple[int, ...]:
    """One int or several, as a tuple.

    Raises:
        TypeError: something else, also bool, which counts as an int in Python alone.
        ValueError: an int of ``limit`` or more, or of ``-limit`` or less.
    """
    if type(value) is int and -limit < value < limit:
        return (value,)
    try:
        numbers = tuple(map(operator.index, value)) if isinstance(value, Sequence) else (operator.index(value),)
        if any(isinstance(number, bool) for number in (value if isinstance(value, Sequence) else (value,))):
            raise TypeError("bool")
    except TypeError as error:
        raise TypeError(f"`{name}` (={value!r}) must be an int or a sequence of ints") from error
    if any(abs(number) >= limit for number in numbers):
        raise ValueError(f"`{name}` (={value!r}) must be less than {limit}")
    return numbers


def check_convolution(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> None:
    """Check the arguments of a 2-D convolution, as in ``nn.Conv2d``.

    Raises:
        TypeError: something other than whole numbers.
        ValueError: a number that is too small or too large, or not one for each axis; ``groups`` that do not divide the
            channels; an unknown ``padding_mode``. The message names the argument.
    """
    counts = {"in_channels": in_channels, "out_channels": out_channels, "groups": groups}
    for name, count in counts.items():
        numbers = integers(name, count, 2**62)
        if len(numbers) != 1 or numbers[0] < 1:
            raise ValueError(f"`{name}` (={count!r}) must be an int >= 1")
    for name in ("in_channels", "out_channels"):
        if counts[name] % groups:
            raise ValueError(f"`groups` (={groups}) must divide `{name}` (={counts[name]})")
    sizes = {}
    limits = {"stride": STRIDE_LIMIT}
    for name, value in {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}.items():
        numbers = integers(name, value, limits.get(name, LIMIT))
        if len(numbers) != (2 if isinstance(value, Sequence) else 1) or min(numbers) < 1:
            raise ValueError(f"`{name}` (={value!r}) must be an int >= 1 or a pair of them")
        sizes[name] = numbers[0], numbers[-1]
    resolve_padding(padding, sizes["kernel_size"], sizes["stride"], sizes["dilation"])
    one_of("padding_mode", padding_mode, ("zeros", "reflect", "replicate", "circular"))


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a number of a convolution; others may have set ``conv.stride = 2`` or ``[2, 2]`` on it."""
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns


def resolve_padding(
    padding: Padding, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a ``padding`` given as for ``F.conv2d``, or as four sides as for ``F.pad``.

    Raises:
        TypeError: ``padding`` is neither a string nor ints.
        ValueError: "same" with a stride other than 1, an unknown string, a negative side, or a wrong number of sides.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise ValueError(
                f"`padding` (={padding!r}) must be an int, a pair, four sides (left, right, top, bottom), "
                f"'same' or 'valid'{did_you_mean(padding, ('same', 'valid'))}"
            )
        if stride != (1, 1):
            raise ValueError(f"`padding`='same' needs stride 1, got `stride` (={stride}); give the padding in numbers")
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        top, left = total[0] // 2, total[1] // 2  # the odd pixel goes to the end, as in F.conv2d
        return top, left, total[0] - top, total[1] - left
    sides = integers("padding", padding)
    if min(sides, default=0) < 0:
        raise ValueError(f"`padding` (={padding}) must not be negative")
    if len(sides) == 1:
        return sides[0], sides[0], sides[0], sides[0]
    if len(sides) == 2:
        return sides[0], sides[1], sides[0], sides[1]
    if len(sides) == 4:
        left, right, top, bottom = sides
        return top, left, bottom, right
    raise ValueError(f"`padding` (={padding}) must have 1, 2 or 4 numbers, got {len(sides)}")


def same_padding(
    size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of TensorFlow's "SAME": output size ceil(size / stride), the odd pixel at the end.

    Unlike ``padding="same"`` of ``F.conv2d`` it is defined for any stride, and depends on the ``size`` (height, width)
    of the image.
    """
    (top, bottom), (left, right) = map(same_sides, size, kernel_size, stride, dilation)
    return top, left, bottom, right


def same_sides(size: int, kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """(before, after) of one axis in :func:`same_padding`; torch.jit.script can compile it."""
    total = (-(-size // stride) - 1) * stride + (kernel_size - 1) * dilation + 1 - size
    if (kernel_size - 1) * dilation + 1 < stride:  # else it is not negative, and a trace records no decision
        total = max(total, 0)
    return total // 2, total - total // 2
