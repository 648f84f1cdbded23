"""The loop that tunes an engine's kernels: Dop's strategy asks, the engine's kernel is timed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dop.cost_model.gbdt import GbdtModel
from dop.effort import Effort
from dop.engine_kernels import log
from dop.engine_kernels.space import build_space, options
from dop.engine_kernels.task import EngineTask, scenarios_of
from dop.errors import DopError
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.search.evolutionary import EvolutionaryStrategy
from dop.search.history import Result
from dop.space.sketch import Candidate
from dop.target import Target

BATCH = 8
"""Candidates per `ask`."""


class EngineRunner(Protocol):
    """Times one engine's kernel: engine_kernels/run_vllm.py and run_sglang.py."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the engine and its compiler."""
        ...

    def measure(
        self, task: EngineTask, chosen: Mapping[str, int], scenarios: Sequence[Scenario]
    ) -> list[Measurement]:
        """One measurement per batch; a failure is a measurement, not an exception."""
        ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task came to.

    Attributes:
        task: which.
        trials: candidates timed in this run.
        gain: geometric mean over the batches' best of (time of the engine's default / best time).
    """

    task: EngineTask
    trials: int
    gain: float


def tune_engine(
    tasks: Sequence[EngineTask],
    *,
    runner: EngineRunner,
    target: Target,
    tokens: Sequence[int],
    path: Path,
    effort: Effort,
    trials: int,
    budget_s: float,
    seed: int = 0,
    on_task: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:
    """Tune every task for up to `trials` candidates; all lines are appended to `path` at once.

    What the log already holds for a task is taken in first, so the same command continues. The
    time is shared: a task gets what is left, divided by the tasks that are left.
    """
    known = log.read(path)[0] if path.exists() else []
    end = time.monotonic() + budget_s
    outcomes = []
    for place, task in enumerate(tasks):
        share = (end - time.monotonic()) / (len(tasks) - place)
        run = _TaskRun(task, target, tokens, effort, seed)
        run.restore(r for r in known if r.task.key == task.key and r.device == target.device_name)
        run.go(runner, path, trials, share)
        outcomes.append(run.outcome())
        on_task(outcomes[-1])
    return outcomes


class _TaskRun:
    """One task's search."""

    def __init__(
        self, task: EngineTask, target: Target, tokens: Sequence[int], effort: Effort, seed: int
    ) -> None:
        self._task, self._target = task, target
        self._scenarios = scenarios_of(task, tokens)
        self._space = build_space(task, target)
        model = GbdtModel(self._space, task.workload, target, effort.model, seed)
        rng = random.Random(f"{seed}|{task.key}")
        self._strategy = EvolutionaryStrategy(
            self._space, task.workload, target, self._scenarios, rng, model, effort.search
        )
        self._default = self._space.defaults()[0] if self._space.defaults() else None
        self._trials = 0
        self._best: dict[str, float] = {}
        self._untuned: dict[str, float] = {}

    def restore(self, records: Iterable[log.EngineRecord]) -> None:
        """Take in earlier lines; those of another space are left out."""
        by_key = {s.key: s for s in self._scenarios}
        results: list[Result] = []
        for record in records:
            scenario = by_key.get(record.scenario.key)
            try:
                candidate = self._space.match(record.trace)
            except DopError:
                continue
            if scenario is not None:
                results.append((candidate, scenario, record.measurement))
        self._take(results)
        self._strategy.restore(results)
        self._strategy.learn()

    def go(self, runner: EngineRunner, path: Path, trials: int, seconds: float) -> None:
        """Ask, time, append, tell, until the trials or the time are used up."""
        end = time.monotonic() + seconds
        while self._scenarios and self._trials < trials:
            candidates = self._strategy.ask(min(BATCH, trials - self._trials))
            if not candidates or time.monotonic() > end:
                return
            results: list[Result] = []
            for candidate in candidates:
                results += self._time(runner, path, candidate)
                if time.monotonic() > end:
                    break
            self._take(results)
            self._strategy.tell(results)

    def _time(self, runner: EngineRunner, path: Path, candidate: Candidate) -> list[Result]:
        chosen = options(self._task, candidate.values)
        measured = runner.measure(self._task, chosen, self._scenarios)
        self._trials += 1
        pairs = list(zip(self._scenarios, measured, strict=True))
        device, versions = self._target.device_name, runner.versions
        log.append(
            path,
            (
                log.EngineRecord(self._task, s, chosen, candidate.trace, m, device, versions)
                for s, m in pairs
            ),
        )
        return [(candidate, scenario, measurement) for scenario, measurement in pairs]

    def _take(self, results: Sequence[Result]) -> None:
        for candidate, scenario, measurement in results:
            if not measurement.ok:
                continue
            seconds = measurement.median_s
            self._best[scenario.key] = min(seconds, self._best.get(scenario.key, seconds))
            if self._default is not None and candidate.trace == self._default.trace:
                self._untuned[scenario.key] = seconds

    def outcome(self) -> Outcome:
        """What came of it so far."""
        gains = [self._untuned[k] / s for k, s in self._best.items() if k in self._untuned]
        product = 1.0
        for gain in gains:
            product *= gain
        return Outcome(self._task, self._trials, product ** (1 / len(gains)) if gains else 1.0)
