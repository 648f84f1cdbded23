from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from log_samples import SPLIT_K, record, small_traces

from dop.database import query, wire
from dop.database.jsonl import LogContents, read_log
from dop.database.record import Record
from dop.errors import Failure, LogError, TraceError
from dop.measure.accuracy import TOLERANCES
from dop.space.step import ComputeAtStep, ComputeInlineStep, FollowSplitStep, SplitStep
from dop.space.trace import Trace
from dop.target import SM_90, Target

OTHER = Trace((ComputeInlineStep(0),))
THIRD = Trace((ComputeInlineStep(1),))


def entries_of(*records: Record) -> list[wire.Entry]:
    return [wire.parse_entry(wire.dump(r), n) for n, r in enumerate(records, start=1)]


def contents_of(path: Path, *lines: bytes) -> LogContents:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return read_log(path)


def test_the_tolerance_is_the_accuracy_gates() -> None:
    assert {dtype: t.largest for dtype, t in TOLERANCES.items()} == query.TOLERANCE
    assert query.tolerance_of("sgmv/bfloat16/r16/8->8") == TOLERANCES["bfloat16"].largest
    assert query.tolerance_of("nonsense") == TOLERANCES["float32"].largest


def test_best_is_the_fastest_of_each_task() -> None:
    found = query.best(
        entries_of(
            record(us=9),
            record(us=5, trace=OTHER),
            record(us=7, trace=THIRD),
            record(us=3, scenario="T1/identical/1"),
        )
    )
    assert [(key.split("|")[1], e.line) for key, e in found.items()] == [
        ("T32/uniform/6", 2),
        ("T1/identical/1", 4),
    ]


@pytest.mark.parametrize("failure", [f for f in Failure if f])
def test_a_failure_is_never_best(failure: Failure) -> None:
    assert query.best(entries_of(record(failure=failure))) == {}


@pytest.mark.parametrize("accuracy", [None, math.nan, math.inf, -1.0, 2.1e-3])
def test_what_was_not_checked_or_not_right_is_never_best(accuracy: float | None) -> None:
    right = record(us=50, trace=OTHER, accuracy=1.9e-3)
    found = query.best(entries_of(record(us=1, accuracy=accuracy), right))
    assert [e.line for e in found.values()] == [2]


def test_a_trace_that_was_wrong_once_is_out_for_all_batches_of_its_workload() -> None:
    wrong = record(failure=Failure.CORRECTNESS, scenario="T1/identical/1", timestamp=1)
    found = query.best(entries_of(record(us=1), wrong, record(us=50, trace=OTHER)))
    assert [e.line for e in found.values()] == [3]
    elsewhere = dataclasses.replace(wrong, device_name="another")
    assert [e.line for e in query.best(entries_of(record(us=1), elsewhere)).values()] == [1]


def test_the_latest_measurement_of_a_trace_counts() -> None:
    lucky, later = record(us=1, timestamp=1), record(us=9, timestamp=2)
    other = record(us=5, trace=OTHER)
    for order in ((lucky, later, other), (later, lucky, other)):
        (found,) = query.best(entries_of(*order)).values()
        assert found.median_s == pytest.approx(5e-6)
    failed = record(failure=Failure.LAUNCH, timestamp=3)
    assert query.best(entries_of(lucky, later, failed)) == {}


def test_a_line_with_broken_steps_or_keys_is_passed_over() -> None:
    broken = wire.dump(record(us=1)).replace(b'["CI",3]', b'["XX",3]')
    missing_stage = record(us=2, trace=Trace((ComputeInlineStep(9),)))
    nameless = record(us=2, workload_key="sgmv/float16/r16/no")
    endless = record(us=1, scenario="T99999999999/distinct/99999999999")
    entries = [
        wire.parse_entry(broken, 1),
        *entries_of(missing_stage, nameless, endless, record(us=4, trace=OTHER)),
    ]
    (found,) = query.best(entries).values()
    assert found.median_s == pytest.approx(4e-6)


def test_best_of_one_device() -> None:
    entries = entries_of(record(us=5), record(us=1, device_name="NVIDIA A100"))
    assert len(query.best(entries)) == 2
    assert [e.line for e in query.best(entries, device="NVIDIA H200").values()] == [1]


def test_history_and_failures() -> None:
    entries = entries_of(
        record(failure=Failure.TIMEOUT, timestamp=1),
        record(us=9, timestamp=2),
        record(us=4, timestamp=3, trace=OTHER),
        record(us=6, timestamp=4, trace=THIRD),
        record(us=1, scenario="T1/identical/1"),
    )
    pairs = query.history(entries, entries[0].task_key)
    assert [fastest for _, fastest in pairs] == pytest.approx([math.inf, 9e-6, 4e-6, 4e-6])
    assert {f: len(e) for f, e in query.failures(entries).items()} == {Failure.TIMEOUT: 1}


def test_stats() -> None:
    entries = entries_of(
        record(timestamp=10),
        record(timestamp=30, trace=OTHER, versions={"tvm": "0.28.0"}),
        record(timestamp=20, failure=Failure.BUILD),
    )
    found = query.stats(entries)
    assert (found.records, found.tasks, found.traces, found.ok) == (3, 1, 2, 2)
    assert found.failures == {"build": 1}
    assert found.versions["tvm"] == ["0.27.0", "0.28.0"]
    assert (found.first, found.last, found.cost_s) == (10, 30, 1.25)
    assert query.stats([]).first is None


def test_merge_keeps_order_and_each_measurement_once(tmp_path: Path) -> None:
    a, b = wire.dump(record(timestamp=1)), wire.dump(record(timestamp=2))
    c = wire.dump(record(timestamp=1, failure=Failure.CORRECTNESS))
    newer = b.replace(b'"schema":1', b'"schema":2')
    one = contents_of(tmp_path / "1", a, newer, b)
    two = contents_of(tmp_path / "2", b"rubbish", b, c, a.replace(b'"seed":7', b'"seed":8'), newer)
    assert query.merge([one, two]) == [a, newer, b, c]


def test_prune_keeps_the_best_and_the_failures(tmp_path: Path) -> None:
    lines = [
        wire.dump(r)
        for r in (
            record(us=9),
            record(us=5, trace=OTHER),
            record(failure=Failure.BUILD, trace=THIRD),
            record(us=7, trace=Trace(())),
            record(us=1, accuracy=None, trace=Trace((ComputeInlineStep(4),))),
            record(us=3, scenario="T1/identical/1"),
        )
    ]
    contents = contents_of(tmp_path / "log", *lines)
    assert query.prune(contents, 2) == [lines[n] for n in (1, 2, 3, 5)]
    assert query.prune(contents, 1, drop_failures=True) == [lines[n] for n in (1, 5)]
    kept = contents_of(tmp_path / "out", *query.prune(contents, 1))
    before = {task: e.raw for task, e in query.best(contents.entries).items()}
    assert {task: e.raw for task, e in query.best(kept.entries).items()} == before


def test_validate_names_every_bad_line(tmp_path: Path) -> None:
    good = wire.dump(record())
    lines = [
        good,
        b"{}",
        wire.dump(record(workload_key="sgmv/float8/r16/4096->4096")),
        wire.dump(record(scenario="T32/uniform/7")),
        wire.dump(record(trace=Trace((ComputeAtStep(0, 9, 0),)))),
        wire.dump(record(accuracy=None)),
        wire.dump(record(accuracy=0.5)),
        wire.dump(record(us=math.inf)),
        good.replace(b'["CI",3]', b'["CI"]'),
        wire.dump(record(failure=Failure.BUILD)),
        good.replace(b'"schema":1', b'"schema":7'),
    ]
    path = tmp_path / "log"
    path.write_bytes(b"\n".join([*lines, good[:300]]))
    found = query.validate(read_log(path))
    assert [p.line for p in found.problems] == [2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert found.newer == 1
    causes = " ".join(p.cause for p in found.problems)
    for word in ("dop", "float8", "T32/uniform/6", "stage 9", "missing", "above", "finite", "CI"):
        assert word in causes


def test_structure_of_followed_splits() -> None:
    query.check_structure(SPLIT_K)
    query.check_structure(Trace((SplitStep(0, 0, None, (4,)), FollowSplitStep(2, 1, 0, 1))))
    for bad in (FollowSplitStep(2, 1, 0, 1), FollowSplitStep(2, 1, 5, 1), ComputeAtStep(1, 1, 0)):
        with pytest.raises(TraceError, match="step 1"):
            query.check_structure(Trace((ComputeInlineStep(0), bad)))


@given(small_traces)
def test_structure_check_never_fails_otherwise(trace: Trace) -> None:
    try:
        query.check_structure(trace)
    except TraceError:
        return


def test_records_of_another_device_or_version_are_set_apart() -> None:
    target = dataclasses.replace(SM_90, device_name="NVIDIA H200")
    entries = entries_of(
        record(),
        record(device_name="NVIDIA A100"),
        record(target_key="cuda -arch=sm_100a"),
        record(versions={"tvm": "0.25.0"}),
    )
    found = query.check_compatible(entries, target, {"tvm": "0.27.0", "cuda": "13.0"})
    assert [e.line for e in found.entries] == [1, 4]
    assert found.other_devices == {"NVIDIA A100": 1, "NVIDIA H200 (cuda -arch=sm_100a)": 1}
    assert found.other_versions == {"tvm": ["0.25.0"]}
    words = " ".join(found.warnings())
    assert "NVIDIA A100" in words
    assert "0.25.0" in words


def test_the_target_of_a_record() -> None:
    cpu = Target("cpu", "x86-64-v3", "a CPU", 2, 1, 0, 16, 1 << 20, 32, "+avx2,+fma")
    for target in (SM_90, cpu):
        made = record(
            target_key=target.key,
            hardware_params=target.hardware_params,
            device_name=target.device_name,
        )
        found = query.target_of(made)
        assert found == dataclasses.replace(target, l2_bytes=0)
        assert found.key == target.key
    for key in ("", "rocm -arch=gfx90a", "cuda"):
        with pytest.raises(LogError, match="not a target"):
            query.target_of(record(target_key=key))
