"""The operator on CPU tensors, by torch: every shape, rank and type, and simple enough to trust.

Sums are taken in float32. Rows of one adapter are taken together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dop.ops.checks import three_axes
from dop.ops.plan import SegmentPlan


def segments(plan: SegmentPlan) -> Iterator[tuple[int, Tensor]]:
    """(slot, int64 rows) of every adapter in use."""
    rows = plan.table("row_index").to(torch.int64)
    slots, counts = torch.unique(plan.table("token_slot"), return_counts=True)
    begin = 0
    for slot, count in zip(slots.tolist(), counts.tolist(), strict=True):
        if slot >= 0:
            yield slot, rows[begin : begin + count]
            begin += count


def _of_slot(value: Tensor | None, slot: int, otherwise: float) -> float:
    return otherwise if value is None else float(value[slot])


def _facts(
    plan: SegmentPlan, slot: int, row: Tensor, rank: int, ranks: Tensor | None
) -> tuple[int, float]:
    """True rank and the plan's scale of an adapter."""
    planned = int(plan.table("token_rank")[row])
    true = planned if ranks is None else int(ranks[slot])
    return min(max(true, 0), rank), float(plan.table("token_scale")[row])


def shrink(x: Tensor, a: Sequence[Tensor], plan: SegmentPlan, ranks: Tensor | None) -> Tensor:
    """v float32 [slices, tokens, rank]: x @ A.T of each row's adapter, zero elsewhere."""
    slots, rank, width = three_axes(a[0], "a[0]")
    v = torch.zeros(len(a), plan.tokens, rank, dtype=torch.float32, device=x.device)
    for slot, rows in segments(plan):
        true, _ = _facts(plan, slot, rows[0], rank, ranks)
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
    for slot, rows in segments(plan):
        true, planned = _facts(plan, slot, rows[0], rank, ranks)
        factor = planned * _of_slot(scales, slot, 1.0) * scale
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
    expand(y, shrink(x, a, plan, ranks), b, plan, ranks, scales, scale)
