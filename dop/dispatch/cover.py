"""From a log's records to a dispatch table with few kernels.

Shipping the winner of every scenario would ship dozens of kernels that differ by a percent. So the
smallest set is sought whose best member loses at most `max_regret` in every scenario: greedy set
cover, which takes again and again the kernel that serves most of the batches not served yet.
Source: Chvatal, A greedy heuristic for the set-covering problem (1979).

Scenarios that a dispatcher cannot tell apart (same tokens, same mean segment length) form one
*cell* and get one kernel, judged by its worst regret among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from dop.database.query import problems_of, ranked
from dop.database.wire import Entry
from dop.dispatch.table import UNKNOWN_ROWS, Fit, Row, Table, WorkloadTable, halfway
from dop.errors import ConfigError, ExportError
from dop.scenario import Scenario

MAX_REGRET = 0.05
"""Largest loss against the log's best in any scenario, by default."""


@dataclass(frozen=True, slots=True)
class Built:
    """A table and the records behind it.

    Attributes:
        table: the decisions.
        entries: for (workload key, trace key) in use, the entry whose record holds the trace.
    """

    table: Table
    entries: Mapping[tuple[str, str], Entry]


def build_table(
    entries: Iterable[Entry], *, device: str, target_key: str, max_regret: float = MAX_REGRET
) -> Built:
    """Table of one device's records.

    Args:
        entries: of a log; those of other devices or targets are passed over.
        device: `Target.device_name`.
        target_key: `Target.key`.
        max_regret: see the module; 0 ships every winner.

    Raises:
        ExportError: no record of the device may be best.
    """
    mine = (e for e in entries if e.device_name == device and e.target_key == target_key)
    by_workload: dict[str, list[list[Entry]]] = {}
    for found in ranked(mine).values():
        by_workload.setdefault(found[0].workload_key, []).append(found)
    workloads: dict[str, WorkloadTable] = {}
    used: dict[tuple[str, str], Entry] = {}
    for key, tasks in sorted(by_workload.items()):
        chosen = _without_broken(key, tasks, max_regret)
        if chosen is not None:
            workloads[key], kept = chosen
            used |= {(key, trace): entry for trace, entry in kept.items()}
    if not workloads:
        raise ExportError(
            f"no usable record of {device} is in the log.",
            "Run dop tune on it, or see dop log stats for what failed.",
        )
    return Built(Table(device, target_key, workloads), used)


@dataclass(slots=True)
class _Cell:
    """Scenarios of one token count and one mean segment length.

    Attributes:
        times: seconds by trace key, per scenario key.
    """

    tokens: int
    rows: float
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def judge(self) -> None:
        """Worst ratio to the best over the scenarios, for traces measured under all of them; if
        there is no such trace, over the scenarios that a trace was measured under."""
        best = {s: min(times.values()) for s, times in self.times.items()}
        everywhere = set.intersection(*(set(times) for times in self.times.values()))
        anywhere = {trace for times in self.times.values() for trace in times}
        for trace in sorted(everywhere or anywhere):
            ratios = [t[trace] / best[s] for s, t in self.times.items() if trace in t]
            self.costs[trace] = max(ratios)

    def limit(self, max_regret: float) -> float:
        """Largest cost that serves this cell."""
        return max(1 + max_regret, min(self.costs.values()))


def _without_broken(
    key: str, tasks: list[list[Entry]], max_regret: float
) -> tuple[WorkloadTable, dict[str, Entry]] | None:
    """The workload's table; a trace that turns out to be unreadable is banned and all begins
    anew, so that only the chosen ones are ever parsed."""
    banned: set[str] = set()
    while True:
        left = [[e for e in found if e.trace_key not in banned] for found in tasks]
        left = [found for found in left if found]
        if not left:
            return None
        table = _workload_table(key, left, max_regret)
        if table is None:
            return None
        kept = {e.trace_key: e for found in left for e in found}
        in_use = {trace: kept[trace] for trace in table.trace_keys}
        broken = {trace for trace, entry in in_use.items() if problems_of(entry)}
        if not broken:
            return table, in_use
        banned |= broken


def _workload_table(key: str, tasks: list[list[Entry]], max_regret: float) -> WorkloadTable | None:
    cells = _cells(tasks)
    if not cells:
        return None
    chosen = cover(cells, max_regret)
    rows: list[Row] = []
    for tokens in sorted({cell.tokens for cell in cells}):
        bucket = sorted((c for c in cells if c.tokens == tokens), key=lambda c: c.rows)
        rows.append(Row(tokens, UNKNOWN_ROWS, _for_unknown(bucket, chosen)))
        rows += _bucket_rows(bucket, chosen)
    table = WorkloadTable(key, tuple(rows))
    return WorkloadTable(key, table.rows, tuple(_fits(table, cells, tasks)))


def _cells(tasks: list[list[Entry]]) -> list[_Cell]:
    cells: dict[tuple[int, float], _Cell] = {}
    for found in tasks:
        try:
            scenario = Scenario.parse(found[0].scenario_key)
        except (ConfigError, ValueError, OverflowError):
            continue  # a record of it cannot be best (query.problems_of names it)
        rows = _rows(scenario)
        cell = cells.setdefault((scenario.tokens, rows), _Cell(scenario.tokens, rows))
        cell.times[scenario.key] = {e.trace_key: e.median_s for e in found}
    for cell in cells.values():
        cell.judge()
    return [cells[key] for key in sorted(cells)]


def _rows(scenario: Scenario) -> float:
    """What a caller can say beforehand: tokens over adapters."""
    return scenario.tokens / max(1, scenario.adapters)


def cover(cells: list[_Cell], max_regret: float) -> list[str]:
    """Few traces of which one serves each cell within its limit, in the order of their choice."""
    serves: dict[str, set[int]] = {}
    for i, cell in enumerate(cells):
        limit = cell.limit(max_regret)
        for trace, cost in cell.costs.items():
            if cost <= limit:
                serves.setdefault(trace, set()).add(i)
    left = set(range(len(cells)))
    chosen: list[str] = []
    while left:
        best = min(serves, key=partial(_gain, cells, serves, frozenset(left)))
        chosen.append(best)
        left -= serves[best]
    return chosen


def _gain(
    cells: list[_Cell], serves: Mapping[str, set[int]], left: frozenset[int], trace: str
) -> tuple[int, float, str]:
    """Sort key: most new cells first, then the smallest mean loss in them, then the name."""
    new = serves[trace] & left
    loss = math.fsum(math.log(cells[i].costs[trace]) for i in new)
    return -len(new), loss / max(1, len(new)), trace


def _pick(cell: _Cell, chosen: Iterable[str]) -> str:
    """The fastest of the chosen traces in a cell; ties go to the one chosen first."""
    return min(chosen, key=lambda trace: cell.costs.get(trace, math.inf))


def _for_unknown(bucket: list[_Cell], chosen: list[str]) -> str:
    """The chosen trace with the smallest worst cost over a bucket."""

    def worst(trace: str) -> tuple[float, float]:
        costs = [cell.costs.get(trace, math.inf) for cell in bucket]
        return max(costs), math.fsum(costs)

    return min((_pick(cell, chosen) for cell in bucket), key=worst)


def _bucket_rows(bucket: list[_Cell], chosen: list[str]) -> list[Row]:
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


def _fits(table: WorkloadTable, cells: list[_Cell], tasks: list[list[Entry]]) -> Iterable[Fit]:
    floors = {found[0].scenario_key: found[0].floor_s for found in tasks}
    for cell in cells:
        trace = table.choose_by_rows(cell.tokens, cell.rows)
        for scenario, times in cell.times.items():
            best = min(times, key=lambda t: times[t])
            seconds = times.get(trace)
            yield Fit(scenario, trace, seconds, best, times[best], floors.get(scenario))
