"""Two logs' best kernels side by side."""

from __future__ import annotations

import json
from dataclasses import replace

import log_samples
import pytest

from benchmarks import compare_logs
from dop.database.jsonl import Log
from dop.errors import Failure
from dop.measure.replay import RecordedMeasurer
from dop.measurement import Measurement
from dop.space.trace import Trace
from dop.target import SM_90


def write(path, *records):
    with Log.open(path) as log:
        for each in records:
            log.append(each)
    return str(path)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Two logs with a task in common, each with a kernel of its own for it."""
    other = Trace(log_samples.SPLIT_K.steps[:-1])
    first, second = log_samples.record(), log_samples.record(trace=other)
    target = replace(SM_90, device_name=first.device_name)
    monkeypatch.setattr(compare_logs, "find_target", lambda _: target)
    keys = [(each.trace.key, each.scenario_key) for each in (first, second)]
    return write(tmp_path / "a", first), write(tmp_path / "b", second), keys


def measured(monkeypatch, keys, *found):
    table = dict(zip(keys, found, strict=True))
    monkeypatch.setattr(compare_logs, "LocalMeasurer", lambda _: RecordedMeasurer(table))


@pytest.mark.parametrize(("us", "code"), [(9.0, 0), (10.4, 0), (10.6, 1)])
def test_the_first_logs_kernel_over_the_others(logs, monkeypatch, capsys, us, code):
    first, second, keys = logs
    measured(monkeypatch, keys, *(Measurement((t * 1e-6,), accuracy=1e-3) for t in (us, 10.0)))
    assert compare_logs.main([first, second, "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["geomean"] == pytest.approx(us / 10)
    (row,) = said["tasks"]
    assert (row["us"], row["other_us"]) == (pytest.approx(us), pytest.approx(10.0))
    assert compare_logs.main([first, second]) == code
    assert f"{us / 10:.3f}x" in capsys.readouterr().out
    assert compare_logs.main([first, second, "--within", "1.2"]) == 0


def test_a_kernel_that_fails_is_named(logs, monkeypatch, capsys):
    first, second, keys = logs
    wrong = Measurement.failed(Failure.CORRECTNESS, "wrong by far")
    measured(monkeypatch, keys, wrong, Measurement((1e-5,), accuracy=1e-3))
    assert compare_logs.main([first, second]) == 1
    assert "correctness: wrong by far" in capsys.readouterr().out


def test_logs_without_a_common_task_are_refused(logs, capsys):
    first, second, _ = logs
    assert compare_logs.main([first, second, "--task", "no such task"]) == 2
    assert "No task" in capsys.readouterr().err
    assert compare_logs.main([first, str(second) + "x"]) == 2
    assert "error:" in capsys.readouterr().err
