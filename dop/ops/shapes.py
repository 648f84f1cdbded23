"""Shapes and types of a call site, as one object for each kind of call site."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dop.errors import ShapeError
from dop.workload import MAX_SLICES

DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
}
ALIGN_BYTES = 16


@dataclass(frozen=True, eq=False)
class Shape:
    """Shapes and types of a call site, one object per kind of call site and device.

    Attributes:
        in_features: width of x.
        outs: width of each slice of y.
        rank: rank of the stacks.
        dtype: element type.
        device: index of the GPU, -1 for the CPU.
        number: a small number of its own.
    """

    in_features: int
    outs: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    device: int
    number: int

    @property
    def slices(self) -> int:
        """Number of slices."""
        return len(self.outs)

    @property
    def total_out(self) -> int:
        """Width of y."""
        return sum(self.outs)

    @property
    def key(self) -> str:
        """As `Workload.key` writes it."""
        return workload_key(self.dtype, self.rank, self.in_features, self.outs)


def workload_key(kind: torch.dtype, rank: int, width: int, outs: Sequence[int]) -> str:
    """Name of a call site's shapes, the same as `Workload.key`."""
    return f"sgmv/{DTYPES[kind]}/r{rank}/{width}->{'+'.join(map(str, outs))}"


_SHAPES: dict[Any, Shape] = {}


def shape_of(width: int, outs: tuple[int, ...], rank: int, kind: torch.dtype, device: int) -> Shape:
    """The one `Shape` object of these facts."""
    key = (width, outs, rank, kind, device)
    found = _SHAPES.get(key)
    if found is None:
        found = _SHAPES.setdefault(key, Shape(*key, number=len(_SHAPES)))
    return found


def stack_words(a: Sequence[int], b: Sequence[int]) -> bytes:
    """Kernel arguments of the stacks at these addresses: a, b, a1_shift, a2_shift, b1_shift,
    b2_shift, 8 bytes each; shifts are distances in groups of 16 bytes."""
    shifts = []
    for addresses in (a, b):
        distances = [(p - addresses[0]) // ALIGN_BYTES for p in addresses[1:]]
        shifts += distances + [0] * (MAX_SLICES - 1 - len(distances))
    return struct.pack("=2Q4q", a[0], b[0], *shifts)


def device_name(index: int) -> str:
    """Name of a device index."""
    return "cpu" if index < 0 else f"cuda:{index}"


def three_axes(tensor: Tensor, name: str) -> tuple[int, int, int]:
    """Sizes of a stack; an axis of 1 behind the slots is left out.

    Raises:
        ShapeError: it has another number of axes.
    """
    size = tuple(tensor.shape)
    if len(size) == 4 and size[1] == 1:
        size = (size[0], *size[2:])
    if len(size) != 3:
        wanted = "[slots, rank, in]" if name.startswith("a") else "[slots, out, rank]"
        raise ShapeError(f"{name} has shape {list(tensor.shape)}.", f"It must be {wanted}.")
    return size
