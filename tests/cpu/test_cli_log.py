from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from log_samples import record
from typer.testing import CliRunner

from dop.cli import log as cli
from dop.cli.main import main
from dop.database import wire
from dop.database.record import Record
from dop.errors import Failure, LogError, MissingDependencyError
from dop.space.step import ComputeInlineStep
from dop.space.trace import Trace

OTHER = Trace((ComputeInlineStep(0),))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["log", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(
        tmp_path / "tuning.jsonl",
        record(us=12, timestamp=1),
        record(us=8, trace=OTHER, timestamp=2),
        record(failure=Failure.TIMEOUT, timestamp=3),
        record(us=3, scenario="T1/identical/1", timestamp=4),
    )


def write(path: Path, *records: Record) -> Path:
    path.write_bytes(b"".join(wire.dump(r) + b"\n" for r in records))
    return path


def test_best(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "best", log)
    assert (code, err) == (0, "")
    for words in ("T32/uniform/6", "T1/identical/1", "3.00", "8.00", "1.60", "NVIDIA H200"):
        assert words in out
    code, out, _ = run(capsys, "best", log, "--json", "--task", "uniform")
    (row,) = json.loads(out)
    assert row["line"] == 2
    assert row["median_s"] == pytest.approx(8e-6)
    assert row["file"] == str(log)
    code, out, err = run(capsys, "best", log, "--device", "none", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert "no task" in err


def test_explain_in_words(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", log, "--no-nest", "--line", 1)
    assert (code, err) == (0, "")
    assert "Vectorizes loop n.3 of accumulate" in out
    assert "12.00 us" in out
    for choice in (("--task", 1), ("--task", "uniform"), ("--best", "--task", "T32")):
        code, out, _ = run(capsys, "explain", log, "--no-nest", *choice)
        assert code == 0
        assert "Inlines gather_x" in out
    code, out, err = run(capsys, "explain", log, "--json")
    told = json.loads(out)
    assert told["steps"][0]["stage"] == "gather_x"
    assert told["header"]["accuracy"].startswith("error 1.00e-04")
    assert "2 tasks" in err


def test_explain_a_failure(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "explain", log, "--line", 3, "--no-nest")
    assert code == 0
    assert "failed (timeout): it broke" in out


def test_explain_asked_for_what_is_not_there(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for choice, cause in (
        (("--line", 99), "line 99"),
        (("--task", "99"), "no task '99'"),
        (("--task", "decode"), "no task 'decode'"),
        (("--line", 1, "--best"), "--line"),
    ):
        code, out, err = run(capsys, "explain", log, *choice)
        assert code == 2
        assert out == ""
        assert cause in err
        assert err.count("\n") == 1


def test_explain_with_nest_and_code(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fake:
        @staticmethod
        def loop_nest(workload: object, trace: object, target: object, upto: int | None) -> str:
            return f"for {workload.name} {upto}"  # type: ignore[attr-defined]

        @staticmethod
        def generate(workload: object, trace: object, target: object) -> object:
            return type("Generated", (), {"source": "__global__ void k();"})

    monkeypatch.setattr(cli, "_lowering", Fake)
    code, out, _ = run(capsys, "explain", log, "--line", 1, "--nest", "--source")
    assert code == 0
    key = "sgmv/float16/r16/4096->4096+1024+1024"
    assert f"Loops before:\nfor {key} 0" in out
    assert f"Loops after:\nfor {key} None" in out
    assert "Code:\n__global__" in out
    code, out, _ = run(capsys, "explain", log, "--line", 1, "--nest", "--source", "--json")
    assert {"nest_before", "nest_after", "source"} <= set(json.loads(out))


def test_explain_without_tvm(
    log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [m for m in sys.modules if m.startswith("dop.lowering")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "tvm", None)
    code, out, err = run(capsys, "explain", log, "--line", 1)
    assert code == 0
    assert "Vectorizes loop n.3" in out
    assert "needs TVM" in err
    code, _, err = run(capsys, "explain", log, "--line", 1, "--source", "--no-nest")
    assert code == 2
    assert "pip install" in err


def test_stats(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "stats", log)
    assert code == 0
    for words in ("timeout 1", "NVIDIA H200 4", "tvm 0.27.0", "1970-01-01 00:00:01"):
        assert words in out
    found = json.loads(run(capsys, "stats", log, "--json")[1])
    assert (found["records"], found["ok"], found["failures"]) == (4, 3, {"timeout": 1})


def test_merge(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = write(tmp_path / "more.jsonl", record(us=12, timestamp=1), record(timestamp=9))
    empty = write(tmp_path / "empty.jsonl")
    output = tmp_path / "all.jsonl"
    code, out, _ = run(capsys, "merge", log, more, empty, "-o", output, "--json")
    assert code == 0
    assert json.loads(out) == {
        "output": str(output),
        "read": 6,
        "written": 5,
        "duplicates": 1,
    }
    assert output.read_bytes().startswith(log.read_bytes())
    before = more.read_bytes()
    code, _, err = run(capsys, "merge", log, more, "-o", more)
    assert code == 2
    assert "--force" in err
    assert more.read_bytes() == before
    assert run(capsys, "merge", log, more, "-o", more, "--force")[0] == 0
    assert more.read_bytes() == output.read_bytes()


def test_prune(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = log.read_bytes()
    code, _, err = run(capsys, "prune", log, "--keep", 1)
    assert code == 2
    assert "--force" in err
    assert log.read_bytes() == before
    output = tmp_path / "small.jsonl"
    assert run(capsys, "prune", log, "--keep", 1, "-o", output)[0] == 0
    assert [wire.parse(x).timestamp for x in output.read_bytes().splitlines()] == [2, 3, 4]
    code, out, _ = run(capsys, "prune", log, "--keep", 1, "--drop-failures", "--force", "--json")
    assert json.loads(out) == {"output": str(log), "written": 2, "dropped": 2}
    assert len(log.read_bytes().splitlines()) == 2


def test_validate(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "validate", log)
    assert (code, err) == (0, "")
    assert "4 records, no problems" in out
    with log.open("ab") as file:
        file.write(b"rubbish\n")
    code, out, _ = run(capsys, "validate", log)
    assert code == 1
    assert "line 5: not JSON" in out
    code, out, _ = run(capsys, "validate", log, "--json")
    assert code == 1
    assert json.loads(out)["problems"][0]["line"] == 5


@pytest.mark.parametrize("verb", ["best", "explain", "stats", "validate", "merge", "prune"])
def test_bad_files_give_one_line(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"\x7fELF\0\0\n\0\xff\n")
    output = ("-o", tmp_path / "out.jsonl") if verb in ("merge", "prune") else ()
    for path in (tmp_path / "missing", tmp_path, rubbish):
        code, out, err = run(capsys, verb, path, *output)
        if verb == "validate" and path == rubbish:
            assert code == 1
            assert "line 2" in out
            continue
        assert code == 2
        assert err.count("\n") == 1
        assert str(path) in err
        assert "Traceback" not in out + err
    assert not (tmp_path / "out.jsonl").exists()


def test_warnings_go_to_standard_error(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log.open("ab") as file:
        file.write(b"rubbish\n" + wire.dump(record())[:40])
    code, out, err = run(capsys, "best", log, "--json")
    assert code == 0
    assert len(json.loads(out)) == 2
    assert "1 line is corrupt" in err
    assert "line 6 was cut off" in err


def test_the_app_alone(log: Path) -> None:
    result = CliRunner().invoke(cli.app, ["best", str(log)])
    assert result.exit_code == 0
    result = CliRunner().invoke(cli.app, ["best", str(log) + "x"])
    assert isinstance(result.exception, LogError)
    assert issubclass(MissingDependencyError, Exception)
