"""Cells: the batches that a dispatcher can tell apart, and what each kernel costs there.

Scenarios that look alike (same tokens, mean segment lengths within a factor of 1.4) form one cell
and get one kernel, judged by its worst regret among them, unless no kernel serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dop.database.wire import Entry
from dop.dispatch.table import UNKNOWN_ROWS
from dop.errors import ConfigError
from dop.scenario import COLD, Scenario

NEAR = math.sqrt(2)
"""Ratio of mean segment lengths up to which batches are not told apart. Engines tell how many
adapters there are at most, as a power of two mostly: between the right number and twice as many."""
TOGETHER = 1.15
"""What one kernel may take, of the best of each, in batches that are taken for one."""


@dataclass(slots=True)
class Cell:
    """Scenarios of one token count and of mean segment lengths that a hint does not tell apart.

    Attributes:
        times: seconds by trace key, per scenario key.
        costs: worst ratio to the best by trace key; of a batch of unknown segments that of the
            times of its cells together.
        slack: what a kernel may lose against the smallest cost, if no cost is near 1.
        best_s: mean of the scenarios' best times, in seconds.
    """

    tokens: int
    rows: float
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    slack: float = 0.0
    best_s: float = 0.0

    def judge(self) -> None:
        """Find the best times and the costs: the worst ratio over the scenarios, for traces
        measured under all of them; if there is no such trace, over the scenarios that a trace was
        measured under. Cold twins do not count where too few traces were measured under them."""
        warm = {s: times for s, times in self.times.items() if not s.endswith(COLD)}
        counted = self.times if _is_enough(self.times, warm) else warm
        self.best_s = math.fsum(min(t.values()) for t in counted.values()) / len(counted)
        anywhere = {trace for times in counted.values() for trace in times}
        self.costs = _costs(counted, _everywhere(counted) or anywhere)

    def limit(self, max_regret: float) -> float:
        """Largest cost that serves this cell."""
        return max(1 + max_regret, min(self.costs.values()) * (1 + self.slack))


Times = Mapping[str, Mapping[str, float]]
"""As a cell's."""


def _everywhere(times: Times) -> set[str]:
    """Traces measured under all scenarios."""
    return set.intersection(*(set(found) for found in times.values()))


def _costs(times: Times, traces: Iterable[str]) -> dict[str, float]:
    """Worst ratio to the best, over the scenarios that a trace was measured under."""
    best = {s: min(found.values()) for s, found in times.items()}
    return {
        trace: max(found[trace] / best[s] for s, found in times.items() if trace in found)
        for trace in sorted(traces)
    }


def _is_enough(times: Times, warm: Times) -> bool:
    """Whether a trace measured under all scenarios serves the warm ones about as well as any that
    was measured under those."""
    if len(warm) in (0, len(times)):
        return True
    both = _costs(warm, _everywhere(times)).values()
    return bool(both) and min(both) <= TOGETHER * min(_costs(warm, _everywhere(warm)).values())


def cells_of(tasks: list[list[Entry]]) -> list[Cell]:
    """Cells of the ranked entries of one workload's tasks, by tokens and segment length."""
    cells: dict[tuple[int, float], Cell] = {}
    for found in tasks:
        try:
            scenario = Scenario.parse(found[0].scenario_key)
        except (ConfigError, ValueError, OverflowError):
            continue  # a record of it cannot be best (query.problems_of names it)
        rows = rows_per_segment(scenario)
        cell = cells.setdefault((scenario.tokens, rows), Cell(scenario.tokens, rows))
        cell.times[scenario.key] = {e.trace_key: e.median_s for e in found}
    for cell in cells.values():
        cell.judge()
    return _with_neighbours([cells[key] for key in sorted(cells)])


def _with_neighbours(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, those as one that a hint does not tell apart, if one kernel serves them."""
    found: list[Cell] = []
    shortest = 0.0  # segment length with which the last one begins
    for cell in cells:
        near = found and found[-1].tokens == cell.tokens and cell.rows <= NEAR * shortest
        if near and found[-1].costs.keys() & cell.costs.keys():  # measured in all of them
            times = found[-1].times | cell.times
            both = Cell(cell.tokens, math.sqrt(shortest * cell.rows), times)
            both.judge()
            if min(both.costs.values()) <= TOGETHER:
                found[-1] = both
                continue
        found.append(cell)
        shortest = cell.rows
    return found


def rows_per_segment(scenario: Scenario) -> float:
    """What a caller can say beforehand: tokens over adapters."""
    return scenario.tokens / max(1, scenario.adapters)


def bucketed(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells by token count, each bucket by rising segment length."""
    found: dict[int, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: (c.tokens, c.rows)):
        found.setdefault(cell.tokens, []).append(cell)
    return list(found.values())


def unknown_cell(bucket: list[Cell], max_regret: float) -> Cell | None:
    """A bucket as the batch of unknown segments; None if no trace was measured all over it."""
    cell = Cell(bucket[0].tokens, UNKNOWN_ROWS, slack=max_regret)
    everywhere = set.intersection(*(set(c.costs) for c in bucket))
    cell.costs = {trace: mean_cost(trace, bucket) for trace in sorted(everywhere)}
    return cell if cell.costs else None


def mean_cost(trace: str, cells: Iterable[Cell]) -> float:
    """What a trace takes in some cells together, over what the best of each take; infinite if it
    lacks one.

    What a batch of unknown segments should cost, each mix being as likely as the others: time adds
    up, shares of it do not. Whoever loses least in the worst cell may lose about as much in all
    the others.
    """
    taken = [(cell.costs.get(trace, math.inf), cell.best_s) for cell in cells]
    return math.fsum(c * s for c, s in taken) / math.fsum(s for _, s in taken)
