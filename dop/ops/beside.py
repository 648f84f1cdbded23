"""A call in two pieces: shrink on a second stream, beside whatever makes y, expand behind both.

    beside = Beside(torch.cuda.Stream())
    pending = beside.begin(x, a, b, plan)     # shrink starts
    y = base_layer(x)                         # meanwhile
    beside.finish(pending, y)                 # y += ...

Both pieces are launched plainly: their neighbours are not those that tuning saw, and expand may not
ask for y before the kernel that makes it has ended. Works while a CUDA graph is captured (a fork
and a join in it). Where a call is one kernel, or on a CPU, `finish` does all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dop.measure import cuda_driver
from dop.ops import checks, eager
from dop.ops.calls import Call
from dop.ops.derived import derived_words
from dop.ops.eager import Ranks, Scale, Stack
from dop.ops.launch import Block
from dop.ops.plan import SegmentPlan
from dop.ops.stacks import Stacks


def _new_event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _current_stream() -> torch.cuda.Stream:
    return torch.cuda.current_stream()


@dataclass(frozen=True)
class Pending:
    """A call whose shrink was started; it keeps what that reads and writes.

    Attributes:
        last: launches expand; None: nothing was started.
    """

    x: Tensor
    a: Stack
    b: Stack
    plan: SegmentPlan
    scale: Scale
    ranks: Ranks
    stacks: Stacks
    block: Block | None = None
    last: Call | None = None
    words: bytes = b""


class Beside:
    """A second stream, for calls that one thread makes one after the other.

    Args:
        stream: of the device of the tensors; None: `finish` does everything.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        if stream is not None:
            self._forked, self._joined = _new_event(), _new_event()

    def begin(
        self,
        x: Tensor,
        a: Stack,
        b: Stack,
        plan: SegmentPlan,
        *,
        scale: Scale = 1.0,
        ranks: Ranks = None,
    ) -> Pending:
        """Start shrink behind everything in the current stream; arguments and errors as `add_lora`.

        x, the stacks and the plan's tables must stay as they are until `finish`.
        """
        eager.check_tensors(x=x)
        stacks = eager.checked_stacks(x, a, b, plan)
        shape = stacks.shape
        whole = Pending(x, a, b, plan, scale, ranks, stacks)
        if self._stream is None or plan.tokens == 0 or not eager.on_gpu(shape.device):
            return whole
        facts = eager.call_facts(plan, shape.rank, scale, ranks)
        with eager.device_guard(shape.device):
            block = eager.block_for(shape, plan)
            if not block.is_pair:
                return whole
            words = derived_words(plan, block.tile_rows, *facts)
            x = eager.dense(x)
            first, last = block.pieces(self._stream.cuda_stream)
            self._forked.record(_current_stream())
            self._stream.wait_event(self._forked)
            code = first.run(x.data_ptr(), 0, stacks.words, words)
            cuda_driver.check("cuLaunchKernelEx", code)
            self._joined.record(self._stream)
        return replace(whole, x=x, block=block, last=last, words=words)

    def finish(self, pending: Pending, y: Tensor) -> Tensor:
        """y += scale * (x A^T) B^T per row's adapter, in place, in the stream of `begin`; errors as
        `add_lora`."""
        if pending.last is None:
            return eager.add_lora(
                y, pending.x, pending.a, pending.b, pending.plan, pending.scale, pending.ranks
            )
        eager.check_tensors(y=y)
        stacks, plan = pending.stacks, pending.plan
        with eager.device_guard(stacks.shape.device):
            # Joined whatever comes next: a capture that is left unjoined cannot end.
            _current_stream().wait_event(self._joined)
            checks.check_rows("y", y, plan.tokens, stacks.shape.total_out, stacks.shape)
            checks.check_no_gradient("add_lora", y)
            target = eager.dense(y)
            code = pending.last.run(0, target.data_ptr(), stacks.words, pending.words)
            cuda_driver.check("cuLaunchKernelEx", code)
            if target is not y:
                y.copy_(target)
        return y
