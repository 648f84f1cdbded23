"""Eager calls that come again, kept as CUDA graphs.

Two launches take the host 4.6 to 7.5 us, a graph of the two 1.15; a whole call takes 7 to 12 us
and 3 to 6 (docs/performance.md, 53 and 55). In eager decode the same addresses come again: weights
and tables stay where they are, and the allocator gives each layer's x and y the place of the step
before. So the compiled short path of `add_lora` records the launches of a call whose addresses it
has seen twice, and replays them from then on; whatever has other addresses is launched as ever. A
graph starts when everything before it in the stream is complete, and everything behind it waits for
its end, so a replay may stand wherever a plain launch may (settled.py). What a graph costs the GPU,
about 1 us for its start, is hidden where the host is slower, in decode; calls of more than
KEEP_TOKENS tokens are always launched.

At most 256 calls of a shape, batch size, thread and stream are kept, the one not used for longest
gives way, and 4,096 in all: beyond them calls are launched. Nothing is kept or replayed while a
graph is being captured: such calls take the long path.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from dop.ops.switches import is_on

KEEP_TOKENS = 64
"""Tokens of a call that is kept, at most: with more the GPU is slower than the host."""
ENTRIES = (
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuThreadExchangeStreamCaptureMode",
)
"""Of the driver, in the order in which `_launch.c` takes them."""
_WORDS = struct.Struct(f"={len(ENTRIES) + 1}Q")
_NON_BLOCKING = 1


def are_on() -> bool:
    """Whether calls are kept (DOP_GRAPHS)."""
    return is_on("DOP_GRAPHS", "1")


def entries(library: Any) -> tuple[int, ...]:
    """Addresses of ENTRIES; empty if the driver lacks one."""
    if not all(hasattr(library, name) for name in ENTRIES):
        return ()
    found = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in ENTRIES)
    return tuple(address or 0 for address in found)


def recorder(library: Any, addresses: tuple[int, ...]) -> bytes:
    """What `_launch.Call` takes: the entry points, and a stream of the current device to record on,
    which must stay this thread's. Empty if the driver gives no stream.

    Args:
        library: the driver.
        addresses: `entries`; not empty.
    """
    stream = ctypes.c_void_p()
    if library.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING) != 0 or not stream.value:
        return b""
    return _WORDS.pack(*addresses, stream.value)
