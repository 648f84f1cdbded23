"""Builds, checks and times one record's kernel again and again, each time under all batches given.

    python benchmarks/repeat_record.py logs/h200.jsonl.xz --line 29167 --times 20 \
        --scenario T16/distinct/16 --scenario T128/identical/1

The record need not be one that today's limits allow. Exit status 1 if a run failed.
"""

from __future__ import annotations

import argparse
import sys

from dop.database.jsonl import read_log
from dop.measure.base import Job
from dop.measure.hostinfo import find_target
from dop.measure.local import LocalMeasurer
from dop.scenario import Scenario
from dop.workload import Workload


def main() -> int:
    """Measures and prints a line per run and batch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log")
    parser.add_argument("--line", type=int, required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--scenario", action="append", default=[])
    arguments = parser.parse_args()
    entries = read_log(arguments.log).entries
    record = next(entry for entry in entries if entry.line == arguments.line).record()
    keys = arguments.scenario or [record.scenario_key]
    job = Job(
        record.trace,
        Workload.parse(record.workload_key),
        tuple(Scenario.parse(key) for key in keys),
    )
    failed = 0
    with LocalMeasurer(find_target("cuda")) as measurer:
        for run in range(arguments.times):
            for _, scenario, m in measurer.measure([job]):
                failed += not m.ok
                said = f"{m.median_s * 1e6:9.2f} us {m.accuracy:.1e}" if m.ok else m.message
                print(f"{run:3} {scenario.key:24} {m.failure.name:12} {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
