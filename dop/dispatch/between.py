"""Buckets between and beyond the measured ones, from times that are interpolated.

A log holds few token counts, e.g. 64, 128 and 2048. What serves 100 or 1000 tokens is decided here,
when the table is built, so that the rule at run time stays as simple as it is: every kernel's time
is taken to be

- between two buckets: linear in the tokens, for batches of one *position*: log(rows per segment)
  over log(tokens), 0 if every row has an adapter of its own, 1 if all share one. At a fixed
  position a batch keeps its character, and both bytes and tiles grow in proportion;
- within a bucket, between its segment lengths: linear in the logarithms of time and position;
- beyond the largest bucket: the line through the two largest ones, up to 8 times the largest.

Only shipped kernels compete. What this gains over taking a neighbouring bucket's rows is measured
by leaving buckets out, see `dop.dispatch.holdout`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from dop.dispatch.cell import Cell

_GRID = sorted({n * m for n in (2, 3) for m in (2**i for i in range(16))} | {1})
"""Token counts where a table may have a bucket: 1, 2, 3, 4, 6, 8, 12, 16, ..."""

BEYOND = (2, 4, 8)
"""Multiples of the largest bucket that get a bucket of their own."""


def virtual_buckets(buckets: Sequence[list[Cell]], chosen: Sequence[str]) -> list[list[Cell]]:
    """Buckets for token counts that were not measured.

    Args:
        buckets: the measured ones, by rising tokens.
        chosen: traces that compete.

    Returns:
        By rising tokens; without those where no trace was measured on both sides.
    """
    found = []
    for lower, upper in itertools.pairwise(buckets):
        low, high = lower[0].tokens, upper[0].tokens
        for tokens in (n for n in _GRID if low < n < high):
            found.append(virtual(lower, upper, tokens, chosen))
    if len(buckets) > 1:
        for factor in BEYOND:
            tokens = factor * buckets[-1][0].tokens
            found.append(virtual(buckets[-2], buckets[-1], tokens, chosen))
    return [bucket for bucket in found if bucket]


def virtual(
    lower: Sequence[Cell], upper: Sequence[Cell], tokens: int, chosen: Iterable[str]
) -> list[Cell]:
    """The bucket of a token count from two measured ones; empty if nothing can be said."""
    low, high = lower[0].tokens, upper[0].tokens
    share = (tokens - low) / (high - low)
    places = sorted({round(position(c), 4) for c in (*lower, *upper) if c.tokens > 1})
    cells = []
    for place in places:
        times: dict[str, float] = {}
        for trace in chosen:
            a, b = _time(lower, trace, place), _time(upper, trace, place)
            if a is not None and b is not None:
                slope = b - a if share <= 1 else max(0.0, b - a)  # beyond, a fall is noise
                times[trace] = b + (share - 1) * slope
        if times:
            rows = float(f"{tokens**place:.6g}")
            cell = Cell(tokens, rows, {f"{rows:.3g} rows per segment": times})
            cell.judge()
            cells.append(cell)
    return cells


def position(cell: Cell) -> float:
    """Where a cell stands between all-distinct (0) and one adapter (1)."""
    return math.log(cell.rows) / math.log(cell.tokens) if cell.tokens > 1 else 0.0


def _time(bucket: Sequence[Cell], trace: str, place: float) -> float | None:
    """Seconds of a trace at a position of a bucket; None if it was not measured there."""
    points = sorted(
        (position(cell), max(times[trace] for times in cell.times.values()))
        for cell in bucket
        if all(trace in times for times in cell.times.values())
    )
    if not points:
        return None
    if place <= points[0][0]:
        return points[0][1]
    for (a, x), (b, y) in itertools.pairwise(points):
        if place <= b:
            share = (place - a) / (b - a)
            return math.exp((1 - share) * math.log(x) + share * math.log(y))
    return points[-1][1]
