"""A call of the operator without its numbers: what measurements are kept for, and what they are made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import ConvGeometry

__all__ = ["Call", "call_from_json", "call_of", "call_to_json", "synthetic"]


class Call(NamedTuple):
    """One pass of one layer. Its ``signature`` says which calls share a choice.

    ``needs``: None for the forward pass, otherwise which gradients (input, weight, offsets) the backward pass gives.
    ``threads``: torch's on a CPU, 0 elsewhere. ``tf32``, ``benchmark``: how torch's convolutions run on a GPU.
    """

    device: str
    needs: tuple[bool, ...] | None
    dtype: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    position_groups: int
    geometry: ConvGeometry
    channels_last: bool
    tf32: bool = False
    benchmark: bool = False
    threads: int = 0

    @property
    def signature(self) -> str:
        """As text: everything but the exact number of pixels, of which the power of 2 below it counts."""
        geometry = self.geometry
        pixels = self.input[0] * self.input[2] * self.input[3]
        of = "" if self.needs is None else " of " + "".join("xwp"[i] for i, need in enumerate(self.needs) if need)
        parts = [
            f"{'forward' if self.needs is None else 'backward'}{of}",
            self.dtype,
            f"{self.input[1]}->{self.weight[0]}",
            f"{self.weight[2]}x{self.weight[3]}",
            f"groups {geometry.groups}",
            f"positions {self.position_groups}",
            "stride {}x{}".format(*geometry.stride),
            "dilation {}x{}".format(*geometry.dilation),
            f"2^{max(pixels, 1).bit_length() - 1} pixels",
            "channels_last" if self.channels_last else "contiguous",
            *(["tf32"] if self.tf32 else []),
            *(["benchmark"] if self.benchmark else []),
            *([f"{self.threads} threads"] if self.threads else []),
        ]
        return ", ".join(parts)


def call_of(
    input: Tensor, weight: Tensor, offsets: Tensor, geometry: ConvGeometry, needs: Sequence[bool] | None
) -> Call:
    """The call of these tensors."""
    on_gpu = input.is_cuda
    return Call(
        input.device.type,
        None if needs is None else tuple(map(bool, needs)),
        str(input.dtype).removeprefix("torch."),
        tuple(input.shape),
        tuple(weight.shape),
        len(offsets),
        geometry,
        not input.is_contiguous(),
        on_gpu and input.dtype == torch.float32 and _uses_tf32(input.device),
        on_gpu and torch.backends.cudnn.benchmark,
        0 if on_gpu else torch.get_num_threads(),
    )


def _uses_tf32(device: torch.device) -> bool:
    from ..triton.tiles import precision  # (whose room imports this one)

    return precision(torch.float32, device) == "tf32"


def call_to_json(call: Call) -> dict[str, Any]:
    """As JSON can hold it."""
    return call._asdict() | {"geometry": asdict(call.geometry)}


def call_from_json(fields: dict[str, Any]) -> Call:
    """The inverse of :func:`call_to_json`."""

    def tuples(values: dict[str, Any]) -> dict[str, Any]:
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    return Call(**tuples(fields) | {"geometry": ConvGeometry(**tuples(fields["geometry"]))})


def synthetic(
    call: Call, device: torch.device, positions: Sequence[Any] | None = None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Random (gradient of the output or None, input, weight, offsets) for ``call``.

    Offsets are uniform in (-1, 1), never zero: training starts at zero, where "dense" is ``F.conv2d`` itself, and would
    win for ever. ``positions``: a nested list of (P, K, 2) offsets to take instead. torch's own generators stay as they
    are.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, call.dtype)

    def normal(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator).to(dtype)

    def image(shape: Sequence[int]) -> Tensor:
        made = normal(shape)
        return made.contiguous(memory_format=torch.channels_last) if call.channels_last else made

    if positions is None:
        shape = (call.position_groups, call.geometry.taps, 2)
        offsets = torch.rand(shape, device=device, dtype=torch.float32, generator=generator) * 2 - 1
    else:
        offsets = torch.tensor(positions, device=device, dtype=torch.float32)
    size = (call.input[0], call.weight[0], *call.geometry.output_size(call.input[2:]))
    grad = None if call.needs is None else image(size)
    return grad, image(call.input), normal(call.weight), offsets
