"""Measurers for tests: they answer from the made-up device, and fail or stop where told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import synthetic

from dop.errors import Failure
from dop.measure.base import Job
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.sketch import Space


class FakeMeasurer:
    """Times of `synthetic.Device`.

    Args:
        space: finds the candidate of a trace.
        failing: trace key -> failure to inject.
        delay_s: time each job takes.
        before: called before every answer with the number of answers so far; may raise.
        overlaps: pretend that builds overlap with timing, so that the tuner plans ahead.
    """

    def __init__(
        self,
        space: Space,
        device: synthetic.Device | None = None,
        failing: Mapping[str, Failure] | None = None,
        delay_s: float = 0.0,
        before: Callable[[int], None] | None = None,
        overlaps: bool = False,
    ) -> None:
        self.space = space
        self.device = device or synthetic.Device()
        self.failing = dict(failing or {})
        self.delay_s = delay_s
        self.before = before
        self.measured: list[tuple[str, str, str]] = []
        self.closed_early = 0
        self.overlaps = overlaps
        self.ahead: list[Job] = []

    def prefetch(self, jobs: Sequence[Job]) -> None:
        self.ahead += jobs

    def measure(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Scenario, Measurement]]:
        done = False
        try:
            for job in jobs:
                time.sleep(self.delay_s)
                for scenario in job.scenarios:
                    if self.before is not None:
                        self.before(len(self.measured))
                    key = job.trace.key
                    self.measured.append((job.workload.key, key, scenario.key))
                    yield job, scenario, self._answer(job, scenario, key)
            done = True
        finally:
            self.closed_early += not done

    def _answer(self, job: Job, scenario: Scenario, key: str) -> Measurement:
        if key in self.failing:
            return Measurement.failed(self.failing[key], "injected")
        return self.device.measure(self.space.match(job.trace), scenario, job.workload)

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeMeasurer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
