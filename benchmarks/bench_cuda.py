"""Dop against torch on this GPU, case by case: best kernels of a log, the untuned default, torch.

    python -m benchmarks.bench_cuda --log FILE [--model Llama-3.1-8B] [--ranks 16,64] [--out FILE]

Everything is measured anew, in one run and in the same way: CUDA graphs of back-to-back calls that
rotate over adapters, replayed on a flushed L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.bench_cpu import Row, show, summary, traces_of
from benchmarks.torch_cuda import baselines
from dop import collect_env
from dop.cli.request import Request
from dop.errors import DopError
from dop.measure.base import Job
from dop.measure.hostinfo import find_target
from dop.measure.local import LocalMeasurer
from dop.scenario import Scenario
from dop.space.generate import build_space
from dop.space.trace import Trace
from dop.target import Target
from dop.workload import Workload


def bench(
    workload: Workload, scenarios: Sequence[Scenario], target: Target, log: Path
) -> Iterator[Row]:
    """Rows of one workload.

    Raises:
        DopError: the log lacks a case, or a kernel of it does not work any more.
    """
    traces = traces_of(workload, scenarios, target, log)
    default = build_space(workload, target).defaults()[0].trace
    times = _measure(workload, scenarios, target, traces, default)
    for scenario, loop_us, bmm_us in baselines(workload, scenarios, target):
        trace = traces[scenario.key]
        yield Row(
            workload.name,
            scenario.key,
            times[trace.key, scenario.key],
            times[default.key, scenario.key],
            loop_us,
            bmm_us,
            trace.key,
        )


def _measure(
    workload: Workload,
    scenarios: Sequence[Scenario],
    target: Target,
    traces: dict[str, Trace],
    default: Trace,
) -> dict[tuple[str, str], float]:
    """Microseconds by trace and scenario, of the winners where they won and of the default."""
    jobs = [Job(default, workload, tuple(scenarios))]
    for trace in {t.key: t for t in traces.values()}.values():
        if trace.key != default.key:
            mine = tuple(s for s in scenarios if traces[s.key].key == trace.key)
            jobs.append(Job(trace, workload, mine))
    found = {}
    with LocalMeasurer(target) as measurer:
        for job, scenario, measurement in measurer.measure(jobs):
            if not measurement.ok and job.trace.key != default.key:
                raise DopError(f"{workload.key} {scenario.key}: {measurement.message}.")
            found[job.trace.key, scenario.key] = measurement.median_s * 1e6
    return found


def main() -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    target = find_target("cuda")
    measured: list[Row] = []
    rows: list[dict[str, object]] = []
    for family in Request(options.model, ranks=options.ranks).families(target):
        print(family.workload.key)
        for row in bench(family.workload, family.scenarios, target, options.log):
            measured.append(row)
            where = {"workload_key": family.workload.key, "rank": family.workload.rank}
            rows.append(asdict(row) | where | {"speedup": row.speedup})
            show(row)
    figures = summary(measured)
    print(", ".join(f"{name} {value:.2f}x" for name, value in figures.items()))
    if options.out:
        document = {
            "model": options.model,
            "log": str(options.log),
            "device": target.device_name,
            "target": target.key,
            "date": time.strftime("%Y-%m-%d"),
            "versions": collect_env.versions(),
            "revision": collect_env.revision(),
            "summary": figures,
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DopError as error:
        sys.exit(f"error: {error}")
