"""What a tuning run tells while it goes on, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dop.errors import Failure
from dop.family import Best, FamilyState
from dop.scenario import Scenario
from dop.workload import Workload


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What tuning found for one task; times in seconds, None if nothing worked.

    Attributes:
        default_s: the untuned heuristic default, measured in the same way.
        floor_s: bytes that must move over the measured copy bandwidth.
        accuracy: of the best, max |got - want| / max |want|.
    """

    workload: Workload
    scenario: Scenario
    best: Best | None
    default_s: float | None

    @property
    def best_s(self) -> float | None:
        """Median time of the best."""
        return self.best.measurement.median_s if self.best else None

    @property
    def floor_s(self) -> float | None:
        """The floor beside the best."""
        return self.best.measurement.floor_s if self.best else None

    @property
    def accuracy(self) -> float | None:
        """Error of the best against the reference."""
        return self.best.measurement.accuracy if self.best else None


@dataclass(frozen=True, slots=True)
class FamilyView:
    """A family in a progress report."""

    workload: Workload
    trials: int
    tasks: tuple[TaskResult, ...]
    spearman: float | None


@dataclass(frozen=True, slots=True)
class Progress:
    """State of a run after a record.

    Attributes:
        trials: candidates built in this run.
        records: records written in this run.
        resumed: records of the log that this run started from.
        left_s: wall time left.
        failures: records of this run by failure class.
        current: workload that is being measured.
    """

    elapsed_s: float
    left_s: float
    trials: int
    records: int
    resumed: int
    failures: Mapping[Failure, int]
    families: tuple[FamilyView, ...]
    current: str


@dataclass(frozen=True, slots=True)
class Note:
    """One line a person should read."""

    text: str


Event = Progress | Note


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a run gave.

    Attributes:
        progress: the state at the end.
        interrupted: Ctrl-C ended it; everything measured is in the log.
        stopped_by: "budget", "trials", "exhausted" or "interrupt".
        begun_with: kernels of earlier searches that were to be tried first, by where they came from
            (`Prior.origin`).
    """

    progress: Progress
    interrupted: bool
    stopped_by: str
    begun_with: Mapping[str, int] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[TaskResult, ...]:
        """Every task's result, family by family."""
        return tuple(task for family in self.progress.families for task in family.tasks)


def view(state: FamilyState) -> FamilyView:
    """The family as a progress report shows it."""
    tasks = []
    for scenario in state.family.scenarios:
        default = state.default.get(scenario.key)
        best = state.best.get(scenario.key)
        default_s = default.median_s if default else None
        tasks.append(TaskResult(state.family.workload, scenario, best, default_s))
    correlation = state.strategy.rank_correlation()
    return FamilyView(state.family.workload, state.trials, tuple(tasks), correlation)
