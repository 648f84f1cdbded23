"""`dop replay`: measure a log's best records again, from their lines alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

if TYPE_CHECKING:
    from rich.console import Console

    from dop.database.wire import Entry
    from dop.measure.base import Job
    from dop.measurement import Measurement
    from dop.target import Target

DIFFERENT = 1


@dataclass(frozen=True, slots=True)
class Replayed:
    """A best record and its second measurement.

    Attributes:
        ratio: second time over recorded time; infinite if it failed.
        same: whether it ran, was right, and took no longer than the tolerance allows.
    """

    workload: str
    scenario: str
    trace: str
    recorded_us: float
    replayed_us: float
    ratio: float
    accuracy: float | None
    failure: str
    same: bool


def replay(
    log: Annotated[Path, Argument(metavar="LOG", help="Tuning log.")],
    device: Annotated[str | None, Option(help="cuda or cpu. Default: the GPU if any.")] = None,
    task: Annotated[str | None, Option(help="Only tasks whose key contains this.")] = None,
    tolerance: Annotated[float, Option(min=1.0, help="Most the time may grow.")] = 1.25,
    as_json: Annotated[bool, Option("--json", help="Print one JSON document.")] = False,
) -> int:
    """Build, check and time the best record of every task of this device again.

    Exit code 1 if one fails, is wrong, or takes longer than TOLERANCE times its record.
    """
    from dop.cli.output import emit
    from dop.database.jsonl import read_log
    from dop.database.query import best
    from dop.errors import LogError
    from dop.measure.hostinfo import find_target

    target = find_target(device)
    contents = read_log(log)
    found = best(contents.entries, device=target.device_name)
    chosen = {key: entry for key, entry in found.items() if task is None or task in key}
    if not chosen:
        raise LogError(
            f"{log} holds no best record of {target.device_name}"
            + (f" for tasks with {task!r}." if task else "."),
            "Tune on this device first, or give another log.",
        )
    rows = list(_measure_again(target, chosen.values(), tolerance))
    emit({"log": log, "tolerance": tolerance, "tasks": rows}, as_json, lambda c: _show(c, rows))
    return 0 if all(row.same for row in rows) else DIFFERENT


def _measure_again(
    target: Target, entries: Iterable[Entry], tolerance: float
) -> Iterable[Replayed]:
    """Second measurements; entries that share a trace share its build."""
    from dop.measure.local import LocalMeasurer

    jobs, recorded = jobs_of(entries)
    with LocalMeasurer(target) as measurer:
        for job, scenario, found in measurer.measure(jobs):
            entry = recorded[job.workload.key, job.trace.key, scenario.key]
            yield _compare(entry, found, tolerance)


def jobs_of(entries: Iterable[Entry]) -> tuple[list[Job], dict[tuple[str, str, str], Entry]]:
    """A job for each trace, with the batches it is best for; the entries by workload, trace and
    batch."""
    from dop.measure.base import Job
    from dop.scenario import Scenario
    from dop.workload import Workload

    groups: dict[tuple[str, str], list[Entry]] = {}
    recorded = {}
    for entry in entries:
        groups.setdefault((entry.workload_key, entry.trace_key), []).append(entry)
        recorded[entry.workload_key, entry.trace_key, entry.scenario_key] = entry
    jobs = []
    for (workload, _), members in groups.items():
        scenarios = tuple(Scenario.parse(member.scenario_key) for member in members)
        jobs.append(Job(members[0].record().trace, Workload.parse(workload), scenarios))
    return jobs, recorded


def _compare(entry: Entry, found: Measurement, tolerance: float) -> Replayed:
    ratio = found.median_s / entry.median_s
    return Replayed(
        entry.workload_key,
        entry.scenario_key,
        entry.trace_key,
        entry.median_s * 1e6,
        found.median_s * 1e6,
        ratio,
        found.accuracy,
        found.failure.name.lower() if not found.ok else "",
        found.ok and ratio <= tolerance,
    )


def _show(console: Console, rows: list[Replayed]) -> None:
    from rich.table import Table

    table = Table(box=None)
    for name in ("workload", "batch"):
        table.add_column(name, no_wrap=True)
    for name in ("recorded us", "again us", "ratio", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        error = "-" if row.accuracy is None else f"{row.accuracy:.1e}"
        times = (f"{row.recorded_us:.1f}", f"{row.replayed_us:.1f}", f"{row.ratio:.2f}x")
        table.add_row(row.workload, row.scenario, *times, error)
    console.print(table)
    same = sum(row.same for row in rows)
    ratios = [row.ratio for row in rows if math.isfinite(row.ratio)]
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else math.inf
    for row in rows:
        if not row.same:
            what = row.failure or f"{row.ratio:.2f}x slower than recorded"
            console.print(f"{row.workload} {row.scenario}: {what}")
    console.print(f"{same} of {len(rows)} best records replay; geometric mean {mean:.3f}x.")
