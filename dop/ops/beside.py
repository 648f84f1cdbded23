"""A call in two pieces: shrink on a second stream, beside whatever makes y, expand behind both.

    beside = Beside(torch.cuda.Stream())
    pending = beside.begin(x, a, b, plan)     # x is ready: shrink may start from here on
    y = base_layer(x)
    beside.finish(pending, y)                 # y += ...

Shrink waits for what `begin` found in the stream, not for the base layer, but it is launched behind
it (dop/measure/side_stream.py says why).

Both pieces are launched plainly: their neighbours are not those that tuning saw, and expand may not
ask for y before the kernel that makes it has ended. Works while a CUDA graph is captured (a fork
and a join in it). Where a call is one kernel, or on a CPU, `finish` does all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dop.measure.side_stream import SideStream
from dop.ops import calls, checks, eager
from dop.ops.calls import Call
from dop.ops.derived import derived_words
from dop.ops.eager import Ranks, Scale, Stack
from dop.ops.launch import Block
from dop.ops.plan import SegmentPlan, pause
from dop.ops.shapes import Shape
from dop.ops.stacks import Stacks


@dataclass(frozen=True)
class Pending:
    """A call whose x is ready; it keeps what shrink reads and writes.

    Attributes:
        pieces: launch shrink and expand; None: there are no two pieces.
    """

    x: Tensor
    a: Stack
    b: Stack
    plan: SegmentPlan
    scale: Scale
    ranks: Ranks
    stacks: Stacks
    block: Block | None = None
    pieces: tuple[Call, Call] | None = None
    words: bytes = b""

    @property
    def tuned(self) -> bool:
        """Whether its kernels were tuned for two pieces."""
        return self.block is not None and self.block.kernel.beside


class Beside:
    """A second stream, for calls that one thread makes one after the other.

    Args:
        stream: of the device of the tensors; None: `finish` does everything.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._side = None
        if stream is not None:
            self._side = SideStream(stream, partial(pause, stream.device.index))

    def warm(self, x: Tensor, a: Stack, b: Stack, plan: SegmentPlan) -> None:
        """Loads what a call needs, so that nothing is loaded while a graph is captured; arguments
        and errors as `add_lora`."""
        if self._block(eager.checked_stacks(x, a, b, plan).shape, plan) is not None:
            pause(x.get_device(), eager.stream_of(x.get_device()))

    def _block(self, shape: Shape, plan: SegmentPlan) -> Block | None:
        """The launches of a call; None where nothing runs on a second stream."""
        if self._side is None or plan.tokens == 0 or not eager.on_gpu(shape.device):
            return None
        with eager.device_guard(shape.device):
            block = eager.block_for(shape, plan, beside=True)
            return block if block.is_pair else None

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
        """Shrink may start behind what is in the current stream now; arguments and errors as
        `add_lora`.

        x, the stacks and the plan's tables must stay as they are until `finish`, and a stream has
        one call between its `begin` and its `finish` at a time.
        """
        eager.check_tensors(x=x)
        stacks = eager.checked_stacks(x, a, b, plan)
        shape = stacks.shape
        whole = Pending(x, a, b, plan, scale, ranks, stacks)
        block = self._block(shape, plan)
        if block is None:
            return whole
        facts = eager.call_facts(plan, shape.rank, scale, ranks)
        assert self._side is not None
        with eager.device_guard(shape.device):
            words = derived_words(plan, block.tile_rows, *facts)
            x = eager.dense(x)
            self._side.mark()
        pieces = block.pieces(self._side.number)
        return replace(whole, x=x, block=block, pieces=pieces, words=words)

    def finish(self, pending: Pending, y: Tensor) -> Tensor:
        """y += scale * (x A^T) B^T per row's adapter, in place, in the stream of `begin`; errors as
        `add_lora`."""
        if pending.pieces is None:
            return eager.add_lora(
                y, pending.x, pending.a, pending.b, pending.plan, pending.scale, pending.ranks
            )
        eager.check_tensors(y=y)
        shape = pending.stacks.shape
        checks.check_rows("y", y, pending.plan.tokens, shape.total_out, shape)
        checks.check_no_gradient("add_lora", y)
        shrink, expand = pending.pieces
        words = pending.stacks.words, pending.words
        assert self._side is not None
        with eager.device_guard(shape.device):
            target = eager.dense(y)
            calls.check(self._side.run(partial(shrink.run, pending.x.data_ptr(), 0, *words)))
            calls.check(expand.run(0, target.data_ptr(), *words))
            if target is not y:
                y.copy_(target)
        return y
