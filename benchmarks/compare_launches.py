"""Times a log's best kernels with other values of PR dependent_launch, side by side in one run.

    python benchmarks/compare_launches.py logs/h200.jsonl.xz --values 2 3 \
        --workload "sgmv/bfloat16/r16/4096->4096" --scenario T1/identical/1

One line per workload and batch: time and error as the log has them and with each value, and the
last value's difference to the first's. Kernels that do not know all of the values are passed over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dop.database.jsonl import read_log
from dop.database.query import best
from dop.database.record import Record
from dop.measure.base import Job
from dop.measure.hostinfo import find_target
from dop.measure.local import LocalMeasurer
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.early import DEPENDENT
from dop.space.generate import build_space
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload


def variants(record: Record, target: Target, values: Sequence[int]) -> list[Trace]:
    """The record's trace with each value; none if its sketch does not know one of them."""
    for sketch in build_space(Workload.parse(record.workload_key), target).sketches:
        annotation = sketch.match(record.trace)
        if annotation is None or DEPENDENT not in annotation:
            continue
        choices = next(d.choices for d in sketch.domains if d.name == DEPENDENT)
        if set(values) <= set(choices):
            made = [{**annotation, DEPENDENT: value} for value in values]
            return [sketch.bind(m) for m in made if sketch.broken_limit(annotation) is None]
    return []


@dataclass(frozen=True)
class Row:
    """A record and its variants."""

    record: Record
    jobs: tuple[Job, ...]


def rows(records: Sequence[Record], target: Target, values: Sequence[int]) -> Iterator[Row]:
    """The records that know all of the values."""
    for record in records:
        workload = Workload.parse(record.workload_key)
        batch = (Scenario.parse(record.scenario_key),)
        made = tuple(Job(trace, workload, batch) for trace in variants(record, target, values))
        if made:
            yield Row(record, made)


def said(values: Sequence[int], results: Sequence[Measurement]) -> str:
    """Times and errors of a row's variants."""
    parts = []
    for value, m in zip(values, results, strict=True):
        text = f"{m.median_s * 1e6:8.2f} us {m.accuracy:.1e}" if m.ok else m.message
        parts.append(f"{value}: {text}")
    if all(m.ok for m in results) and len(results) > 1:
        parts.append(f"{(results[-1].median_s - results[0].median_s) * 1e6:+.2f}")
    return "  ".join(parts)


def wanted(record: Record, options: argparse.Namespace) -> bool:
    """Whether a record is asked for."""
    return (
        (not options.workload or record.workload_key in options.workload)
        and (not options.scenario or record.scenario_key in options.scenario)
        and options.sketch in record.sketch
    )


def main() -> int:
    """Measures and prints; 1 if a variant was wrong or did not run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--values", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--workload", action="append", default=[])
    parser.add_argument("--scenario", action="append", default=[])
    parser.add_argument("--sketch", default="", help="part of a sketch's name")
    options = parser.parse_args()
    target = find_target("cuda")
    winners = (entry.record() for entry in best(read_log(options.log).entries).values())
    listed = list(rows([r for r in winners if wanted(r, options)], target, options.values))
    jobs = [job for row in listed for job in row.jobs]
    with LocalMeasurer(target) as measurer:
        found = {
            (job.workload.key, scenario.key, job.trace.key): m
            for job, scenario, m in measurer.measure(jobs)
        }
    bad = 0
    for row in listed:
        key = row.record.workload_key, row.record.scenario_key
        results = [found[key[0], key[1], job.trace.key] for job in row.jobs]
        bad += sum(not m.ok for m in results)
        was = row.record.measurement
        log = f"log: {was.median_s * 1e6:8.2f} us {was.accuracy:.1e}"
        print(f"{key[0]:42} {key[1]:20} {log}  {said(options.values, results)}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
