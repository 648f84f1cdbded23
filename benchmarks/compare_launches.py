"""Times a log's best kernels with other values of PR dependent_launch, side by side in one run.

    python benchmarks/compare_launches.py logs/h200.jsonl.xz --values 2 3 \
        --workload "sgmv/bfloat16/r16/4096->4096" --scenario T1/identical/1

One line per workload and batch: microseconds of each value, and the difference of the last to the
first. Batches whose best kernel does not know all of the values are passed over.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence

from dop.database.jsonl import read_log
from dop.database.query import best
from dop.database.record import Record
from dop.measure.base import Job
from dop.measure.hostinfo import find_target
from dop.measure.local import LocalMeasurer
from dop.scenario import Scenario
from dop.space.generate import build_space
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload

PARAMETER = "expand.dependent"


def variants(record: Record, target: Target, values: Sequence[int]) -> list[Trace]:
    """The record's trace with each value; none if its sketch does not know one of them."""
    for sketch in build_space(Workload.parse(record.workload_key), target).sketches:
        annotation = sketch.match(record.trace)
        if annotation is None or PARAMETER not in annotation:
            continue
        choices = next(d.choices for d in sketch.domains if d.name == PARAMETER)
        if set(values) <= set(choices):
            made = [{**annotation, PARAMETER: value} for value in values]
            return [sketch.bind(m) for m in made if sketch.broken_limit(annotation) is None]
    return []


def jobs(records: Sequence[Record], target: Target, values: Sequence[int]) -> Iterator[Job]:
    """A job per record and value, those of a record side by side."""
    for record in records:
        workload, scenario = (
            Workload.parse(record.workload_key),
            Scenario.parse(record.scenario_key),
        )
        for trace in variants(record, target, values):
            yield Job(trace, workload, (scenario,))


def main() -> int:
    """Measures and prints; 1 if a variant was wrong or did not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--values", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--workload", action="append", default=[])
    parser.add_argument("--scenario", action="append", default=[])
    arguments = parser.parse_args()
    target = find_target("cuda")
    winners = [entry.record() for entry in best(read_log(arguments.log).entries).values()]
    wanted = [
        record
        for record in winners
        if (not arguments.workload or record.workload_key in arguments.workload)
        and (not arguments.scenario or record.scenario_key in arguments.scenario)
    ]
    listed = list(jobs(wanted, target, arguments.values))
    with LocalMeasurer(target) as measurer:
        found = {
            (job.trace.key, job.workload.key, s.key): m for job, s, m in measurer.measure(listed)
        }
    bad = 0
    for at in range(0, len(listed), len(arguments.values)):
        group = listed[at : at + len(arguments.values)]
        scenario = group[0].scenarios[0].key
        results = [found[job.trace.key, job.workload.key, scenario] for job in group]
        bad += sum(not m.ok for m in results)
        times = [statistics.median(m.seconds) * 1e6 if m.ok else float("nan") for m in results]
        text = "  ".join(f"{v}: {t:7.2f}" for v, t in zip(arguments.values, times, strict=True))
        why = " ".join(m.message for m in results if not m.ok)
        print(f"{group[0].workload.key:45} {scenario:20} {text}  {times[-1] - times[0]:+.2f} {why}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
