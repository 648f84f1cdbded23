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
    """One candidate and the batches it is to be measured under: one build, many timings.

    Attributes:
        best_s: per scenario the best time known, or None: what is far behind is timed less often.
    """

    trace: Trace
    workload: Workload
    scenarios: tuple[Scenario, ...]
    best_s: tuple[float | None, ...] = ()


Result = tuple[Job, Scenario, Measurement]

M = TypeVar("M", bound="Measurer")


class Measurer(Protocol):
    """Builds, checks and times candidates."""

    @property
    def overlaps(self) -> bool:
        """Whether candidates can be built while others are timed."""
        ...

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Start building what will be measured next. Only a `measure` of these very jobs waits
        for it; nothing happens where `overlaps` is false."""
        ...

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
