"""Starting the kernels of a block: by the compiled extension, or by ctypes.

The argument area, in words of 8 bytes; kernels get the addresses of the words they take:

    0  x  y_in  y                     written in every call
    3  a  b  a1_shift a2_shift b1_shift b2_shift        `Stacks.words`
    9  the plan's tables              `table_words`
    15 tokens  tiles  slots  constants  workspaces      written once
    .. tensor maps, 16 words each     made in every call, of what stands above
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dop.measure import cuda_driver
from dop.measure.tensor_map import WORDS as MAP_WORDS
from dop.measure.tensor_map import Encoder, TensorMap, room
from dop.ops import native

WORD = 8
XY, STACK_WORDS, TABLE_WORDS, FIXED_WORDS = 0, 3, 9, 15
SERIALIZATION_ATTRIBUTE = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""

_EARLY = 2
"""What `_launch.c` takes for `Start.dependent` of an early kernel."""

CONFIG = struct.Struct("=7I4xQQI4x")
"""CUlaunchConfig: grid, block, shared memory, stream, attributes, their number."""
_ATTRIBUTE = struct.Struct("=I4xi60x")
_STACKS_AT = slice(STACK_WORDS * WORD, TABLE_WORDS * WORD)
_pack_xy = struct.Struct("=3Q").pack_into
_SHIFT_BYTES = 16
"""Unit of the distances between stacks."""


@dataclass(frozen=True)
class MapPlace:
    """A tensor map of the argument area.

    Attributes:
        place: first of its words.
        base: word of the tensor's address.
        shift: word of its distance from there, in groups of 16 bytes; 0: there is none.
        what: the map.
    """

    place: int
    base: int
    shift: int
    what: TensorMap

    @property
    def figures(self) -> bytes:
        """As the compiled launcher reads it: 8 words."""
        what = self.what
        return struct.pack(
            "=8Q", self.place, self.base, self.shift, what.kind, *what.dims, what.box_rows
        )


@dataclass(frozen=True)
class Start:
    """One kernel launch.

    Attributes:
        function: CUfunction.
        figures: grid, block, bytes of dynamic shared memory.
        dependent: it may start before its predecessor ends.
        places: word of the argument area of each parameter.
        early: it may start so too, if the call says that it may overlap (settled.py).
        maps: the tensor maps among its parameters.
    """

    function: int
    figures: tuple[int, ...]
    dependent: bool
    places: tuple[int, ...]
    early: bool = False
    maps: tuple[MapPlace, ...] = ()


class Call(Protocol):
    """The launches of a block. It belongs to one thread."""

    def run(self, x: int, y: int, stacks: bytes, tables: bytes, overlap: bool = False, /) -> int:
        """Launches.

        Args:
            x, y: device addresses.
            stacks: `Stacks.words`.
            tables: `table_words` or `derived_words`.
            overlap: early kernels are launched as dependent ones.

        Returns:
            The driver's code, 0 if all is well, less than 0 where it refused a tensor map: see
            `check`. Nothing was launched then.
        """


def check(code: int) -> None:
    """Raises CudaError for a code of `Call.run` that is not 0."""
    if code:
        name = "cuLaunchKernelEx" if code > 0 else "cuTensorMapEncodeTiled"
        cuda_driver.check(name, abs(code))


def make_call(
    driver: Any,
    stream: int,
    fixed: Sequence[int],
    starts: Sequence[Start],
    tile_rows: int,
    sizes: tuple[int, int, int],
    recorder: bytes = b"",
) -> Call:
    """Launches, prepared.

    Args:
        driver: `launch.Driver`.
        stream: CUstream.
        fixed: words of the argument area from FIXED_WORDS on.
        starts: the launches in order.
        tile_rows: rows per tile of the tables.
        sizes: tokens, width of x, width of y.
        recorder: of `graphs.recorder`; empty: calls are always launched, as they are by ctypes.
    """
    words = struct.pack(f"={len(fixed)}Q", *(word & (1 << 64) - 1 for word in fixed))
    maps = tuple(dict.fromkeys(one for start in starts for one in start.maps))
    if native.EXTENSION is None or not driver.entry:
        encode = driver.encode if maps else None
        return PythonCall(driver.launch, stream, words, starts, maps, encode)
    launches = tuple(
        (
            one.function,
            struct.pack("=7I", *one.figures),
            _EARLY if one.early else int(one.dependent),
            struct.pack(f"={len(one.places)}I", *one.places),
        )
        for one in starts
    )
    ready = driver.entry, stream, words, launches, tile_rows, *sizes
    figures = b"".join(one.figures for one in maps)
    entry = driver.encode_entry if maps else 0
    call: Call = native.EXTENSION.Call(*ready, entry, figures, recorder)
    return call


class PythonCall:
    """Launches by ctypes."""

    __slots__ = ("_area", "_keep", "_maps", "_overlapping", "_plain", "_start", "_tables", "_view")

    def __init__(
        self,
        start: Callable[..., int],
        stream: int,
        fixed: bytes,
        starts: Sequence[Start],
        maps: Sequence[MapPlace] = (),
        encode: Callable[..., int] | None = None,
    ) -> None:
        self._start = start
        self._area = (ctypes.c_char * (WORD * FIXED_WORDS + len(fixed)))()
        self._view = memoryview(self._area).cast("B")
        self._view[WORD * FIXED_WORDS :] = fixed
        self._tables = b""
        self._keep: list[Any] = []
        self._maps = [(one, Encoder(encode, one.what, room())) for one in maps]
        self._plain = [self._call(one, stream, one.dependent) for one in starts]
        self._overlapping = [self._call(one, stream, one.dependent or one.early) for one in starts]

    def run(self, x: int, y: int, stacks: bytes, tables: bytes, overlap: bool = False, /) -> int:
        """Launches; see `Call`."""
        _pack_xy(self._area, XY, x, y, y)
        view = self._view
        view[_STACKS_AT] = stacks
        if tables is not self._tables:
            at = TABLE_WORDS * WORD
            view[at : at + len(tables)] = tables
            self._tables = tables
        if self._maps:
            code = self._make_maps()
            if code:
                return -code
        start = self._start
        for config, function, parameters in self._overlapping if overlap else self._plain:
            code = start(config, function, parameters, None)
            if code:
                return code
        return 0

    def _make_maps(self) -> int:
        """Puts the maps of the tensors that the area names into it; the driver's code."""
        view = self._view
        for one, encoder in self._maps:
            address = self._word(one.base)
            if one.shift:
                address += self._word(one.shift) * _SHIFT_BYTES
            code = encoder.encode(address & (1 << 64) - 1)
            if code:
                return code
            at = one.place * WORD
            view[at : at + MAP_WORDS * WORD] = memoryview(encoder.out).cast("B")
        return 0

    def _word(self, place: int) -> int:
        return int.from_bytes(self._view[place * WORD : (place + 1) * WORD], sys.byteorder)

    def _call(self, one: Start, stream: int, dependent: bool) -> tuple[ctypes.c_void_p, ...]:
        words = self._config(one, stream, dependent), one.function, self._parameters(one)
        return tuple(ctypes.c_void_p(word) for word in words)  # as ctypes passes them on fastest

    def _parameters(self, one: Start) -> int:
        base = ctypes.addressof(self._area)
        array = (ctypes.c_void_p * max(1, len(one.places)))(*(base + WORD * p for p in one.places))
        self._keep.append(array)
        return ctypes.addressof(array)

    def _config(self, one: Start, stream: int, dependent: bool) -> int:
        room = (ctypes.c_char * (CONFIG.size + _ATTRIBUTE.size))()
        address = ctypes.addressof(room)
        attributes = address + CONFIG.size if dependent else 0
        CONFIG.pack_into(room, 0, *one.figures, stream, attributes, int(dependent))
        _ATTRIBUTE.pack_into(room, CONFIG.size, SERIALIZATION_ATTRIBUTE, 1)
        self._keep.append(room)
        return address
