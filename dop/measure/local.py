"""Measuring on this machine: a pool of builders and one runner, in worker processes.

CUDA: builds overlap with timing; the builders use the host, the runner the GPU. CPU: a batch is
built first and timed afterwards, while the builders sleep, because both would use the same cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType

from dop.errors import ConfigError, Failure
from dop.measure.artifact import Artifact
from dop.measure.base import Job, Result
from dop.measure.builder import GENERATE, BuildConfig, BuildTask, Built, require_compiler
from dop.measure.pool import Event, WorkerPool, wait_any
from dop.measure.runner import FirstLook, RunConfig, RunTask
from dop.measure.timer import CPU_TIMER, CUDA_TIMER, TimerSettings
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.target import Target

SIGKILL = 9
MAX_BUILDERS = 16
RUNS_QUEUED = 2
"""Runs that the runner is given at once: the next one while it answers for the last. More would be
sent before it is known how fast those before them were, and then all are timed in full."""

RUNNERS = {"cpu": "dop.measure.runner_cpu:create", "cuda": "dop.measure.runner_cuda:create"}


@dataclass(frozen=True)
class Limits:
    """Longest times in seconds.

    Attributes:
        build_s: one build, code generator and compiler.
        prepare_s: making inputs and references before a candidate runs, often cached.
        run_s: check and timing under one scenario.
    """

    build_s: float = 12.0
    prepare_s: float = 120.0
    run_s: float = 20.0


@dataclass
class _State:
    """How far a job is; `looks` are measurements that are not final yet, by scenario."""

    job: Job
    built: Built | None = None
    done: int = 0
    offset: int = 0
    retries: int = 0
    looks: dict[int, Measurement] = field(default_factory=dict)


@dataclass
class _Ahead:
    """A build that no batch waits for yet, and what was heard of it."""

    job: Job
    events: list[Event] = field(default_factory=list)


class LocalMeasurer:
    """Builds, checks and times candidates here.

    Args:
        target: the device; a CPU runner uses `target.units` pinned threads.
        builders: builder processes; by default one per core, at most 16.
        generate: "module:function" of the code generator.
        limits: time limits.
        timer: repeats; by default those of the device's kind.

    Raises:
        MissingDependencyError: there is no compiler for the target.
    """

    def __init__(
        self,
        target: Target,
        *,
        builders: int | None = None,
        generate: str = GENERATE,
        limits: Limits | None = None,
        timer: TimerSettings | None = None,
    ) -> None:
        if builders is not None and builders < 1:
            raise ConfigError(f"{builders} builders.", "Give at least one.")
        timer = timer or (CPU_TIMER if target.kind == "cpu" else CUDA_TIMER)
        count = builders or min(MAX_BUILDERS, len(os.sched_getaffinity(0)))
        self._limits = limits or Limits()
        self._overlap = target.kind == "cuda"
        runtime = require_compiler(target)
        build = BuildConfig(target, generate, runtime)
        self.builders = WorkerPool("dop.measure.builder:create", build, count, nice=10)
        self.runners = WorkerPool(RUNNERS[target.kind], RunConfig(target, timer, runtime), 1)
        self._best: dict[tuple[str, str], float] = {}
        self._next_id = 0
        self._ahead: dict[int, _Ahead] = {}

    def warm_up(self) -> None:
        """Starts the workers now; their imports take seconds."""
        self.builders.warm_up()
        self.runners.warm_up()

    @property
    def overlaps(self) -> bool:
        """Whether builders work while the runner times: not on the cores that it times."""
        return self._overlap

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Queue the builds of what `measure` will be asked for next, behind those under way."""
        if self._overlap:
            for job in jobs:
                task = self._id()
                self._ahead[task] = _Ahead(job)
                self._submit_build(task, job)

    def _submit_build(self, task: int, job: Job) -> None:
        self.builders.submit(task, BuildTask(job.workload, job.trace), self._limits.build_s)

    def _adopted(self, jobs: Sequence[Job]) -> dict[int, _Ahead]:
        """What was prefetched of `jobs`, by task."""
        wanted = {id(job) for job in jobs}
        found = {task: a for task, a in self._ahead.items() if id(a.job) in wanted}
        for task in found:
            del self._ahead[task]
        return found

    def measure(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Measurements as they finish: every (job, scenario) exactly once, failures included.

        Raises:
            WorkerError: workers do not start, for example because gcc or TVM is missing.
            ConfigError: a batch is cold, and x and y cannot come from memory there.
        """
        for job in jobs:
            self._check_cold(job)
        batch = _Batch(self, jobs)
        try:
            yield from batch.results()
        finally:
            if not batch.finished:
                self._ahead = {}
                self.builders.cancel()
                self.runners.cancel()

    def _check_cold(self, job: Job) -> None:
        """Refuses a cold batch where only warm ones are measured."""
        cold = next((scenario for scenario in job.scenarios if scenario.cold), None)
        if cold is not None and not self._overlap:
            raise ConfigError(
                f"{cold.key} wants x and y in memory, which is measured on GPUs only.",
                "Leave it out, or measure on a GPU.",
            )
        if cold is not None and job.workload.beside:
            raise ConfigError(
                f"{cold.key} wants x and y in memory, but beside a matmul they are in the cache.",
                "Leave it out, or take a workload that is not beside.",
            )

    def rss_bytes(self) -> int:
        """Resident memory of all workers."""
        return self.builders.rss_bytes() + self.runners.rss_bytes()

    def close(self) -> None:
        """Ends the workers."""
        self.builders.close()
        self.runners.close()

    def __enter__(self) -> LocalMeasurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _id(self) -> int:
        self._next_id += 1
        return self._next_id


class _Batch:
    """The jobs of one `measure` call on their way through builders and runner."""

    def __init__(self, measurer: LocalMeasurer, jobs: Sequence[Job]) -> None:
        self._m = measurer
        self._limits = measurer._limits
        self._adopted = measurer._adopted(jobs)
        known = {id(a.job): task for task, a in self._adopted.items()}
        self._states = {
            known.get(id(job)) or measurer._id(): _State(job) for job in jobs if job.scenarios
        }
        self._open = set(self._states)
        self._to_run: deque[int] = deque()
        self._ready: deque[Result] = deque()

    @property
    def finished(self) -> bool:
        """Whether every measurement was made."""
        return not self._open

    def results(self) -> Iterator[Result]:
        """Drives both pools until everything is measured."""
        for task, state in self._states.items():
            if task not in self._adopted:
                self._m._submit_build(task, state.job)
            else:
                for event in self._adopted[task].events:
                    self._on_build(event, state)
        pools = (self._m.builders, self._m.runners)
        while self._open:
            self._submit_runs()
            for pool in pools:
                pool.dispatch()
            connections = wait_any(pools, 1.0)
            for event in self._m.builders.collect(connections):
                if event.task in self._states:
                    self._on_build(event, self._states[event.task])
                elif event.task in self._m._ahead:
                    self._m._ahead[event.task].events.append(event)
            for event in self._m.runners.collect(connections):
                if event.task in self._states:
                    self._on_run(event, self._states[event.task])
            while self._ready:
                yield self._ready.popleft()

    def _submit_runs(self) -> None:
        if not self._m._overlap and self._m.builders.busy:
            return
        while self._to_run and self._m.runners.backlog < RUNS_QUEUED:
            task = self._to_run.popleft()
            self._submit_run(task, self._states[task])

    def _submit_run(self, task: int, state: _State) -> None:
        assert state.built is not None
        assert state.built.artifact is not None
        state.offset = state.done
        job = state.job
        best = tuple(self._best_s(job, n) for n in range(state.done, len(job.scenarios)))
        artifact = replace(state.built.artifact, source="")  # hundreds of KB, of no use there
        run = RunTask(artifact, job.workload, job.scenarios[state.done :], best)
        self._m.runners.submit(task, run, self._limits.run_s, self._limits.prepare_s)

    def _best_s(self, job: Job, position: int) -> float | None:
        """The best time known of a scenario: what was measured here, or what the caller knew."""
        given = job.best_s[position] if position < len(job.best_s) else None
        here = self._m._best.get((job.workload.key, job.scenarios[position].key))
        return min((s for s in (given, here) if s is not None), default=None)

    def _on_build(self, event: Event, state: _State) -> None:
        if event.kind == "item":
            state.built = event.value
            if state.built.failure is not Failure.NONE:
                self._fail_rest(event.task, state.built.failure, state.built.message)
            else:
                self._to_run.append(event.task)
        elif event.kind == "died" and event.signal == SIGKILL and not state.retries:
            state.retries += 1
            self._m._submit_build(event.task, state.job)
        elif event.kind == "died":
            self._fail_rest(event.task, Failure.BUILD, f"the builder ended: {event.value}")
        elif event.kind == "timeout":
            self._fail_rest(event.task, Failure.TIMEOUT, f"build {event.value}")
        elif event.kind == "error":
            self._fail_rest(event.task, Failure.UNKNOWN, str(event.value))

    def _on_run(self, event: Event, state: _State) -> None:
        if event.task not in self._open:
            return  # a runner whose CUDA context is poisoned ends behind its last answer
        if event.kind == "item":
            if isinstance(event.value, tuple):
                position, measurement = event.value
                assert position + state.offset == state.done
                self._deliver(event.task, measurement)
            elif isinstance(event.value, FirstLook):
                state.looks[event.value.position + state.offset] = event.value.measurement
        elif event.kind == "died" and event.signal == SIGKILL and not state.retries:
            state.retries += 1
            self._submit_run(event.task, state)
        elif event.kind == "died":
            self._fail_rest(event.task, Failure.LAUNCH, f"the candidate crashed: {event.value}")
        elif event.kind == "timeout":
            self._fail_rest(event.task, Failure.TIMEOUT, f"run {event.value}")
        elif event.kind == "error":
            self._fail_rest(event.task, Failure.UNKNOWN, str(event.value))

    def _fail_rest(self, task: int, failure: Failure, message: str) -> None:
        """One failure for all scenarios that are left: what broke one would break the others."""
        state = self._states[task]
        while task in self._open and state.done in state.looks:
            self._deliver(task, state.looks[state.done])
        if task not in self._open:
            return
        first = state.job.scenarios[state.done].key if state.built and state.done else ""
        while task in self._open:
            self._deliver(task, Measurement.failed(failure, message))
            if first:
                message, first = f"not run after {first}: {message}", ""

    def _deliver(self, task: int, measurement: Measurement) -> None:
        state = self._states[task]
        job, scenario = state.job, state.job.scenarios[state.done]
        build_s = state.built.seconds if state.built else 0.0
        cost = measurement.cost_s + build_s / len(job.scenarios)
        self._note_best(job, scenario, measurement)
        self._ready.append((job, scenario, replace(measurement, cost_s=cost)))
        state.done += 1
        if state.done == len(job.scenarios):
            self._open.discard(task)

    def _note_best(self, job: Job, scenario: Scenario, measurement: Measurement) -> None:
        key = (job.workload.key, scenario.key)
        if measurement.ok and measurement.median_s < self._m._best.get(key, float("inf")):
            self._m._best[key] = measurement.median_s


def build_all(
    target: Target, jobs: Sequence[Job], *, builders: int | None = None, generate: str = GENERATE
) -> list[Artifact]:
    """Artifacts of jobs, in order, for exports; nothing is run.

    Raises:
        BuildError: a job does not build.
    """
    from dop.errors import BuildError

    count = builders or min(MAX_BUILDERS, len(os.sched_getaffinity(0)))
    config = BuildConfig(target, generate, require_compiler(target))
    pool = WorkerPool("dop.measure.builder:create", config, count)
    done: dict[int, Artifact] = {}
    try:
        for position, job in enumerate(jobs):
            pool.submit(position, BuildTask(job.workload, job.trace), Limits().build_s)
        while pool.busy:
            for event in pool.step(1.0):
                if event.kind == "end":
                    continue
                built = event.value
                if event.kind != "item" or built.artifact is None:
                    why = built.message if isinstance(built, Built) else str(built)
                    raise BuildError(f"{jobs[event.task].workload.key} does not build: {why}.")
                done[event.task] = built.artifact
    finally:
        pool.close()
    return [done[position] for position in range(len(jobs))]
