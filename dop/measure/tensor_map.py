"""Maps of tensors for the copy engine (TMA, sm_90): the one place that knows what they are. Neither
TVM nor torch is imported.

A kernel takes a map as a parameter of 128 bytes whose name says what is in it: `x_box128` is of x
with boxes of 128 rows; `a_box64`, `a1_box64` and `a2_box64` are of the stacks A of the slices,
`b_box64` and so on of their stacks B; `y_box72` is of y, which is read and written. A map has three
axes: columns, rows and planes. Rows beyond the tensor's read as zeros and are not written. A box
has 64 columns, which are 128 bytes, the widest that shared memory swizzles. Everything but the
tensor's address follows from the call site and the batch, and the driver puts it all together
(cuTensorMapEncodeTiled, from CUDA 12 on).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dop.errors import ExportError
from dop.measure import cuda_driver
from dop.workload import Workload

WORDS = 16
"""Words of 8 bytes of a map."""
ALIGN = 64
"""Alignment that the driver wants of a map that it writes, in bytes."""
BOX_COLUMNS = 64
MAX_BOX_ROWS = 256

NONE, SWIZZLE_128B, PROMOTE_256B = 0, 3, 3
"""CU_TENSOR_MAP_INTERLEAVE_NONE and CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
CU_TENSOR_MAP_L2_PROMOTION_L2_256B."""
ELEMENT_KIND = {"float16": 6, "bfloat16": 9}
"""CUtensorMapDataType."""
ELEMENT_BYTES = 2

Encoded = ctypes.Array[ctypes.c_uint64]
"""A map as a kernel takes it, aligned."""

_NAME = re.compile(r"(x|y|[ab][12]?)_box([1-9]\d*)")


def parse(name: str) -> tuple[str, int] | None:
    """Tensor ("x", "y", or "a", "a1", "b", ... for the stacks of the slices) and rows of a box of a
    kernel's parameter; None if it is no map."""
    match = _NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def tensor_of(name: str) -> str:
    """Tensor that a kernel's parameter is about: that of a map, else the name itself."""
    found = parse(name)
    return found[0] if found else name


def wanted(arguments: Iterable[str]) -> bool:
    """Whether a kernel with these parameters takes maps."""
    return any(parse(name) for name in arguments)


@dataclass(frozen=True)
class TensorMap:
    """All of a map but the address of its tensor.

    Attributes:
        tensor: as `parse` names it.
        kind: CUtensorMapDataType.
        dims: columns, rows, planes, in elements; they lie one behind the other.
        box_rows: rows of a box.
    """

    tensor: str
    kind: int
    dims: tuple[int, int, int]
    box_rows: int

    @property
    def strides(self) -> tuple[int, int]:
        """Bytes of a row and of a plane."""
        columns, rows, _ = self.dims
        return ELEMENT_BYTES * columns, ELEMENT_BYTES * columns * rows

    def __str__(self) -> str:
        columns, rows, planes = self.dims
        return f"map of {self.tensor} [{planes}, {rows}, {columns}], boxes of {self.box_rows} rows"


def tensor_map(
    name: str,
    *,
    dtype: str,
    in_features: int,
    out_features: Sequence[int],
    rank: int,
    tokens: int,
    slots: int,
) -> TensorMap:
    """What a kernel's parameter asks for.

    Args:
        name: of the parameter.
        dtype: element type.
        in_features: width of x.
        out_features: width of each slice of y.
        rank: of the stacks.
        tokens: rows of x and y.
        slots: adapters of a stack that tables may name.

    Raises:
        ExportError: it is no map, or one that cannot be made.
    """
    found = parse(name)
    if found is None or found[1] > MAX_BOX_ROWS:
        raise ExportError(f"{name!r} is no tensor map.", "Export the kernel again.")
    if dtype not in ELEMENT_KIND:
        raise ExportError(f"there are no tensor maps of {dtype}.", "Export the kernel again.")
    tensor, box_rows = found
    slice_ = int(tensor[1:] or 0)
    if slice_ >= len(out_features):
        raise ExportError(f"{name!r} is of no slice.", "Export the kernel again.")
    dims = {
        "x": (in_features, tokens, 1),
        "y": (sum(out_features), tokens, 1),
        "a": (in_features, rank, slots),
        "b": (rank, out_features[slice_], slots),
    }
    return TensorMap(tensor, ELEMENT_KIND[dtype], dims[tensor[0]], box_rows)


def of_workload(name: str, workload: Workload, *, tokens: int, slots: int) -> TensorMap:
    """`tensor_map` of a workload's tensors."""
    w = workload
    return tensor_map(
        name,
        dtype=w.dtype,
        in_features=w.in_features,
        out_features=w.out_features,
        rank=w.rank,
        tokens=tokens,
        slots=slots,
    )


def encoder() -> Any:
    """The driver's cuTensorMapEncodeTiled; None if there is none."""
    return getattr(cuda_driver.driver(), "cuTensorMapEncodeTiled", None)


NO_ENCODER = "takes tensor maps, which a driver before CUDA 12 cannot make"
"""Why a kernel cannot be served where `encoder` is None."""


def no_encoder(what: str) -> ExportError:
    """The error where `encoder` is None.

    Args:
        what: takes maps.
    """
    return ExportError(f"{what} {NO_ENCODER}.", "Update the NVIDIA driver.")


def room() -> Encoded:
    """Zeroed memory of a map, aligned."""
    whole = ctypes.create_string_buffer(8 * WORDS + ALIGN)
    return (ctypes.c_uint64 * WORDS).from_buffer(whole, -ctypes.addressof(whole) % ALIGN)


class Encoder:
    """A map whose tensor moves, by ctypes; `_launch.c` does the same.

    Args:
        encode: cuTensorMapEncodeTiled.
        what: the map.
        out: where it is put, aligned.
    """

    __slots__ = ("_address", "_arguments", "_encode", "out")

    def __init__(self, encode: Any, what: TensorMap, out: Encoded) -> None:
        self._encode, self.out = encode, out
        self._address = ctypes.c_void_p()
        numbers, sizes = ctypes.c_uint32 * 3, ctypes.c_uint64 * 3
        self._arguments = (
            ctypes.c_void_p(ctypes.addressof(out)),
            ctypes.c_int(what.kind),
            ctypes.c_uint32(3),
            self._address,
            sizes(*what.dims),
            (ctypes.c_uint64 * 2)(*what.strides),
            numbers(BOX_COLUMNS, what.box_rows, 1),
            numbers(1, 1, 1),
            *map(ctypes.c_int, (NONE, SWIZZLE_128B, PROMOTE_256B, NONE)),
        )

    def encode(self, address: int) -> int:
        """Makes the map of the tensor at a device address; the driver's code."""
        self._address.value = address
        return int(self._encode(*self._arguments))


def encode(what: TensorMap, address: int) -> Encoded:
    """A map of the tensor at a device address, by this process's driver.

    Raises:
        ExportError: the driver is older than CUDA 12.
        CudaError: the driver refused it.
    """
    function = encoder()
    if function is None:
        raise no_encoder("a kernel")
    made = Encoder(function, what, room())
    cuda_driver.check(f"cuTensorMapEncodeTiled({what}, at {address:#x})", made.encode(address))
    return made.out
