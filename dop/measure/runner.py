"""What CPU and CUDA runners share: their configuration, their task, their answers.

A runner's handler yields PREPARED, then (position in the task's scenarios, Measurement) for each
scenario in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dop.errors import Failure
from dop.measure.artifact import Artifact
from dop.measure.timer import TimerSettings
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.target import Target
from dop.workload import Workload


@dataclass(frozen=True)
class RunConfig:
    """What every run of a worker shares.

    Attributes:
        runtime: cpu_runtime.c compiled, or nothing to have each worker compile it (CPU).
    """

    target: Target
    timer: TimerSettings
    runtime: bytes = b""


@dataclass(frozen=True)
class RunTask:
    """One artifact and the batches to time it under.

    Attributes:
        best_s: per scenario the best time known so far; candidates far behind get fewer repeats.
    """

    artifact: Artifact
    workload: Workload
    scenarios: tuple[Scenario, ...]
    best_s: tuple[float | None, ...] = field(default=())

    def best_of(self, position: int) -> float | None:
        """Best time known for a scenario."""
        return self.best_s[position] if position < len(self.best_s) else None


@dataclass(frozen=True)
class FirstLook:
    """A measurement that a second look may improve; it counts if the runner ends before that."""

    position: int
    measurement: Measurement


PREPARED = "prepared"
"""Item that a runner yields when inputs and references are ready; it renews the time limit."""


def fail_all(
    task: RunTask, failure: Failure, message: str, accuracy: float | None = None
) -> Iterator[tuple[int, Measurement]]:
    """One failure for every scenario of a task."""
    text = " ".join(message.split())[:500]
    for position in range(len(task.scenarios)):
        yield position, Measurement((), failure, text, accuracy=accuracy)
