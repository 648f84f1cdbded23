"""From a log's records to a dispatch table with few kernels.

Shipping the winner of every scenario would ship dozens of kernels that differ by a percent. So the
smallest set is sought whose best member loses at most `max_regret` in every scenario: greedy set
cover, which takes again and again the kernel that serves most of the batches not served yet.
Source: Chvatal, A greedy heuristic for the set-covering problem (1979).

Scenarios that a dispatcher cannot tell apart (same tokens, mean segment lengths within a factor of
1.4) form one *cell* and get one kernel, judged by its worst regret among them.

A bucket is one more cell: the batch of which nothing but the padded token count is known, as when
a CUDA graph is captured. Its kernel is judged by its time over all of the bucket's cells together,
each as likely as the others, and has to come within `max_regret` of the smallest sum that any
kernel of the log has. (Its worst regret and the geometric mean were tried before,
docs/dispatch.md.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from dop.database.query import problems_of, ranked
from dop.database.wire import Entry
from dop.dispatch.between import virtual_buckets
from dop.dispatch.cell import (
    Cell,
    bucketed,
    cells_of,
    mean_cost,
    rows_per_segment,
    unknown_cell,
)
from dop.dispatch.table import UNKNOWN_ROWS, Bound, Fit, Row, Table, WorkloadTable, halfway
from dop.errors import ExportError
from dop.scenario import Scenario

MAX_REGRET = 0.05
"""Largest loss against the log's best in any scenario, by default."""


@dataclass(frozen=True, slots=True)
class Built:
    """A table and the records behind it.

    Attributes:
        table: the decisions.
        entries: for (workload key, trace key) in use, the entry whose record holds the trace.
        fastest: likewise, of the fastest of each batch (`Fit.best_trace_key`); not checked.
    """

    table: Table
    entries: Mapping[tuple[str, str], Entry]
    fastest: Mapping[tuple[str, str], Entry] = field(default_factory=dict)


def build_table(
    entries: Iterable[Entry],
    *,
    device: str,
    target_key: str,
    max_regret: float = MAX_REGRET,
    given: Mapping[str, Sequence[str]] | None = None,
) -> Built:
    """Table of one device's records.

    Args:
        entries: of a log; those of other devices or targets are passed over.
        device: `Target.device_name`.
        target_key: `Target.key`.
        max_regret: see the module; 0 ships every winner.
        given: traces by workload key that are shipped in any case: others join them only where
            none of them serves.

    Raises:
        ExportError: no record of the device may be best.
    """
    mine = (e for e in entries if e.device_name == device and e.target_key == target_key)
    by_workload: dict[str, list[list[Entry]]] = {}
    for found in ranked(mine).values():
        by_workload.setdefault(found[0].workload_key, []).append(found)
    workloads: dict[str, WorkloadTable] = {}
    used: dict[tuple[str, str], Entry] = {}
    fastest: dict[tuple[str, str], Entry] = {}
    for key, tasks in sorted(by_workload.items()):
        chosen = _without_broken(key, tasks, max_regret, (given or {}).get(key, ()))
        if chosen is not None:
            workloads[key], kept = chosen
            used |= {(key, trace): kept[trace] for trace in workloads[key].trace_keys}
            wanted = {fit.best_trace_key for fit in workloads[key].fits}
            fastest |= {(key, trace): kept[trace] for trace in kept if trace in wanted}
    if not workloads:
        raise ExportError(
            f"no usable record of {device} is in the log.",
            "Run dop tune on it, or see dop log stats for what failed.",
        )
    return Built(Table(device, target_key, workloads), used, fastest)


def _without_broken(
    key: str, tasks: list[list[Entry]], max_regret: float, given: Sequence[str]
) -> tuple[WorkloadTable, dict[str, Entry]] | None:
    """The workload's table, and an entry of every trace; a trace that turns out to be unreadable is
    banned and all begins anew, so that only the chosen ones are ever parsed."""
    banned: set[str] = set()
    while True:
        left = [[e for e in found if e.trace_key not in banned] for found in tasks]
        left = [found for found in left if found]
        if not left:
            return None
        table = _workload_table(key, left, max_regret, [t for t in given if t not in banned])
        if table is None:
            return None
        kept = {e.trace_key: e for found in left for e in found}
        broken = {trace for trace in table.trace_keys if problems_of(kept[trace])}
        if not broken:
            return table, kept
        banned |= broken


def _workload_table(
    key: str, tasks: list[list[Entry]], max_regret: float, given: Sequence[str]
) -> WorkloadTable | None:
    cells = cells_of(tasks)
    if not cells:
        return None
    buckets = bucketed(cells)
    unknown = [cell for b in buckets if (cell := unknown_cell(b, max_regret)) is not None]
    chosen = cover([*cells, *unknown], max_regret, given)
    virtual = virtual_buckets(buckets, chosen)
    measured = {b[0].tokens: rows_of(b, chosen) for b in buckets}
    between = {b[0].tokens: rows_of(b, chosen) for b in virtual}
    bounds = {b[0].tokens: bounds_of(b, chosen) for b in (*buckets, *virtual)}
    rows = _without_repeats(measured, between, bounds)
    table = WorkloadTable(key, tuple(rows))
    fits = tuple(_fits(table, cells, tasks))
    left = tuple(dict.fromkeys(row.tokens for row in rows if row.tokens in between))
    kept = tuple(bound for n in dict.fromkeys(row.tokens for row in rows) for bound in bounds[n])
    return WorkloadTable(key, table.rows, fits, left, kept)


def _without_repeats(
    measured: Mapping[int, list[Row]],
    between: Mapping[int, list[Row]],
    bounds: Mapping[int, list[Bound]],
) -> list[Row]:
    """Rows by tokens, without those buckets between that only repeat the kernel which the next
    larger bucket (or, beyond the largest, the next smaller one) gives to every batch."""
    found = {**measured, **between}
    order = sorted(found)
    top = max(measured)
    kept = dict.fromkeys(n for n in order if n in measured)

    def only(tokens: int) -> set[str]:
        keys = {row.trace_key for row in found[tokens]}
        return keys | {bound.trace_key for bound in bounds[tokens]}

    beyond = [n for n in order if n > top]
    while beyond and len(only(beyond[-1])) == 1 and only(beyond[-1]) == only([top, *beyond][-2]):
        beyond.pop()
    following = top
    for tokens in reversed([n for n in order if n < top]):
        if tokens in measured or len(only(tokens)) > 1 or only(tokens) != only(following):
            kept[tokens] = None
            following = tokens
    return [row for n in sorted({*kept, *beyond}) for row in found[n]]


def rows_of(bucket: list[Cell], chosen: list[str]) -> list[Row]:
    """The table's rows for a bucket, from the chosen traces."""
    return [_for_unknown(bucket, chosen), *_bucket_rows(bucket, chosen)]


def bounds_of(bucket: list[Cell], chosen: list[str]) -> list[Bound]:
    """What serves batches of unknown segments of at least some rows: for every segment length but
    the shortest, which is what the row of an unknown hint is for."""
    found = []
    for i in range(1, len(bucket)):
        row = _for_unknown(bucket[i:], chosen)
        rows_from = halfway(bucket[i - 1].rows, bucket[i].rows)
        found.append(Bound(row.tokens, rows_from, row.trace_key, row.worst, row.worst_scenario))
    return found


def cover(cells: list[Cell], max_regret: float, given: Sequence[str] = ()) -> list[str]:
    """Few traces of which one serves each cell within its limit: those given, then others in the
    order of their choice."""
    serves: dict[str, set[int]] = {}
    for i, cell in enumerate(cells):
        limit = cell.limit(max_regret)
        for trace, cost in cell.costs.items():
            if cost <= limit:
                serves.setdefault(trace, set()).add(i)
    chosen = list(given)
    left = set(range(len(cells))).difference(*(serves.get(trace, ()) for trace in chosen))
    while left:
        best = min(serves, key=partial(_gain, cells, serves, frozenset(left)))
        chosen.append(best)
        left -= serves[best]
    return chosen


def _gain(
    cells: list[Cell], serves: Mapping[str, set[int]], left: frozenset[int], trace: str
) -> tuple[int, float, str]:
    """Sort key: most new cells first, then the smallest mean loss in them, then the name."""
    new = serves[trace] & left
    loss = math.fsum(math.log(cells[i].costs[trace]) for i in new)
    return -len(new), loss / max(1, len(new)), trace


def _pick(cell: Cell, chosen: Iterable[str]) -> str:
    """The fastest of the chosen traces in a cell; ties go to the one chosen first."""
    return min(chosen, key=lambda trace: cell.costs.get(trace, math.inf))


def _for_unknown(bucket: list[Cell], chosen: list[str]) -> Row:
    """The row with the chosen trace that has the smallest mean cost over a bucket."""

    def costs(trace: str) -> list[float]:
        return [cell.costs.get(trace, math.inf) for cell in bucket]

    trace = min(chosen, key=lambda t: (mean_cost(t, bucket), max(costs(t))))
    worst = max(costs(trace))
    if worst == math.inf:  # measured under none of them all: what most of the bucket takes
        picks = [_pick(cell, chosen) for cell in bucket]
        return Row(bucket[0].tokens, UNKNOWN_ROWS, max(picks, key=picks.count))
    cell = max(bucket, key=lambda c: c.costs[trace])
    ratios = {s: t[trace] / min(t.values()) for s, t in cell.times.items() if trace in t}
    scenario = max(ratios, key=lambda s: ratios[s])
    return Row(bucket[0].tokens, UNKNOWN_ROWS, trace, worst - 1, scenario)


def _bucket_rows(bucket: list[Cell], chosen: list[str]) -> list[Row]:
    """One row per run of neighbouring cells with the same kernel."""
    rows: list[Row] = []
    for i, cell in enumerate(bucket):
        last = i == len(bucket) - 1
        upto = math.inf if last else halfway(cell.rows, bucket[i + 1].rows)
        row = Row(cell.tokens, upto, _pick(cell, chosen))
        if rows and rows[-1].trace_key == row.trace_key:
            rows.pop()
        rows.append(row)
    return rows


def _fits(table: WorkloadTable, cells: list[Cell], tasks: list[list[Entry]]) -> Iterable[Fit]:
    floors = {found[0].scenario_key: found[0].floor_s for found in tasks}
    for cell in cells:
        for scenario, times in cell.times.items():
            rows = rows_per_segment(Scenario.parse(scenario))
            trace = table.choose_by_rows(cell.tokens, rows)
            best = min(times, key=lambda t: times[t])
            seconds = times.get(trace)
            others = {t: times[t] for t in table.trace_keys if t != trace and t in times}
            yield Fit(scenario, trace, seconds, best, times[best], floors.get(scenario), others)
