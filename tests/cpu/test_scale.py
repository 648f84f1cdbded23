"""A log of 100,000 records opens, resumes and reports in about 10 s of an idle machine at most.

Bounds are on processor time, with a factor of about two over what a 2-core machine of 2026 needs,
because a test machine is neither idle nor always as fast. A pass over the log that got quadratic,
or reads every record's steps again, exceeds them by far.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from big_log import families, write_big_log

from dop.database import query
from dop.database.jsonl import Log, LogContents, read_log
from dop.measure.base import Job
from dop.measurement import Measurement
from dop.report.data import collect
from dop.scenario import Scenario
from dop.tune import tune

RECORDS = 100_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_big_log(tmp_path_factory.mktemp("scale") / "big.jsonl", RECORDS)


def cpu_s(work: Callable[[], object]) -> float:
    """Processor time of all threads, in seconds."""
    begin = time.process_time()
    work()
    seconds = time.process_time() - begin
    print(f"{seconds:.1f} s")
    return seconds


@pytest.fixture(scope="module")
def contents(path: Path) -> LogContents:
    found: list[LogContents] = []
    assert cpu_s(lambda: found.append(read_log(path))) < 9
    return found[0]


class _AskedError(Exception):
    pass


class _Asked:
    """Stops the run at the first batch, so that what was timed is the way there."""

    overlaps = False

    def measure(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Scenario, Measurement]]:
        assert jobs
        raise _AskedError

    def close(self) -> None:
        pass


def test_opens(contents: LogContents) -> None:
    assert len(contents.entries) == RECORDS
    assert not contents.warnings()


def test_best_and_stats(contents: LogContents) -> None:
    winners = query.best(contents.entries)
    assert cpu_s(lambda: query.best(contents.entries)) < 3
    assert len(winners) == len({e.task_key for e in contents.entries}) == 104
    assert cpu_s(lambda: query.stats(contents.entries)) < 2


def test_reports(contents: LogContents) -> None:
    assert cpu_s(lambda: collect(contents)) < 6


def test_resumes(path: Path) -> None:
    notes: list[str] = []

    def resume() -> None:
        with Log.open(path) as log, pytest.raises(_AskedError):
            tune(
                families(),
                measurer=_Asked(),  # type: ignore[arg-type]
                log=log,
                budget_s=1000.0,
                on_event=lambda event: notes.append(str(event)),
            )

    assert cpu_s(resume) < 25  # the training of further families is running by then
    assert any(f"continuing after {RECORDS} records" in note for note in notes)


def test_memory() -> None:
    """Everything above in one process, which also wrote the log: far less than 4 GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    assert peak < 4 << 30, f"{peak >> 20} MiB"
