"""The operator on CPU tensors, by torch: every shape, rank and type, and simple enough to trust.

Sums are taken in float32. Rows of one adapter are taken together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dop.ops.plan import SegmentPlan
from dop.ops.shapes import three_axes

Segment = tuple[int, Tensor, int, float]
"""Slot, int64 rows, and the plan's rank and scale of an adapter."""


def segments(plan: SegmentPlan) -> list[Segment]:
    """Every adapter in use; worked out once per filling of the plan, since layers share it."""
    kept: tuple[int, list[Segment]] | None = plan.segments
    if kept is None or kept[0] != plan.version or plan.in_graph:
        kept = plan.segments = plan.version, list(_segments(plan))
    return kept[1]


def _segments(plan: SegmentPlan) -> Iterator[Segment]:
    order = plan.table("row_index").to(torch.int64)
    ranks, scales = plan.table("token_rank"), plan.table("token_scale")
    slots, counts = torch.unique(plan.table("token_slot"), return_counts=True)
    begin = 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            rows = order[begin : begin + count]
            yield slot, rows, int(ranks[rows[0]]), float(scales[rows[0]])
            begin += count


def _of_slot(value: Tensor | None, slot: int, otherwise: float) -> float:
    return otherwise if value is None else float(value[slot])


def _true_rank(planned: int, slot: int, rank: int, ranks: Tensor | None) -> int:
    """Rank of an adapter in stacks of `rank`."""
    return min(max(planned if ranks is None else int(ranks[slot]), 0), rank)


def shrink(x: Tensor, a: Sequence[Tensor], plan: SegmentPlan, ranks: Tensor | None) -> Tensor:
    """v float32 [slices, tokens, rank]: x @ A.T of each row's adapter, zero elsewhere."""
    slots, rank, width = three_axes(a[0], "a[0]")
    v = torch.zeros(len(a), plan.tokens, rank, dtype=torch.float32, device=x.device)
    for slot, rows, planned, _ in segments(plan):
        true = _true_rank(planned, slot, rank, ranks)
        inputs = x[rows].float()
        for s, stack in enumerate(a):
            weight = stack.reshape(slots, rank, width)[slot, :true].float()
            v[s, rows, :true] = inputs @ weight.T
    return v


def expand(
    y: Tensor,
    v: Tensor,
    b: Sequence[Tensor],
    plan: SegmentPlan,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    """y[rows] += scale * v @ B.T of each row's adapter, in place."""
    sizes = [three_axes(stack, f"b[{s}]") for s, stack in enumerate(b)]
    slots, _, rank = sizes[0]
    for slot, rows, planned, own in segments(plan):
        true = _true_rank(planned, slot, rank, ranks)
        factor = own * _of_slot(scales, slot, 1.0) * scale
        updates = []
        for s, stack in enumerate(b):
            weight = stack.reshape(slots, sizes[s][1], rank)[slot, :, :true].float()
            updates.append(v[s, rows, :true].float() @ weight.T)
        total = y[rows].float() + factor * torch.cat(updates, dim=1)
        y[rows] = total.to(y.dtype)


def add_lora(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    plan: SegmentPlan,
    ranks: Tensor | None,
    scales: Tensor | None,
    scale: float,
) -> None:
    """y += scale * (x @ A.T) @ B.T for every row with an adapter, in place."""
    rank = three_axes(a[0], "a[0]")[1]
    for slot, rows, planned, own in segments(plan):
        true = _true_rank(planned, slot, rank, ranks)
        factor = own * _of_slot(scales, slot, 1.0) * scale
        inputs = x[rows].float()
        updates = []
        for down, up in zip(a, b, strict=True):
            v = inputs @ down[slot].view(rank, -1)[:true].float().T
            updates.append(v @ up[slot].view(-1, rank)[:, :true].float().T)
        update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=1)
        y[rows] = y[rows].float().add_(update, alpha=factor).to(y.dtype)
