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

A graph serves batches that are not known when it is captured. If the plan has `parts` and the batch
is not small, rows of adapters with few and with many of them get a kernel each, whose tables name
only those; a kernel without rows ends at once, and the two expands run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dop.measure import cuda_driver
from dop.measure.side_stream import SideStream
from dop.ops import checks, eager
from dop.ops.calls import Call
from dop.ops.derived import derived_words
from dop.ops.eager import Ranks, Scale, Stack
from dop.ops.launch import Block
from dop.ops.plan import SegmentPlan, pause
from dop.ops.shapes import Shape
from dop.ops.stacks import Stacks
from dop.scenario import ONE_KERNEL_TOKENS


@dataclass(frozen=True)
class Half:
    """The launches of a plan, or of one of its parts.

    Attributes:
        block, plan: keep workspace and tables.
        shrink, expand: launch them; the second stream's, unless expand is the last of a call.
        words: the tables.
    """

    block: Block
    plan: SegmentPlan
    shrink: Call
    expand: Call
    words: bytes


@dataclass(frozen=True)
class Pending:
    """A call whose x is ready; it keeps what shrink reads and writes.

    Attributes:
        halves: one, or those of the plan's parts; none: there are no two pieces.
    """

    x: Tensor
    a: Stack
    b: Stack
    plan: SegmentPlan
    scale: Scale
    ranks: Ranks
    stacks: Stacks
    halves: tuple[Half, ...] = ()

    @property
    def tuned(self) -> bool:
        """Whether its kernels were tuned for two pieces."""
        return bool(self.halves) and all(half.block.kernel.beside for half in self.halves)


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
        if self._blocks(eager.checked_stacks(x, a, b, plan).shape, plan) and self._side is not None:
            pause(x.get_device(), eager.stream_of(x.get_device()))

    def _blocks(self, shape: Shape, plan: SegmentPlan) -> list[tuple[Block, SegmentPlan]]:
        """The launches of a call, and the plans that they read; none where nothing runs on a
        second stream."""
        if self._side is None or plan.tokens == 0 or not eager.on_gpu(shape.device):
            return []
        with eager.device_guard(shape.device):
            if plan.parts is not None and plan.tokens > ONE_KERNEL_TOKENS:
                few, many = eager.part_blocks(shape, plan)
                tuned = few.kernel.beside and many.kernel.beside
                if tuned and few.is_pair and many.is_pair and few.kernel is not many.kernel:
                    return list(zip((few, many), plan.parts(), strict=True))
            block = eager.block_for(shape, plan, beside=True)
            return [(block, plan)] if block.is_pair else []

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
        blocks = self._blocks(shape, plan)
        if not blocks:
            return whole
        facts = eager.call_facts(plan, shape.rank, scale, ranks)
        assert self._side is not None
        side, halves = self._side.number, []
        with eager.device_guard(shape.device):
            for block, part in blocks:
                words = derived_words(part, block.tile_rows, *facts)
                last = None if part is blocks[-1][1] else side
                halves.append(Half(block, part, *block.pieces(side, last), words))
            x = eager.dense(x)
            self._side.mark()
        return replace(whole, x=x, halves=tuple(halves))

    def finish(self, pending: Pending, y: Tensor) -> Tensor:
        """y += scale * (x A^T) B^T per row's adapter, in place, in the stream of `begin`; errors as
        `add_lora`."""
        if not pending.halves:
            return eager.add_lora(
                y, pending.x, pending.a, pending.b, pending.plan, pending.scale, pending.ranks
            )
        eager.check_tensors(y=y)
        shape = pending.stacks.shape
        checks.check_rows("y", y, pending.plan.tokens, shape.total_out, shape)
        checks.check_no_gradient("add_lora", y)
        assert self._side is not None
        with eager.device_guard(shape.device):
            target = eager.dense(y)

            def run(call: Call, half: Half, x: int, y: int) -> None:
                code = call.run(x, y, pending.stacks.words, half.words)
                cuda_driver.check("cuLaunchKernelEx", code)

            def shrink(half: Half) -> None:
                run(half.shrink, half, pending.x.data_ptr(), 0)

            def expand(half: Half) -> None:
                run(half.expand, half, 0, target.data_ptr())

            *first, last = pending.halves
            # Without rows, few tiles pass sooner than all tokens one by one.
            self._side.run(partial(shrink, last))
            if first:
                (few,) = first
                with self._side.also(partial(shrink, few), partial(expand, few)):
                    expand(last)
            else:
                expand(last)
            if target is not y:
                y.copy_(target)
        return y
