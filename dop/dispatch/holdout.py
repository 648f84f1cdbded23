"""What a table's rule loses on token counts that nobody measured: measured ones, left out in turn.

For every token count of the log its rows are taken away, and its batches are served from what is
left: by rows from interpolated times (the rule, see `dop.dispatch.between`), or, to compare, by the
rows of the next larger or the next smaller bucket. The kernels stay the same, so what is judged is
the choice between buckets, and nothing else. Gaps are twice as wide as in the table itself. The
largest bucket, taken away, tells what is lost beyond the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dop.database.query import ranked
from dop.database.wire import Entry
from dop.dispatch.between import virtual
from dop.dispatch.cell import Cell, bucketed, cells_of
from dop.dispatch.cover import rows_of
from dop.dispatch.table import UNKNOWN_ROWS, WorkloadTable


@dataclass(frozen=True, slots=True)
class Loss:
    """Regret over batches that were served by another bucket's rows.

    Attributes:
        rule: one of RULES.
        batches: that were judged.
        mean: mean regret (0.05 is 5 %), geometric.
        worst: largest regret.
        where: the batch that has it.
    """

    rule: str
    batches: int
    mean: float
    worst: float
    where: str


RULES = ("interpolated", "next larger bucket", "next smaller bucket")
RULES_BEYOND = ("beyond: extrapolated", "beyond: largest bucket")


def holdout(tables: Iterable[WorkloadTable], entries: Iterable[Entry]) -> list[Loss]:
    """The losses of the rule and of its alternative, over all tables together.

    Args:
        tables: to judge.
        entries: of the device that the tables are for.
    """
    tasks: dict[str, list[list[Entry]]] = {}
    for found in ranked(entries).values():
        tasks.setdefault(found[0].workload_key, []).append(found)
    seen: dict[str, list[tuple[float, str]]] = {rule: [] for rule in (*RULES, *RULES_BEYOND)}
    for table in tables:
        buckets = bucketed(cells_of(tasks.get(table.workload_key, [])))
        chosen = list(table.trace_keys)
        for i, bucket in enumerate(buckets[1:], 1):
            last = i + 1 == len(buckets)
            if last and i < 2:
                continue
            low, high = (
                (buckets[i - 2], buckets[i - 1]) if last else (buckets[i - 1], buckets[i + 1])
            )
            between = virtual(low, high, bucket[0].tokens, chosen)
            rivals = (between, high) if last else (between, high, low)
            for rule, rows in zip(RULES_BEYOND if last else RULES, rivals, strict=True):
                if rows:
                    seen[rule] += _regrets(bucket, rows, chosen)
    return [_loss(rule, found) for rule, found in seen.items() if found]


def _regrets(
    bucket: Sequence[Cell], other: list[Cell], chosen: list[str]
) -> list[tuple[float, str]]:
    """Regret of each batch of a bucket when another bucket's rows serve it."""
    rows = [row for row in rows_of(other, chosen) if row.rows_upto != UNKNOWN_ROWS]
    found = []
    for cell in bucket:
        trace = next(row.trace_key for row in rows if cell.rows <= row.rows_upto)
        for scenario, times in cell.times.items():
            if trace in times:
                loss = times[trace] / min(times.values()) - 1
                found.append((loss, scenario))
    return found


def _loss(rule: str, found: list[tuple[float, str]]) -> Loss:
    worst, where = max(found)
    mean = math.exp(math.fsum(math.log1p(loss) for loss, _ in found) / len(found)) - 1
    return Loss(rule, len(found), mean, worst, where)


def lines(losses: Iterable[Loss]) -> list[str]:
    """For people: one line per rule; none if there were too few token counts to leave one out."""
    found = list(losses)
    if not found:
        return []
    return [
        "Every measured token count left out in turn; its batches, served from what is left, lose:",
        *(
            f"  {loss.rule:<22}  mean {loss.mean:5.1%}, worst {loss.worst:5.1%} "
            f"({loss.where}), {loss.batches} batches"
            for loss in found
        ),
    ]
