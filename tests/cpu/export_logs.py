"""Small logs for the tests of dispatch and export: real default traces, times made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dop.database.jsonl import Log
from dop.database.record import Record
from dop.errors import Failure
from dop.measurement import Measurement
from dop.scenario import Scenario
from dop.space.sketch import Candidate
from dop.space.trace import Trace
from dop.target import SM_90, Target
from dop.workload import Workload

CPU = Target("cpu", "x86-64-v3", "a test CPU", 2, 1, 0, 16, 1 << 20, 32, "+avx2,+fma")
VERSIONS = {"dop": "0.1.0", "tvm": "0.27.0", "cuda": "13.0"}


def record(
    workload: Workload,
    scenario: Scenario,
    trace: Trace,
    seconds: float,
    *,
    target: Target = SM_90,
    accuracy: float = 1e-6,
    failure: Failure = Failure.NONE,
    timestamp: int = 1_800_000_000,
    floor_s: float | None = 1e-7,
) -> Record:
    if failure is Failure.NONE:
        measurement = Measurement((seconds,), accuracy=accuracy, floor_s=floor_s)
    else:
        measurement = Measurement((), failure, "made up")
    return Record(
        workload.key,
        target.key,
        target.hardware_params,
        scenario.key,
        target.device_name,
        trace,
        measurement,
        timestamp,
        "made/up",
        VERSIONS,
    )


def write_log(path: Path, records: Sequence[Record]) -> Path:
    with Log.open(path) as log:
        log.append(*records)
    return path


def defaults(workload: Workload, target: Target = SM_90) -> list[Candidate]:
    """The default candidate of every sketch."""
    from dop.space.generate import build_space

    return build_space(workload, target).defaults()


def records_of(
    workload: Workload,
    traces: Mapping[str, Trace],
    times_us: Mapping[str, Mapping[str, float]],
    *,
    target: Target = SM_90,
) -> list[Record]:
    """Records from {scenario key: {trace name: microseconds}}."""
    return [
        record(workload, Scenario.parse(key), traces[name], us * 1e-6, target=target)
        for key, times in times_us.items()
        for name, us in times.items()
    ]
