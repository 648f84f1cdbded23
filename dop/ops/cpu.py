"""The operator on CPU tensors, by torch: every shape, rank and type, and simple enough to trust.

Sums are taken in float32. Rows of one adapter are taken together; where adapters are small and have
few rows each, all rows together by gathered weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from dop.ops.plan import SegmentPlan
from dop.ops.shapes import three_axes

Rows = slice | Tensor
"""Rows of x and y: a slice where they lie together, else int64 [n]."""

Segment = tuple[int, Rows, int, float]
"""Slot, rows, and the plan's rank and scale of an adapter."""

GATHERED_BYTES = 192 * 1024
"""Weights that are copied and multiplied in the time that torch's calls for one more segment cost:
about 11 us on a core of a Zen 5 (docs/performance.md, experiment 25)."""

CHUNK_BYTES = 512 * 1024
"""Weights that are gathered at once: they stay in the L2 cache, and their memory is not handed back
to the system after every call, which costs more than all the rest."""

CHUNK_SEGMENTS = 2
"""Segments whose calls cost what those of a chunk do."""


@dataclass(frozen=True, slots=True)
class Group:
    """The rows whose adapters have one rank.

    Attributes:
        rank: as planned.
        count: rows.
        rows: all of them, in the batch's order.
        slots: int64 [count].
        scales: float32 [count, 1], or one number that all have.
        segments: the same rows by adapter.
    """

    rank: int
    count: int
    rows: Rows
    slots: Tensor
    scales: Tensor | float
    segments: list[Segment]

    def part(self, begin: int, end: int) -> Group:
        """Some of the rows, without segments; itself if these are all."""
        if begin == 0 and end >= self.count:
            return self
        end, rows, own = min(end, self.count), self.rows, self.scales
        return Group(
            self.rank,
            end - begin,
            rows[begin:end]
            if isinstance(rows, Tensor)
            else slice(rows.start + begin, rows.start + end),
            self.slots[begin:end],
            own[begin:end] if isinstance(own, Tensor) else own,
            [],
        )


def groups(plan: SegmentPlan) -> list[Group]:
    """All rows with an adapter; worked out once per filling of the plan, since layers share it."""
    kept: tuple[int, list[Group]] | None = plan.segments
    if kept is None or kept[0] != plan.version or plan.in_graph:
        kept = plan.segments = plan.version, list(_groups(plan))
    return kept[1]


def segments(plan: SegmentPlan) -> Iterator[Segment]:
    """Every adapter in use."""
    return (segment for group in groups(plan) for segment in group.segments)


def _groups(plan: SegmentPlan) -> Iterator[Group]:
    token_slot = plan.table("token_slot").to(torch.int64)
    order = plan.table("row_index").to(torch.int64)
    used, counts = torch.unique(token_slot[token_slot >= 0], return_counts=True)
    ends = counts.cumsum(0)
    firsts, lasts = order[ends - counts], order[ends - 1]
    scales = plan.table("token_scale")
    facts = (used, ends, firsts, lasts, plan.table("token_rank")[firsts], scales[firsts])
    by_rank: dict[int, list[Segment]] = {}
    begin = 0
    for slot, end, first, last, rank, scale in zip(*(f.tolist() for f in facts), strict=True):
        rows = _together(order[begin:end], first, last)
        by_rank.setdefault(rank, []).append((slot, rows, rank, scale))
        begin = end
    ranks = plan.table("token_rank")
    for rank, parts in by_rank.items():
        rows = ((ranks == rank) & (token_slot >= 0)).nonzero().squeeze(1)
        factors = {factor for *_, factor in parts}
        yield Group(
            rank,
            len(rows),
            _together(rows, int(rows[0]), int(rows[-1])),
            token_slot[rows],
            factors.pop() if len(factors) == 1 else scales[rows].unsqueeze(1),
            parts,
        )


def _together(rows: Tensor, first: int, last: int) -> Rows:
    """Rows in rising order, as a slice if none is missing between the first and the last."""
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _of_slot(value: Tensor | None, slot: int, otherwise: float) -> float:
    return otherwise if value is None else float(value[slot])


def _true_rank(planned: int, slot: int, rank: int, ranks: Tensor | None) -> int:
    """Rank of an adapter in stacks of `rank`: the plan's, or the call's own."""
    return _within(planned if ranks is None else int(ranks[slot]), rank)


def _within(true: int, rank: int) -> int:
    """A true rank, as far as stacks of `rank` have it."""
    return min(max(true, 0), rank)


def shrink(x: Tensor, a: Sequence[Tensor], plan: SegmentPlan, ranks: Tensor | None) -> Tensor:
    """v float32 [slices, tokens, rank]: x @ A.T of each row's adapter, zero elsewhere."""
    slots, rank, width = three_axes(a[0], "a[0]")
    v = torch.zeros(len(a), plan.tokens, rank, dtype=torch.float32, device=x.device)
    for slot, rows, planned, _ in segments(plan):
        true = _true_rank(planned, slot, rank, ranks)
        inputs = _take(x, rows).float()
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
        _add(y, rows, updates, factor)


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
    row_bytes = 4 * rank * (len(a) * x.shape[1] + y.shape[1])
    for group in groups(plan):
        at_once = max(CHUNK_BYTES // row_bytes, 1)
        spared = len(group.segments) - CHUNK_SEGMENTS * -(-group.count // at_once)
        if ranks is None and scales is None and group.count * row_bytes <= spared * GATHERED_BYTES:
            for begin in range(0, group.count, at_once):
                _gathered(y, x, a, b, group.part(begin, begin + at_once), scale)
            continue
        for slot, rows, planned, own in group.segments:
            true = _true_rank(planned, slot, rank, ranks)
            factor = own * _of_slot(scales, slot, 1.0) * scale
            inputs = _take(x, rows).float()
            updates = []
            for down, up in zip(a, b, strict=True):
                weight = down[slot].view(rank, -1)
                v = linear(inputs, (weight if true == rank else weight[:true]).float())
                weight = up[slot].view(-1, rank)
                updates.append(linear(v, (weight if true == rank else weight[:, :true]).float()))
            _add(y, rows, updates, factor)


def _gathered(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], group: Group, scale: float
) -> None:
    """`add_lora` for the rows of a group, by copies of the weights of each row.

    Products and sums, not batched matmuls: those wake all cores even for this little.
    """
    inputs = _take(x, group.rows).float().unsqueeze(1)
    updates = []
    for down, up in zip(a, b, strict=True):
        slots, rank, width = three_axes(down, "a")
        true = _within(group.rank, rank)
        weight = down.reshape(slots, rank, width)[:, :true].index_select(0, group.slots).float()
        v = weight.mul_(inputs).sum(2).unsqueeze(1)
        weight = up.reshape(slots, -1, rank)[..., :true].index_select(0, group.slots).float()
        updates.append(weight.mul_(v).sum(2))
    own = group.scales
    _add(y, group.rows, updates, own * scale)


def _take(rows_of: Tensor, rows: Rows) -> Tensor:
    """The rows; a view of them where they lie together."""
    return rows_of[rows] if isinstance(rows, slice) else rows_of.index_select(0, rows)


def _add(y: Tensor, rows: Rows, updates: list[Tensor], factor: Tensor | float) -> None:
    """y[rows] += factor * updates side by side; factor: of all rows, or [rows, 1]."""
    update = updates[0] if len(updates) == 1 else torch.cat(updates, dim=1)
    if isinstance(factor, Tensor):
        update, factor = update * factor, 1.0
    if y.dtype != torch.float32:
        y[rows] = _take(y, rows).float().add_(update, alpha=factor).to(y.dtype)
    elif isinstance(rows, slice):
        y[rows].add_(update, alpha=factor)
    else:
        y.index_add_(0, rows, update, alpha=factor)
