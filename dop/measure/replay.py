"""Measuring without measuring: answers from recorded tables or a log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from dop.errors import Failure
from dop.measure.base import Job, Result
from dop.measurement import Measurement

if TYPE_CHECKING:
    from dop.database.record import Record

Table = Mapping[tuple[str, str], Measurement]
"""(Trace.key, Scenario.key) -> measurement."""

WorkloadTable = Mapping[tuple[str, str, str], Measurement]
"""(Workload.key, Trace.key, Scenario.key) -> measurement."""


class RecordedMeasurer:
    """Answers from a table; what is not in it fails as UNKNOWN.

    Args:
        table: by trace and scenario, for one workload.
    """

    def __init__(self, table: Table) -> None:
        self._table = dict(table)
        self._by_workload: WorkloadTable = {}

    overlaps = False

    def prefetch(self, jobs: Sequence[Job]) -> None:
        """Nothing is built."""

    @staticmethod
    def from_records(records: Iterable[Record]) -> RecordedMeasurer:
        """Measurer that answers from a log, workload by workload; the last record of a
        (workload, trace, scenario) counts."""
        measurer = RecordedMeasurer({})
        measurer._by_workload = {
            (r.workload_key, r.trace.key, r.scenario_key): r.measurement for r in records
        }
        return measurer

    def measure(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Recorded measurements in the order of the jobs."""
        missing = Measurement.failed(Failure.UNKNOWN, "not in the recorded measurements")
        for job in jobs:
            trace = job.trace.key
            for scenario in job.scenarios:
                found = self._table.get((trace, scenario.key)) or self._by_workload.get(
                    (job.workload.key, trace, scenario.key)
                )
                yield job, scenario, found or missing

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> RecordedMeasurer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
