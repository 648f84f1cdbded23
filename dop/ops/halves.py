"""Shrink and expand on their own, on a GPU: generic kernels that leave v to the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dop.errors import MissingKernelError
from dop.ops import launch, sources
from dop.ops.derived import derived_words
from dop.ops.launch import LOCAL, Block
from dop.ops.plan import SegmentPlan
from dop.ops.shapes import Shape, shape_of, stack_words, three_axes
from dop.ops.sources import Search


def shrink(
    x: Tensor,
    a: Sequence[Tensor],
    plan: SegmentPlan,
    ranks: Tensor | None,
    stream: int,
    capturing: bool,
) -> Tensor:
    """v float32 [slices, tokens, rank] of contiguous, aligned x."""
    _, rank, width = three_axes(a[0], "a[0]")
    shape = shape_of(width, (0,) * len(a), rank, x.dtype, x.get_device())
    v = torch.empty(len(a), plan.tokens, rank, dtype=torch.float32, device=x.device)
    block = _block("shrink_kernel", shape, plan, stream, capturing)
    words = derived_words(plan, block.tile_rows, ranks, None, 1.0)
    addresses = [t.data_ptr() for t in a]
    launch.launch(block, x.data_ptr(), v.data_ptr(), stack_words(addresses, addresses), words)
    return v


def expand(
    y: Tensor,
    v: Tensor,
    b: Sequence[Tensor],
    plan: SegmentPlan,
    facts: tuple[Tensor | None, Tensor | None, float],
    stream: int,
    capturing: bool,
) -> None:
    """y += scale * v @ B.T of contiguous, aligned y and v; facts: ranks, scales, scale."""
    outs = tuple(three_axes(t, "b")[1] for t in b)
    shape = shape_of(0, outs, v.shape[2], y.dtype, y.get_device())
    block = _block("expand_kernel", shape, plan, stream, capturing)
    words = derived_words(plan, block.tile_rows, *facts)
    addresses = [t.data_ptr() for t in b]
    launch.launch(block, v.data_ptr(), y.data_ptr(), stack_words(addresses, addresses), words)


def _block(half: str, shape: Shape, plan: SegmentPlan, stream: int, capturing: bool) -> Block:
    key = (half, shape.number, plan.batch, stream)
    found = None if capturing else LOCAL.blocks.get(key)
    if found is None:
        make: Callable[[Search], Any] | None = sources.optional("dop.ops.generic", half)
        if make is None:
            raise MissingKernelError(
                f"this installation has no {half.replace('_', ' ')}.", "Install dop from a wheel."
            )
        search = Search(shape, plan.tokens, plan.slots, plan.adapters)
        kernel = sources.shared_image(make(search))
        batch = (plan.tokens, plan.slots)
        found = launch.new_block(kernel, shape, batch, stream, capturing=capturing)
        if not capturing:
            launch.remember(key, found)
    return found
