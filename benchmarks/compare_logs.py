"""Times the best kernels of two logs in one run, task by task, and says how much slower the first
log's are. Asks whether a search finds again what a longer one found:

    dop tune --model Llama-3.1-8B --no-packs --log again.jsonl       # from nothing, default budget
    python -m benchmarks.compare_logs again.jsonl logs/h100.best.jsonl

Tasks are those that both logs have for this device. Exit status 1 if the geometric mean is above
`--within` (1.05), or a kernel fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from dop.cli.replay import jobs_of
from dop.database.jsonl import read_log
from dop.database.query import best
from dop.database.wire import Entry
from dop.errors import DopError, LogError
from dop.measure.base import Measurer
from dop.measure.hostinfo import find_target
from dop.measure.local import LocalMeasurer


@dataclass(frozen=True)
class Row:
    """A task: the first log's time and the other's, in microseconds.

    Attributes:
        ratio: first over other; infinite if one failed.
        failure: why one did.
    """

    task: str
    us: float
    other_us: float
    ratio: float
    failure: str = ""


def both(
    entries: Mapping[str, Entry], others: Mapping[str, Entry], measurer: Measurer, rounds: int
) -> list[Row]:
    """Every common task's kernels, measured in turn `rounds` times; the medians count."""
    tasks = [task for task in entries if task in others]
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    failures: dict[str, str] = {}
    for number in range(rounds):
        pairs = ((0, entries), (1, others))
        for which, mine in pairs if number % 2 == 0 else reversed(pairs):
            jobs, recorded = jobs_of(mine[task] for task in tasks)
            for job, scenario, found in measurer.measure(jobs):
                task = recorded[job.workload.key, job.trace.key, scenario.key].task_key
                if found.ok:
                    seconds[task, which].append(found.median_s)
                else:
                    failures[task] = f"{found.failure.name.lower()}: {found.message}"
    return [
        _row(task, seconds[task, 0], seconds[task, 1], failures.get(task, "")) for task in tasks
    ]


def _row(task: str, first: Sequence[float], other: Sequence[float], failure: str) -> Row:
    if failure or not first or not other:
        return Row(task, 0.0, 0.0, float("inf"), failure or "not measured")
    us, other_us = (1e6 * statistics.median(times) for times in (first, other))
    return Row(task, us, other_us, us / other_us)


def mean_of(rows: Sequence[Row]) -> float:
    """Geometric mean of the ratios."""
    return statistics.geometric_mean([row.ratio for row in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("other")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    parser.add_argument("--task", default="", help="only tasks whose key contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--within", type=float, default=1.05, help="largest mean that is fine")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    try:
        target = find_target(options.device)
        found = []
        for path in (options.log, options.other):
            entries = read_log(path).require_entries().entries
            kept = best(entries, device=target.device_name)
            found.append({task: e for task, e in kept.items() if options.task in task})
        if not found[0].keys() & found[1].keys():
            raise LogError(
                f"No task of {target.device_name} is in both logs.", "Tune the same workloads here."
            )
        with LocalMeasurer(target) as measurer:
            rows = both(found[0], found[1], measurer, options.rounds)
    except DopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    fine = mean_of(rows) <= options.within
    if options.json:
        print(json.dumps({"geomean": mean_of(rows), "tasks": [asdict(row) for row in rows]}))
        return int(not fine)
    for row in sorted(rows, key=lambda row: row.ratio):
        said = row.failure or f"{row.us:9.2f} {row.other_us:9.2f} us  {row.ratio:.3f}x"
        print(f"{row.task.rpartition('|')[0]:64} {said}")
    print(
        f"{len(rows)} tasks, geometric mean {mean_of(rows):.3f}x, at most {options.within}x wanted"
    )
    return int(not fine)


if __name__ == "__main__":
    sys.exit(main())
