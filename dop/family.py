"""A tuned family: one workload on one target under several scenarios, and how far it has come.

One binary serves every batch, so a candidate is built once and timed under all scenarios of its
family; each (workload, scenario, device) keeps a best of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from dop.cost_model.gbdt import GbdtModel
from dop.effort import Effort
from dop.errors import ConfigError, TraceError
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.search.evolutionary import EvolutionaryStrategy
from dop.search.mutator.base import nearest
from dop.search.repair import repaired
from dop.search.strategy import Strategy
from dop.space.sketch import Candidate, Sketch, Space
from dop.space.trace import Trace
from dop.target import Target, Task
from dop.workload import Workload

_WINDOW = 4
"""Visits over which the rate of improvement is taken."""

_FIRST_GAIN = 0.5
"""Relative gain that a family promises before it was visited; it falls with the visits squared."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is tuned together.

    Attributes:
        workload: the problem.
        target: the device.
        scenarios: the batches; every candidate is timed under each.
        weight: how much a relative gain here is worth against other families.
    """

    workload: Workload
    target: Target
    scenarios: tuple[Scenario, ...]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.scenarios:
            raise ConfigError(f"{self.workload.key} has no scenario.", "Give at least one.")
        if len({s.key for s in self.scenarios}) != len(self.scenarios):
            raise ConfigError("two scenarios have the same key.", "Give each batch once.")

    def task(self, scenario: Scenario) -> Task:
        """The task of one of the scenarios."""
        return Task(self.workload, scenario, self.target)


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest right candidate of a task so far."""

    trace: Trace
    sketch: str
    measurement: Measurement


@dataclass(slots=True)
class FamilyState:
    """A family during a run.

    Attributes:
        best: by scenario key.
        default: the heuristic default's measurement by scenario key: of the first sketch whose
            default worked there.
        trials: candidates built in this run.
        learning: the strategy's `tell` of the last batch, while it runs.
    """

    family: Family
    space: Space
    strategy: Strategy
    best: dict[str, Best] = field(default_factory=dict)
    default: dict[str, Measurement] = field(default_factory=dict)
    trials: int = 0
    visits: int = 0
    idle_visits: int = 0
    exhausted: bool = False
    learning: Future[None] | None = None
    _default_keys: dict[Trace, int] = field(default_factory=dict)
    _default_place: dict[str, int] = field(default_factory=dict)
    _gains: list[tuple[float, float]] = field(default_factory=list)

    @staticmethod
    def start(family: Family, space: Space, effort: Effort, seed: int) -> FamilyState:
        """A family with an evolutionary strategy and a model of its own.

        Raises:
            MissingDependencyError: the cost model's library is not installed.
        """
        rng = random.Random(f"{seed}|{family.workload.key}")
        model = GbdtModel(space, family.workload, family.target, effort.model, seed)
        strategy = EvolutionaryStrategy(
            space, family.workload, family.target, family.scenarios, rng, model, effort.search
        )
        state = FamilyState(family, space, strategy)
        state._default_keys = {c.trace: i for i, c in enumerate(space.defaults())}
        return state

    def settle(self) -> None:
        """Wait until the strategy has taken in the last batch; what it raised is raised here."""
        if self.learning is not None:
            self.learning.result()
            self.learning = None

    def default_place(self, trace: Trace) -> int | None:
        """Place of an untuned default among the sketches' defaults; None for other traces."""
        return self._default_keys.get(trace)

    def observe(
        self,
        trace: Trace,
        sketch: str,
        scenario: Scenario,
        measurement: Measurement,
        place: int | None,
    ) -> None:
        """Keep the best and the default's figures; a failure is never a best.

        Args:
            trace: what was measured.
            sketch: name of its sketch.
            scenario: what it was measured under.
            measurement: what came out.
            place: `default_place` of the trace.
        """
        if not measurement.ok:
            return
        key = scenario.key
        held = self.best.get(key)
        if held is None or measurement.median_s < held.measurement.median_s:
            self.best[key] = Best(trace, sketch, measurement)
        if place is not None and place <= self._default_place.get(key, place):
            self._default_place[key] = place
            self.default[key] = measurement

    def score(self) -> float:
        """Weighted mean of log(best seconds): falls as the family gets faster."""
        total = sum(s.weight for s in self.family.scenarios)
        return sum(s.weight / total * math.log(self._seconds(s)) for s in self.family.scenarios)

    def _seconds(self, scenario: Scenario) -> float:
        held = self.best.get(scenario.key)
        return held.measurement.median_s if held else 1.0

    def visited(self, gain: float, cost_s: float) -> None:
        """Note a finished batch: its drop of `score`, and the wall time it took."""
        self.visits += 1
        self.idle_visits = 0 if gain > 1e-3 else self.idle_visits + 1
        # The first success of a scenario is no rate to extrapolate.
        self._gains.append((min(gain, 1.0), max(cost_s, 1e-6)))

    def promise(self, patience: int) -> float:
        """Expected weighted relative gain per second of the next visit.

        The rate of the last visits, or what an optimist expects of a family seen so rarely,
        whichever is larger: after the auto-scheduler's task scheduler.
        Source: Zheng et al., Ansor (OSDI 2020), section 6.
        """
        if self.exhausted:
            return 0.0
        recent = self._gains[-_WINDOW:]
        if not recent:
            return math.inf
        cost = sum(c for _, c in recent) / len(recent)
        # The first visit turns nothing into something; that is no rate to extrapolate.
        seen = [g for g, _ in self._gains[1:]][-_WINDOW:]
        rate = sum(seen) / len(seen) if seen else 0.0
        hope = _FIRST_GAIN / (1 + self.visits) ** 2
        if self.idle_visits >= patience:
            hope *= 0.1
        return self.family.weight * max(rate, hope) / cost

    def candidate(self, trace: Trace, sketch: str) -> Candidate | None:
        """The candidate of a recorded trace, or None if no sketch of the space has its form."""
        named = [s for s in self.space.sketches if s.name == sketch]
        for known in named:
            annotation = known.match(trace)
            if annotation is not None:
                return Candidate(known, tuple(sorted(annotation.items())), trace)
        try:
            return self.space.match(trace)
        except TraceError:
            return None


def neighbours(family: Family, others: Sequence[Workload]) -> list[Workload]:
    """Other workloads of the same type and number of slices first, the most alike first."""

    def distance(other: Workload) -> tuple[int, int, float]:
        mine = family.workload
        gap = (
            abs(math.log2(mine.rank / other.rank))
            + abs(math.log2(mine.in_features / other.in_features))
            + abs(math.log2(mine.total_out / other.total_out))
        )
        return (mine.dtype != other.dtype, mine.slices != other.slices, gap)

    return sorted((o for o in others if o.key != family.workload.key), key=distance)


def adapted(
    space: Space, candidates: Sequence[Candidate], repair: bool = False
) -> Iterator[Candidate]:
    """Candidates of another workload's space in this one: same sketch, nearest allowed numbers.

    Those that break a limit are left out, or changed a little more (`repair`).
    """
    sketches: dict[str, Sketch] = {s.name: s for s in space.sketches}
    for candidate in candidates:
        sketch = sketches.get(candidate.sketch.name)
        if sketch is None:
            continue
        given = candidate.values
        values = {
            d.name: nearest(d, given[d.name]) if d.name in given else d.default
            for d in sketch.domains
        }
        if sketch.broken_limit(values) is not None:
            if not repair:
                continue
            rng = random.Random(repr(sorted(values.items())))
            values = repaired(sketch, values, frozenset(), rng) or {}
        if values:
            yield Candidate.of(sketch, values)
