"""Tuning: the one place where space, search, measurement and log meet.

The loop asks a family's strategy for a batch, has it measured, writes every record the moment it
arrives, and tells the strategy. It can be stopped at any time; the log is all there is to resume.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from itertools import chain, islice
from operator import itemgetter

from dop.database.jsonl import Log, without_collector
from dop.database.record import Record
from dop.database.wire import Entry
from dop.earlier import NEAREST, Earlier, serving
from dop.effort import QUICK, Effort
from dop.errors import ConfigError, DopError, Failure
from dop.family import Family, FamilyState, adapted, neighbours
from dop.measure.base import Job, Measurer
from dop.measurement import Measurement
from dop.prior import Prior
from dop.progress import Event, Note, Progress, TuneResult, view
from dop.recorded import (
    DEFAULT_MARK,
    Recorded,
    alike,
    check_device,
    figures_of,
    recorded,
    same_device,
)
from dop.scenario import Scenario
from dop.search.history import Result, point_key
from dop.space.early import may_serve, plainly
from dop.space.sketch import Candidate, Space
from dop.target import Target
from dop.workload import Workload

__all__ = ["Provenance", "tune"]

_HINTS = 12
"""Most candidates that a family takes over from its neighbours at once."""

_LIKE = 2
"""Fastest candidates of each batch on another device that are tried first."""

_ALONE = 6
"""Likewise, for calls beside the base layer's matmul, of those without it."""

_CONFIRM = {"cpu": 0.12}
"""Share of the wall time, by device, in which the closest rivals are measured once more. A shared
host has slow spells longer than a timing: a candidate that met one lost to a worse one."""
_RIVALS = 5
_CLOSE = 1.35

_TWINS = 4
"""Fastest early kernels of each batch in the log that is too large for them (space/early.py), of
which the plain twins are measured first."""

_TELL_S = 0.1
"""Progress is told this often at most: a report over hundreds of tasks costs more than a record."""

_FINISH = 0.1
"""Share of the wall time after which old records are no longer filled up with missing batches."""

_FOREIGN_WORKLOADS = 24
"""Workloads of the log that are not being tuned: so many at most, the nearest of each family."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """What every record says about where it came from."""

    versions: Mapping[str, str] = field(default_factory=dict)
    revision: str = ""


def tune(
    families: Sequence[Family],
    *,
    measurer: Measurer,
    log: Log,
    budget_s: float | None = None,
    trials: int | None = None,
    effort: Effort = QUICK,
    seed: int = 0,
    on_event: Callable[[Event], None] | None = None,
    build: Callable[[Workload, Target], Space] | None = None,
    provenance: Provenance | None = None,
    like: Iterable[Entry] = (),
    priors: Iterable[Prior] = (),
    clock: Callable[[], float] = time.monotonic,
) -> TuneResult:
    """Tune families until the budget, the trials or the spaces run out.

    Args:
        families: what to tune; each workload once.
        measurer: builds, checks and times; it stays open.
        log: open for appending. Its records of these families count as measured already, those of
            neighbouring workloads on this device are a warm start.
        budget_s: wall time in seconds; None takes the effort's.
        trials: most candidates to build in this run; None takes the effort's, 0 is no bound.
        effort: all other settings.
        seed: of the search.
        on_event: is told about every record and note.
        build: makes the space of a workload; None takes the rules of dop.space.
        provenance: goes into every record.
        like: records of another device; the fastest candidates of each batch there are tried
            first here. Their times count for nothing.
        priors: what earlier searches found, of any workload and device: a family tries first what
            was fastest for its own workload, else for the nearest ones, whose kernels are hints,
            too. Their times count for nothing either.
        clock: seconds that only grow.

    Returns:
        The best per task, also after Ctrl-C (`interrupted`).

    Raises:
        LogError: the log belongs to another device, or cannot be written (a full disk): what was
            written stays whole.
        ConstraintError: a workload has no valid candidate.
        MissingDependencyError: the cost model's library is not installed.
    """
    run = _Run(
        measurer,
        log,
        effort,
        seed,
        budget_s=effort.budget_s if budget_s is None else budget_s,
        trials=(effort.trials if trials is None else trials) or math.inf,
        on_event=on_event,
        build=build or _build_space,
        provenance=provenance or Provenance(),
        clock=clock,
    )
    try:
        run.start(families)
        run.try_first(like)
        run.begin_with(priors)
        reason = run.loop()
    except KeyboardInterrupt:
        reason = "interrupt"
    finally:
        run.trainer.shutdown(wait=False, cancel_futures=True)
    return TuneResult(run.progress(), reason == "interrupt", reason, run.begun_with)


def _build_space(workload: Workload, target: Target) -> Space:
    from dop.space.generate import build_space

    return build_space(workload, target)


class _Run:
    """One call of `tune`."""

    def __init__(
        self,
        measurer: Measurer,
        log: Log,
        effort: Effort,
        seed: int,
        *,
        budget_s: float,
        trials: float,
        on_event: Callable[[Event], None] | None,
        build: Callable[[Workload, Target], Space],
        provenance: Provenance,
        clock: Callable[[], float],
    ) -> None:
        self.measurer = measurer
        self.log = log
        self.effort = effort
        self.seed = seed
        self.budget_s = budget_s
        self.max_trials = trials
        self.emit = on_event
        self.build = build
        self.provenance = provenance
        self.clock = clock
        self.began = clock()
        self.states: list[FamilyState] = []
        self.foreign: list[tuple[Workload, list[Candidate]]] = []
        self.failures: Counter[Failure] = Counter()
        self.trials = 0
        self.records = 0
        self.resumed = 0
        self.begun_with: Counter[str] = Counter()
        self.current = ""
        self.told = -math.inf
        self.cost_s: dict[str, float] = {}
        self.reserve_s = 0.0
        self.trainer = ThreadPoolExecutor(1, thread_name_prefix="dop-train")

    # Start: spaces, the log's records, neighbours.

    def start(self, families: Sequence[Family]) -> None:
        """Build the spaces and take in what the log knows."""
        if not families:
            raise ConfigError("nothing to tune.", "Give a model and ranks.")
        if len({f.workload.key for f in families}) != len(families):
            raise ConfigError("a workload is given twice.", "Join its scenarios in one family.")
        for warning in self.log.contents.warnings():
            self._note(warning)
        check_device(self.log, families)
        for family in families:
            space = self.build(family.workload, family.target)
            self.states.append(FamilyState.start(family, space, self.effort, self.seed))
        target = families[0].target
        by_workload: dict[str, list[Entry]] = {}
        for entry in self.log.entries:
            by_workload.setdefault(entry.workload_key, []).append(entry)
        with without_collector():
            for state in self.states:
                self._resume(state, by_workload.get(state.family.workload.key, []))
                if state.family.workload.beside:
                    alone = replace(state.family.workload, beside=False)
                    mine = (e for e in by_workload.get(alone.key, []) if same_device(e, target))
                    _offer(state, mine, _ALONE)
                if state is self.states[0]:
                    self._learn(state)  # beside the other families' records
        for state in self.states[1:]:
            self._learn(state)
        if self.resumed:
            self._note(f"{self.log.path}: continuing after {self.resumed} records.")
        self.foreign = list(self._foreign(by_workload))

    def try_first(self, entries: Iterable[Entry]) -> None:
        """Offer every family what was fastest for its workload on another device."""
        by_workload: dict[str, list[Entry]] = {}
        for entry in entries:
            by_workload.setdefault(entry.workload_key, []).append(entry)
        for state in self.states:
            _offer(state, by_workload.get(state.family.workload.key, []), _LIKE)

    def begin_with(self, priors: Iterable[Prior]) -> None:
        """Offer every family what earlier searches found for its workload, else for the nearest."""
        earlier = Earlier(priors, self.build)
        for state in self.states:
            saw, default_place = state.strategy.history.saw, state.default_place
            found = earlier.of(state.space, state.family)
            new = [(c, p) for c, p in found if default_place(c.trace) is None]
            new = [(c, p) for c, p in new if not saw(point_key(c))]
            state.strategy.first([candidate for candidate, _ in new])
            self.begun_with.update(prior.origin for _, prior in new)
        there = {workload for workload, _ in self.foreign}
        self.foreign += [(w, pool) for w, pool in earlier.pools.items() if w not in there]
        if self.begun_with:
            parts = ", ".join(f"{count} of {origin}" for origin, count in self.begun_with.items())
            self._note(f"Kernels of earlier searches come first: {parts}.")

    def _resume(self, state: FamilyState, entries: Iterable[Entry]) -> None:
        """Tell a family's strategy what the log holds for it."""
        scenarios = {s.key: s for s in state.family.scenarios}
        traces: dict[str, Recorded | None] = {}
        results: list[Result] = []
        early: dict[str, list[tuple[float, Candidate]]] = {}
        for entry in entries:
            scenario = scenarios.get(entry.scenario_key)
            if scenario is None or not same_device(entry, state.family.target):
                continue
            if entry.trace_key not in traces:
                traces[entry.trace_key] = recorded(state, entry)
            known = traces[entry.trace_key]
            if known is None:
                continue
            found = figures_of(entry)
            candidate = known.candidate
            if candidate is None or may_serve(candidate.annotation, scenario.tokens):
                state.observe(known.trace, known.sketch, scenario, found, known.place)
            elif found.ok:
                early.setdefault(scenario.key, []).append((found.median_s, candidate))
            self.resumed += 1
            if candidate is not None:
                results.append((candidate, scenario, found))
        if results:
            state.strategy.restore(results)
        fastest = [nsmallest(_TWINS, rivals, key=itemgetter(0)) for rivals in early.values()]
        state.strategy.first([plainly(candidate) for _, candidate in chain(*fastest)])

    def _learn(self, state: FamilyState) -> None:
        """Train on what was resumed, on another core: on a long log it takes seconds a family."""
        if len(state.strategy.history):
            state.learning = self.trainer.submit(state.strategy.learn)

    def _foreign(
        self, by_workload: Mapping[str, list[Entry]]
    ) -> Iterator[tuple[Workload, list[Candidate]]]:
        """Best candidates of workloads in the log that are not tuned now, nearest ones only."""
        tuned = {s.family.workload.key for s in self.states}
        known: dict[str, Workload] = {}
        for key in by_workload:
            if key not in tuned:
                with contextlib.suppress(DopError):
                    known[key] = Workload.parse(key)
        target = self.states[0].family.target
        near = dict.fromkeys(
            workload
            for state in self.states
            for workload in neighbours(state.family, list(known.values()))[:NEAREST]
        )
        for workload in list(near)[:_FOREIGN_WORKLOADS]:
            best: dict[str, Entry] = {}
            for entry in by_workload[workload.key]:
                held = best.get(entry.scenario_key)
                usable = entry.ok and same_device(entry, target)
                if usable and (held is None or entry.median_s < held.median_s):
                    best[entry.scenario_key] = entry
            found = self._matched(workload, target, {e.trace_key: e for e in best.values()})
            if found:
                yield workload, found

    def _matched(
        self, workload: Workload, target: Target, entries: Mapping[str, Entry]
    ) -> list[Candidate]:
        if not entries:
            return []
        try:
            space = self.build(workload, target)
        except DopError:
            return []
        found = (alike(space, entry) for entry in entries.values())
        return [candidate for candidate in found if candidate is not None]

    # The loop.

    def loop(self) -> str:
        """Visit families until something runs out, then decide close races; returns what did."""
        kind = self.states[0].family.target.kind
        if math.isfinite(self.budget_s):
            self.reserve_s = _CONFIRM.get(kind, 0.0) * self.budget_s
        reason = self._search()
        if self.reserve_s > 0:
            self._confirm()
        return reason

    def _search(self) -> str:
        for state in self.states:
            if self.clock() - self.began > _FINISH * self.budget_s:
                break
            self._finish_recorded(state)
        visit = self._next_visit()
        while True:
            if isinstance(visit, str):
                return visit
            wanted = self._affordable(visit.state)
            if wanted < 1:
                return "budget"
            visit = replace(visit, jobs=visit.jobs[:wanted])
            self.trials += len(visit.jobs)
            visit.state.trials += len(visit.jobs)
            upcoming = self._plan_ahead(visit.state)
            if not self._measure(visit, upcoming):
                return "budget"
            following = upcoming.result() if upcoming is not None else ""
            # What ended the search while a batch was under way may hold no longer.
            visit = self._next_visit() if isinstance(following, str) else following

    def _plan_ahead(self, current: FamilyState) -> Future[_Visit | str] | None:
        """The visit after that of `current`, proposed on another core while that one is measured:
        its builds can then begin before the GPU would wait for them."""
        if not self.measurer.overlaps or len(self.states) < 2:
            return None
        return self.trainer.submit(self._next_visit, current)

    def _next_visit(self, besides: FamilyState | None = None) -> _Visit | str:
        """Candidates of the family that promises most, or why there are none.

        Args:
            besides: a family that is being measured: what it will be told is not known yet.
        """
        while True:
            if self.trials >= self.max_trials:
                return "trials"
            states = [s for s in self.states if s is not besides]
            state = max(states, key=lambda s: s.promise(self.effort.patience))
            if state.promise(self.effort.patience) <= 0:
                return "exhausted"
            wanted = self._affordable(state)
            if wanted < 1:
                return "budget"
            state.settle()
            self._hint(state)
            candidates = state.strategy.ask(wanted)
            if candidates:
                return self._visit(state, [(c, state.family.scenarios) for c in candidates])
            state.exhausted = True

    def _visit(
        self, state: FamilyState, batch: Sequence[tuple[Candidate, tuple[Scenario, ...]]]
    ) -> _Visit:
        """Jobs of candidates, told how fast others were, for the batches that they may serve."""
        batch = [
            (c, tuple(s for s in scenarios if may_serve(c.annotation, s.tokens)))
            for c, scenarios in batch
        ]
        batch = [(c, scenarios) for c, scenarios in batch if scenarios]
        best = {k: b.measurement.median_s for k, b in state.best.items()}
        workload = state.family.workload
        return _Visit(
            state,
            tuple(c for c, _ in batch),
            tuple(
                Job(c.trace, workload, scenarios, tuple(best.get(s.key) for s in scenarios))
                for c, scenarios in batch
            ),
        )

    def _affordable(self, state: FamilyState) -> int:
        """Candidates of the next batch that the time and the trials left allow."""
        wanted = int(min(self.effort.batch, self.max_trials - self.trials))
        left = self._left_s() - self.reserve_s
        if left <= 0:
            return 0
        costs = self.cost_s
        each = costs.get(state.family.workload.key, min(costs.values(), default=0.0))
        return wanted if each <= 0 else int(min(wanted, left / each))

    def _hint(self, state: FamilyState) -> None:
        """Offer the best candidates of neighbouring workloads."""
        pools = {
            other.family.workload: _bests(other) for other in self.states if other is not state
        }
        pools.update(self.foreign)
        strategy = state.strategy
        hints = (
            candidate
            for workload in neighbours(state.family, list(pools))
            for candidate in adapted(state.space, pools[workload], repair=not strategy.is_new)
            if strategy.is_new or not strategy.history.saw(point_key(candidate))
        )
        strategy.hint(list(islice(hints, _HINTS)))

    def _finish_recorded(self, state: FamilyState) -> None:
        """Measure what a stopped run left open: the best candidates under missing scenarios."""
        jobs = []
        missing = state.strategy.history.incomplete()
        for candidate, scenarios in missing[: self.effort.batch]:
            jobs.append((candidate, scenarios))
        if jobs and self._affordable(state) > 0:
            self._measure(self._visit(state, jobs), counted=False)

    def _confirm(self) -> None:
        """Measure the closest rivals of each family again; the faster of the two timings counts."""
        self.reserve_s = 0.0
        for place, state in enumerate(self.states):
            state.settle()
            share_s = self._left_s() / (len(self.states) - place)
            each_s = self.cost_s.get(state.family.workload.key, 1.0)
            jobs = state.strategy.history.contested(_RIVALS, _CLOSE)[: int(share_s / each_s)]
            if len(jobs) > 1:
                self._measure(self._visit(state, jobs), counted=False)

    def _measure(
        self,
        visit: _Visit,
        upcoming: Future[_Visit | str] | None = None,
        counted: bool = True,
    ) -> bool:
        """Measure a batch and learn from it; False if it had to be dropped at the deadline.

        Args:
            visit: what to measure.
            upcoming: what comes next; its builds are queued as soon as it is known.
            counted: whether the visit says something about what a search of the family finds.
        """
        state, workload = visit.state, visit.state.family.workload
        self.current = workload.name
        by_trace = {c.trace: c for c in visit.candidates}
        before, began = state.score(), self.clock()
        results: list[Result] = []
        answers = iter(self.measurer.measure(visit.jobs))
        whole = True
        try:
            for job, scenario, measurement in answers:
                candidate = by_trace[job.trace]
                self._keep(state, candidate, scenario, measurement)
                results.append((candidate, scenario, measurement))
                if upcoming is not None and upcoming.done():
                    self._prefetch(upcoming)
                    upcoming = None
                if self._left_s() < -self._grace_s():
                    whole = False
                    break
        finally:
            close = getattr(answers, "close", None)
            if close is not None:
                close()
        self._tell()
        # Training runs beside the next family's measurements; the runner need not wait for it.
        state.learning = self.trainer.submit(state.strategy.tell, results)
        spent = self.clock() - began
        old = self.cost_s.get(workload.key)
        each = spent / len(visit.jobs)
        self.cost_s[workload.key] = each if old is None else 0.5 * (old + each)
        if counted:
            # What a stopped run left open says nothing about what a search here would find.
            state.visited(before - state.score(), spent)
        return whole

    def _prefetch(self, upcoming: Future[_Visit | str]) -> None:
        visit = upcoming.result()
        if isinstance(visit, _Visit):
            self.measurer.prefetch(visit.jobs)

    def _keep(
        self, state: FamilyState, candidate: Candidate, scenario: Scenario, found: Measurement
    ) -> None:
        """Write one record before anything else is done with it."""
        target, sketch = state.family.target, candidate.sketch.name
        place = state.default_place(candidate.trace)
        mark = DEFAULT_MARK if place is not None else ""
        record = Record(
            workload_key=state.family.workload.key,
            target_key=target.key,
            hardware_params=target.hardware_params,
            scenario_key=scenario.key,
            device_name=target.device_name,
            trace=candidate.trace,
            measurement=found,
            timestamp=int(time.time()),
            sketch=sketch + mark,
            versions=self.provenance.versions,
            seed=self.seed,
            revision=self.provenance.revision,
            predicted_s=state.strategy.predicted_s(candidate, scenario),
        )
        self.log.append(record)
        self.records += 1
        if not found.ok:
            self.failures[found.failure] += 1
        state.observe(candidate.trace, sketch, scenario, found, place)
        if self.clock() - self.told >= _TELL_S:
            self._tell()

    def _tell(self) -> None:
        if self.emit is not None:
            self.emit(self.progress())
        self.told = self.clock()

    def _left_s(self) -> float:
        return self.budget_s - (self.clock() - self.began)

    def _grace_s(self) -> float:
        """How far a batch in flight may overrun before it is dropped."""
        return min(10.0, 1.0 + 0.05 * self.budget_s)

    # Reporting.

    def _note(self, text: str) -> None:
        if self.emit is not None:
            self.emit(Note(text))

    def progress(self) -> Progress:
        """The state now."""
        return Progress(
            elapsed_s=self.clock() - self.began,
            left_s=max(0.0, self._left_s()),
            trials=self.trials,
            records=self.records,
            resumed=self.resumed,
            failures=dict(self.failures),
            families=tuple(view(state) for state in self.states),
            current=self.current,
        )


@dataclass(frozen=True, slots=True)
class _Visit:
    """A batch of one family."""

    state: FamilyState
    candidates: tuple[Candidate, ...]
    jobs: tuple[Job, ...]


def _bests(state: FamilyState) -> list[Candidate]:
    """The best candidate per scenario, each once."""
    found: dict[str, Candidate] = {}
    for scenario in state.family.scenarios:
        best = state.best.get(scenario.key)
        if best is not None and best.trace.key not in found:
            candidate = state.candidate(best.trace, best.sketch)
            if candidate is not None:
                found[best.trace.key] = candidate
    return list(found.values())


def _offer(state: FamilyState, entries: Iterable[Entry], most: int) -> None:
    """The `most` fastest candidates of each batch are proposed before a family's search begins."""
    by_batch: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.ok:
            by_batch.setdefault(entry.scenario_key, []).append(entry)
    winners: dict[str, Entry] = {}
    for tried in by_batch.values():
        winners.update((e.trace_key, e) for e in nsmallest(most, tried, key=lambda e: e.median_s))
    found = [(alike(state.space, e), Scenario.parse(e.scenario_key)) for e in winners.values()]
    served = [serving(candidate, s) for candidate, s in found if candidate is not None]
    state.strategy.first([candidate for candidate in served if candidate is not None])
