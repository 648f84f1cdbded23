"""What a strategy knows: everything it proposed and was told."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from dop.cost_model.base import Point, Sample
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.early import may_serve
from dop.space.sketch import Candidate
from dop.space.trace import Trace

Result = tuple[Candidate, Scenario, Measurement]
"""One answer of a measurer."""

PointKey = tuple[str, tuple[tuple[str, int], ...]]
"""Sketch name and annotation: identity of a point without binding its trace."""


def point_key(point: Point) -> PointKey:
    """Identity of a candidate or draft."""
    return (point.sketch.name, point.annotation)


@dataclass(slots=True)
class Entry:
    """A measured candidate: seconds by scenario key, infinite for a failure."""

    candidate: Candidate
    seconds: dict[str, float] = field(default_factory=dict)


class History:
    """Candidates in the order of their arrival, and the best per scenario.

    Proposals are told apart by their trace; what was told is kept by point, so that a trace is
    bound and hashed once.
    """

    def __init__(self, scenarios: Sequence[Scenario]) -> None:
        self.scenarios = tuple(scenarios)
        self._known = {s.key for s in self.scenarios}
        self._entries: dict[PointKey, Entry] = {}
        self._seen_traces: set[Trace] = set()
        self._seen_points: set[PointKey] = set()
        self._samples: list[Sample] = []
        self._best: dict[str, tuple[float, Candidate]] = {}

    def __len__(self) -> int:
        """Number of measured candidates, failures included."""
        return len(self._entries)

    def mark(self, candidate: Candidate) -> bool:
        """Note a proposal; False if this trace was proposed or told before."""
        self._seen_points.add(point_key(candidate))
        if candidate.trace in self._seen_traces:
            return False
        self._seen_traces.add(candidate.trace)
        return True

    def saw(self, key: PointKey) -> bool:
        """Whether a point was proposed or told before (cheap: no trace is bound)."""
        return key in self._seen_points

    def add(self, results: Iterable[Result]) -> None:
        """Take in measurements; a pair that was told before is ignored."""
        entry, last = None, None
        for candidate, scenario, measurement in results:
            if entry is None or candidate is not last:  # hashing a point takes its time
                point, last = point_key(candidate), candidate
                entry = self._entries.get(point)
                if entry is None:
                    self.mark(candidate)
                    entry = self._entries[point] = Entry(candidate)
            if not may_serve(candidate.annotation, scenario.tokens):
                continue
            seconds = measurement.median_s if measurement.ok else math.inf
            sample = Sample(candidate, scenario, seconds)
            key = sample.scenario_key
            if key in entry.seconds or key not in self._known:
                continue
            entry.seconds[key] = seconds
            self._samples.append(sample)
            if seconds < self.best_s(key):
                self._best[key] = (seconds, candidate)

    @property
    def samples(self) -> Sequence[Sample]:
        """Everything told, in order: what a cost model trains on."""
        return self._samples

    def best_s(self, scenario_key: str) -> float:
        """Best time of a scenario in seconds; infinite before the first success."""
        return self._best[scenario_key][0] if scenario_key in self._best else math.inf

    def best(self, scenario_key: str) -> Candidate | None:
        """The candidate of `best_s`, or None before the first success."""
        return self._best[scenario_key][1] if scenario_key in self._best else None

    def incomplete(self) -> list[tuple[Candidate, tuple[Scenario, ...]]]:
        """Candidates that lack some scenarios, with these; the best elsewhere come first.

        One that only failed so far is left out: it would fail again.
        """
        open_ones = []
        for place, entry in enumerate(self._entries.values()):
            missing = tuple(
                s
                for s in self.scenarios
                if s.key not in entry.seconds and may_serve(entry.candidate.annotation, s.tokens)
            )
            ratio = self._least_ratio(entry)
            if missing and math.isfinite(ratio):
                open_ones.append((ratio, place, entry.candidate, missing))
        return [(c, missing) for _, _, c, missing in sorted(open_ones, key=lambda o: o[:2])]

    def ratios(self) -> list[tuple[Candidate, float]]:
        """Every measured candidate with its least time over the best of a scenario (1 if it is the
        best somewhere; infinite if it only failed)."""
        return [(entry.candidate, self._least_ratio(entry)) for entry in self._entries.values()]

    def _least_ratio(self, entry: Entry) -> float:
        finite = ((k, s) for k, s in entry.seconds.items() if math.isfinite(s))
        return min((s / self.best_s(k) for k, s in finite), default=math.inf)

    def compromises(self, keys: Sequence[str], count: int) -> list[tuple[float, Candidate]]:
        """Candidates for a batch that may be any of several scenarios, best ones first.

        Returns:
            Up to `count` of those that worked under all of them, each with log(time / best time)
            of all batches together, as dispatch judges them.
        """
        total = math.fsum(self.best_s(key) for key in keys)
        found = []
        for place, entry in enumerate(self._entries.values()):
            taken = math.fsum(entry.seconds.get(key, math.inf) for key in keys)
            if math.isfinite(taken):
                found.append((math.log(taken / total), place, entry.candidate))
        return [(lost, candidate) for lost, _, candidate in heapq.nsmallest(count, found)]

    def contested(self, rivals: int, within: float) -> list[tuple[Candidate, tuple[Scenario, ...]]]:
        """The best and its close rivals in each scenario, with the scenarios where they are close.

        Args:
            rivals: most candidates per scenario.
            within: slower than this times the best is no rival.

        Returns:
            Those close in the most scenarios first.
        """
        close: dict[PointKey, list[Scenario]] = {}
        for scenario in self.scenarios:
            limit = within * self.best_s(scenario.key)
            for key, _ in self._fastest(scenario.key, rivals):
                if self._entries[key].seconds[scenario.key] <= limit:
                    close.setdefault(key, []).append(scenario)
        ranked = sorted(close, key=lambda key: -len(close[key]))
        return [(self._entries[key].candidate, tuple(close[key])) for key in ranked]

    def elites(self, count: int) -> list[Candidate]:
        """The best candidates, up to `count` per scenario, each once, best ones first."""
        found: dict[PointKey, Candidate] = {}
        ranked = [list(self._fastest(s.key, count)) for s in self.scenarios]
        for place in range(count):
            for column in ranked:
                if place < len(column):
                    found.setdefault(*column[place])
        return list(found.values())

    def _fastest(self, scenario_key: str, count: int) -> Iterator[tuple[PointKey, Candidate]]:
        timed = [
            (entry.seconds[scenario_key], key)
            for key, entry in self._entries.items()
            if math.isfinite(entry.seconds.get(scenario_key, math.inf))
        ]
        for _, key in heapq.nsmallest(count, timed):
            yield key, self._entries[key].candidate
