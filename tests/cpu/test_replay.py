"""`dop replay`: the best records are measured again, and what differs is said."""

from __future__ import annotations

import json
from pathlib import Path

import log_samples
import pytest

from dop.cli.main import main
from dop.database.jsonl import Log
from dop.errors import Failure
from dop.measure.replay import RecordedMeasurer
from dop.measurement import Measurement
from dop.target import SM_90


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log of one task, on the device that is found here."""
    path = tmp_path / "log.jsonl"
    record = log_samples.record(us=10.0)
    monkeypatch.setattr(
        "dop.measure.hostinfo.find_target",
        lambda *_, **__: SM_90.__class__(
            **{
                **{f: getattr(SM_90, f) for f in SM_90.__dataclass_fields__},
                "device_name": record.device_name,
            }
        ),
    )
    with Log.open(path) as log:
        log.append(record)
    return path


def _answer(monkeypatch: pytest.MonkeyPatch, measurement: Measurement) -> None:
    record = log_samples.record()
    table = {(record.trace.key, record.scenario_key): measurement}
    monkeypatch.setattr("dop.measure.local.LocalMeasurer", lambda target: RecordedMeasurer(table))


@pytest.mark.parametrize(
    ("measurement", "code", "mark"),
    [
        (Measurement((10.5e-6,), accuracy=1e-3), 0, ""),
        (Measurement((20e-6,), accuracy=1e-3), 1, "slower"),
        (Measurement.failed(Failure.CORRECTNESS, "wrong"), 1, "correctness"),
    ],
)
def test_same_or_not(
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    measurement: Measurement,
    code: int,
    mark: str,
) -> None:
    _answer(monkeypatch, measurement)
    assert main(["replay", str(log), "--json"]) == code
    (row,) = json.loads(capsys.readouterr().out)["tasks"]
    assert row["same"] is (code == 0)
    assert row["recorded_us"] == pytest.approx(10.0)
    assert main(["replay", str(log)]) == code
    assert mark in capsys.readouterr().out


def test_nothing_to_replay(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(log), "--task", "no such task"]) == 2
    assert "no best record" in capsys.readouterr().err
