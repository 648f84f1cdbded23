"""Whether a kernel may read a plan's tables and A while its predecessor still runs.

An *early* kernel (PR dependent_launch 3, lowering/cuda_launch.py) reads the plan's tables and A
before it waits for its predecessor. Launched plainly it is right behind anything. Launched as a
dependent one it is right if a plain launch stands in the stream behind the last write of the tables
and of A: everything behind that launch starts after it, so after those writes are complete, however
many dependent kernels stand in between. So a call launches an early kernel as a dependent one only
if it knows of such a launch:

- Tables. Whatever writes them, `segment_plan` and calls with ranks or scales of their own, ends
  with a plain launch (`plan.fence`), captured or not; the plan is *settled* then. A plan that was
  made by hand is not.
- A. torch counts the changes of a tensor (`_version`, shared by its views). A call that sees
  another count than the last one, or another stream, launches plainly and notes both: that is the
  plain launch for the calls behind it. Inference tensors have no count: plainly, always.
- While a graph is captured, the note of an eager call on any stream will do as well: a graph
  starts when everything before it is complete, and a change that is captured counts too. A note
  made in a capture is good for captures on its stream only, since the launch may never run.

What torch does not count (writes through `.data` or a raw pointer, other libraries' kernels, a
graph's replay, the inside of a compiled function) must not be the last thing in the stream before
a call; docs/operator.md says so. `_launch.c` does the same for short eager calls.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from dop.ops.launch import Block
    from dop.ops.plan import SegmentPlan
    from dop.ops.stacks import Stacks

STREAM_BYTES = 8

seen = {"overlapped": 0, "plain": 0}
"""Calls with early kernels that came through `start`, those of captures above all: what a graph
holds of them is what every replay does."""


def stamp(stream: int, a: Sequence[Tensor]) -> bytes | None:
    """A stream and the counts of changes of stacks; None where torch does not count."""
    if any(tensor.is_inference() for tensor in a):
        return None
    return struct.pack(f"={1 + len(a)}Q", stream, *(tensor._version for tensor in a))


def may_overlap(stacks: Stacks, now: bytes | None, captured: bool) -> bool:
    """Whether a plain launch is known to stand behind the last write of A.

    Args:
        stacks: with the notes of earlier calls.
        now: `stamp` of the call.
        captured: a graph is being captured.
    """
    if now is None:
        return False
    if not captured:
        return now == stacks.settled
    eager = stacks.settled
    return now == stacks.captured or (
        eager is not None and now[STREAM_BYTES:] == eager[STREAM_BYTES:]
    )


def start(
    block: Block,
    stacks: Stacks,
    plan: SegmentPlan,
    captured: bool,
    launch: Callable[[bool], int],
) -> int:
    """Launches a call; where a kernel of it is early, whether that may overlap is found out, and a
    plain launch is noted.

    Args:
        launch: whether early kernels may overlap -> the driver's code.

    Returns:
        The code.
    """
    if not block.early:
        return launch(False)
    now = stamp(block.stream, stacks.a)
    known = may_overlap(stacks, now, captured)
    overlap = known and plan.settled
    seen["overlapped" if overlap else "plain"] += 1
    code = launch(overlap)
    if code == 0 and not known:
        if captured:
            stacks.captured = now
        else:
            stacks.settled = now
    return code
