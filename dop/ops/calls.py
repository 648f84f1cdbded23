"""Starting the kernels of a block: by the compiled extension, or by ctypes.

The argument area, in words of 8 bytes; kernels get the addresses of the words they take:

    0  x  y_in  y                     written in every call
    3  a  b  a1_shift a2_shift b1_shift b2_shift        `Stacks.words`
    9  the plan's tables              `table_words`
    15 tokens  tiles  slots  constants  workspaces      written once
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Start:
    """One kernel launch.

    Attributes:
        function: CUfunction.
        figures: grid, block, bytes of dynamic shared memory.
        dependent: it may start before its predecessor ends.
        places: word of the argument area of each parameter.
        early: it may start so too, if the call says that it may overlap (settled.py).
    """

    function: int
    figures: tuple[int, ...]
    dependent: bool
    places: tuple[int, ...]
    early: bool = False


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
            The driver's code, 0 if all is well.
        """


def make_call(
    driver: Any,
    stream: int,
    fixed: Sequence[int],
    starts: Sequence[Start],
    tile_rows: int,
    sizes: tuple[int, int, int],
) -> Call:
    """Launches, prepared.

    Args:
        driver: `launch.Driver`.
        stream: CUstream.
        fixed: words of the argument area from FIXED_WORDS on.
        starts: the launches in order.
        tile_rows: rows per tile of the tables.
        sizes: tokens, width of x, width of y.
    """
    words = struct.pack(f"={len(fixed)}Q", *(word & (1 << 64) - 1 for word in fixed))
    if native.EXTENSION is None or not driver.entry:
        return PythonCall(driver.launch, stream, words, starts)
    launches = tuple(
        (
            one.function,
            struct.pack("=7I", *one.figures),
            _EARLY if one.early else int(one.dependent),
            struct.pack(f"={len(one.places)}I", *one.places),
        )
        for one in starts
    )
    call: Call = native.EXTENSION.Call(driver.entry, stream, words, launches, tile_rows, *sizes)
    return call


class PythonCall:
    """Launches by ctypes."""

    __slots__ = ("_area", "_keep", "_overlapping", "_plain", "_start", "_tables", "_view")

    def __init__(
        self, start: Callable[..., int], stream: int, fixed: bytes, starts: Sequence[Start]
    ) -> None:
        self._start = start
        self._area = (ctypes.c_char * (WORD * FIXED_WORDS + len(fixed)))()
        self._view = memoryview(self._area).cast("B")
        self._view[WORD * FIXED_WORDS :] = fixed
        self._tables = b""
        self._keep: list[Any] = []
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
        start = self._start
        for config, function, parameters in self._overlapping if overlap else self._plain:
            code = start(config, function, parameters, None)
            if code:
                return code
        return 0

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
