"""What measuring is: jobs in, measurements out. The search and the tuner see only this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeVar

from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.trace import Trace
from dop.workload import Workload


@dataclass(frozen=True)
class Job:
    """One candidate and the batches it is to be measured under: one build, many timings."""

    trace: Trace
    workload: Workload
    scenarios: tuple[Scenario, ...]


Result = tuple[Job, Scenario, Measurement]

M = TypeVar("M", bound="Measurer")


class Measurer(Protocol):
    """Builds, checks and times candidates."""

    def measure(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Measurements as they finish: every (job, scenario) exactly once, failures included."""
        ...

    def close(self) -> None:
        """Ends the workers; nothing can be measured afterwards."""
        ...

    def __enter__(self: M) -> M: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
