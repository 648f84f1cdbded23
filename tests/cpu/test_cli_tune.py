"""`dop tune`: options to families, what is printed, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
from fake_measurer import FakeMeasurer

from dop.cli.main import main
from dop.cli.progress import display, final_table, summary_line
from dop.cli.request import TRAFFIC_SCENARIOS, Request, log_path, seconds_of
from dop.cli.tune import left_out_lines, summary
from dop.database.jsonl import read_log
from dop.errors import ConfigError
from dop.progress import Progress, TuneResult
from dop.target import SM_90

HERE = Path(__file__).parent
MODEL = ("--model", "Llama-3.2-1B", "--device", "cpu", "--tokens", "1,32", "--mix", "uniform")


@pytest.fixture
def fake(monkeypatch):
    space = synthetic.space()
    monkeypatch.setattr("dop.cli.tune._measurer", lambda target: FakeMeasurer(space))
    monkeypatch.setattr("dop.tune._build_space", lambda workload, target: space)


def test_json_is_one_document_and_the_log_is_written(fake, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    assert main(["tune", *MODEL, "--trials", "40", "--log", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["trials"] == 40
    assert found["records"] == len(read_log(log).entries)
    assert found["stopped_by"] == "trials"
    assert {t["scenario"] for t in found["tasks"]} == {"T1/identical/1", "T32/uniform/6"}
    assert all(t["best_us"] <= t["default_us"] for t in found["tasks"])
    entry = read_log(log).entries[0]
    assert entry.versions["dop"]


def test_text_has_a_line_per_task(fake, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    assert main(["tune", *MODEL, "--budget", "1s", "--log", str(log)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("T32/uniform/6") == 4
    assert "speed-up" in captured.out
    assert "4 workloads x 2 batches" in captured.err
    assert "s left" in captured.err


def test_ctrl_c_exits_130_with_the_best_and_can_be_continued(tmp_path):
    log = tmp_path / "log.jsonl"
    arguments = [*MODEL, "--log", str(log), "--budget", "60s", "--json"]
    command = [sys.executable, str(HERE / "cli_tune_process.py")]
    with subprocess.Popen(
        [*command, "20", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and (
            not log.exists() or log.read_bytes().count(b"\n") < 40
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "The same command continues" in err
    assert "Traceback" not in err
    found = json.loads(out)
    assert found["stopped_by"] == "interrupt"
    assert any(task["best_us"] for task in found["tasks"])
    assert len(read_log(log).entries) == found["records"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "soon"], "duration"),
        (["--effort", "max"], "quick, full"),
        (["--ranks", "0"], "rank"),
        (["--ranks", "100000"], "rank"),
        (["--tokens", "1,x"], "--tokens"),
        (["--mix", "mixed"], "distinct, uniform"),
        (["--dtype", "int8"], "float16"),
        (["--device", "tpu"], "cuda or cpu"),
        (["--adapters", "/nowhere"], "/nowhere"),
        (["--traffic", "/nowhere"], "--tokens"),
        (["--cold"], "--cold"),
        (["--tp", "0"], "--tp"),
        (["--layers", "o,head"], "no layer 'head'. Its layers: qkv_proj, o_proj"),
        (["--layers", ""], "no layer ''"),
        (["--trials", "0"], "--trials"),
        (["--log", "/proc/nowhere/log"], "/proc/nowhere"),
        (["--like", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
    ],
)
def test_bad_input_is_one_line(fake, options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *MODEL, "--trials", "4", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_families_merge_equal_shapes_and_follow_the_adapters(tmp_path):
    families = Request("Llama-2-7B", ranks="8,64").families(SM_90)
    assert len({f.workload.key for f in families}) == len(families)
    assert {f.workload.rank for f in families} == {8, 64}
    assert families[0].workload.dtype == "bfloat16"
    scenarios = families[0].scenarios
    assert {s.tokens for s in scenarios} == {1, 8, 16, 32, 64, 128, 2048}
    assert max(s.adapters for s in scenarios) == 128


@pytest.mark.parametrize("layers", ["o,down_proj", " down, o_proj"])
def test_some_layers_only(layers):
    families = Request("Llama-3.1-8B", ranks="8,64", layers=layers).families(SM_90)
    assert [f.workload.name for f in families] == 2 * ["o_proj", "down_proj"]


def test_traffic_replaces_the_mixes(tmp_path):
    file = tmp_path / "traffic.json"
    batch = {"tokens": 9, "segments": [5, 3], "bare": 1, "count": 7}
    file.write_text(json.dumps({"version": 1, "batches": [batch]}))
    (scenario,) = Request("Llama-3.2-1B", traffic=file).scenarios(SM_90)
    assert (scenario.tokens, scenario.adapters, scenario.weight) == (9, 2, 7)
    with pytest.raises(ConfigError, match="--tokens"):
        Request("Llama-3.2-1B", traffic=file, tokens="1").scenarios(SM_90)


def test_a_long_traffic_file_says_what_it_leaves_out(tmp_path):
    file = tmp_path / "traffic.json"
    batches = [{"segments": [n, 1], "count": n} for n in range(1, 101)]
    file.write_text(json.dumps({"version": 1, "batches": batches}))
    request = Request("Llama-3.2-1B", traffic=file)
    chosen = request.scenarios(SM_90)
    assert len(chosen) == TRAFFIC_SCENARIOS
    pairs = request.left_out(chosen)
    assert len(pairs) == 100 - TRAFFIC_SCENARIOS
    kept = {s.key for s in chosen}
    for batch, stand_in in pairs:
        assert batch.key not in kept
        assert stand_in.key in kept
        assert stand_in.tokens / 2 <= batch.tokens <= 2 * stand_in.tokens
    lost = sum(batch.weight for batch, _ in pairs)
    (line,) = left_out_lines(pairs, chosen)
    assert f"of 100 kinds of batches in the traffic file, {TRAFFIC_SCENARIOS} are measured" in line
    assert f"the other {len(pairs)} ({lost / 5050:.1%} of all" in line
    assert pairs[0][0].key in line
    assert pairs[-1][0].key not in line

    progress = Progress(0.0, 0.0, 0, 0, 0, {}, (), "")
    found = summary(TuneResult(progress, False, "budget"), tmp_path / "log", pairs)["left_out"]
    assert sum(item["weight"] for item in found) == lost
    assert {item["represented_by"] for item in found} <= kept


def test_a_short_traffic_file_leaves_nothing_out(tmp_path):
    file = tmp_path / "traffic.json"
    file.write_text(json.dumps({"version": 1, "batches": [{"segments": [3], "count": 2}]}))
    request = Request("Llama-3.2-1B", traffic=file)
    assert request.left_out(request.scenarios(SM_90)) == ()
    assert Request("Llama-3.2-1B").left_out(()) == ()
    assert left_out_lines((), request.scenarios(SM_90)) == []


def test_durations_and_log_names():
    assert [seconds_of(t) for t in ("90", "90s", "10m", "1.5h")] == [90, 90, 600, 5400]
    for wrong in ("", "0", "-1s", "10 min", "1e9", "m"):
        with pytest.raises(ConfigError):
            seconds_of(wrong)
    assert str(log_path("meta-llama/Llama-3.2-1B", SM_90)) == "dop-Llama-3.2-1B-cuda.jsonl"
    assert str(log_path("/models/my model/config.json", SM_90)) == "dop-my-model-cuda.jsonl"


def test_the_live_table_draws(tmp_path, monkeypatch):
    from rich.console import Console
    from test_tune import run

    events: list = []
    result = run(tmp_path / "log.jsonl", 24, on_event=events.append)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with display() as show:
        for event in events:
            show(event)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(final_table(result))
    assert "o_proj" in console.export_text()
    assert "24 trials" in summary_line(result.progress)
