"""Replay: proposes given traces, for measuring a log's records again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from dop.errors import TraceError
from dop.scenario import Scenario
from dop.search.strategy import Strategy
from dop.space.sketch import Candidate, Space
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload


class ReplayStrategy(Strategy):
    """The given traces in their order, each once; traces of no sketch of the space are counted.

    Attributes:
        skipped: traces that belong to no sketch of the space.
    """

    def __init__(
        self,
        space: Space,
        workload: Workload,
        target: Target,
        scenarios: Sequence[Scenario],
        rng: random.Random,
        traces: Iterable[Trace],
    ) -> None:
        super().__init__(space, workload, target, scenarios, rng, max_defaults=0)
        self.skipped = 0
        self._queue: list[Candidate] = []
        for trace in traces:
            try:
                self._queue.append(space.match(trace))
            except TraceError:
                self.skipped += 1

    def _propose(self, n: int) -> list[Candidate]:
        chosen: list[Candidate] = []
        while self._queue and len(chosen) < n:
            candidate = self._queue.pop(0)
            if self.history.mark(candidate):
                chosen.append(candidate)
        return chosen
