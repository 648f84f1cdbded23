"""The report: true figures, one file, no network, nothing of the log executed, quick when large."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import synthetic

from dop import tune
from dop.cli.main import main
from dop.database import wire
from dop.database.jsonl import read_log
from dop.database.record import Record
from dop.errors import Failure, LogError
from dop.measurement import Measurement
from dop.report import data as report_data
from dop.report.charts import task_label
from dop.report.data import collect
from dop.report.html import render, write
from dop.report.svg import Canvas, Scale, log_ticks
from dop.space.trace import Trace
from dop.target import SM_90
from dop.workload import Workload

WORKLOADS = (synthetic.WORKLOAD, Workload("qkv", 4096, (4096, 1024, 1024), 16, "bfloat16"))
TRACES = [Trace(c.trace.steps) for c in synthetic.space().defaults()]


def record(
    us: float | None,
    *,
    workload: Workload = WORKLOADS[0],
    scenario: str = "T32/uniform/6",
    trace: int = 0,
    second: int = 0,
    failure: Failure = Failure.LAUNCH,
    message: str = "too many resources",
    sketch: str = "rows/columns",
    **extras: object,
) -> Record:
    """A record of `us` microseconds, or a failure."""
    if us is None:
        measured = Measurement.failed(failure, message)
    else:
        measured = Measurement((us * 1e-6,), accuracy=1e-3, floor_s=4e-6, cost_s=0.5)
    made = Record(
        workload_key=workload.key,
        target_key=SM_90.key,
        hardware_params=SM_90.hardware_params,
        scenario_key=scenario,
        device_name=SM_90.device_name,
        trace=TRACES[trace],
        measurement=measured,
        timestamp=1_700_000_000 + second,
        sketch=sketch,
        versions={"dop": "0.1.0"},
    )
    return replace(made, **extras)  # type: ignore[arg-type]


def save(path: Path, records: list[Record]) -> Path:
    path.write_bytes(b"".join(wire.dump(r) + b"\n" for r in records))
    return path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return save(
        tmp_path / "log.jsonl",
        [
            record(20, trace=0, sketch="rows/columns (default)"),
            record(30, trace=1, second=1),
            record(8, trace=2, second=2, predicted_s=9e-6),
            record(50, scenario="T128/distinct/128", trace=0, sketch="rows/columns (default)"),
            record(None, scenario="T128/distinct/128", trace=1, second=3),
            record(7, workload=WORKLOADS[1], scenario="T1/identical/1", trace=1, second=4),
        ],
    )


def test_the_figures_are_the_logs(log):
    found = collect(read_log(log))
    assert [f.workload_key for f in found.families] == [w.key for w in WORKLOADS]
    first = found.families[0]
    assert (first.trials, len(first.tasks)) == (3, 2)
    task = first.tasks[0]
    assert task.tokens == 32
    assert task.best_us == pytest.approx(8)
    assert task.default_us == pytest.approx(20)
    assert task.floor_us == pytest.approx(4)
    assert task.speedup == pytest.approx(2.5)
    assert task.over_floor == pytest.approx(2)
    assert task.curve == [(1, pytest.approx(20)), (3, pytest.approx(8))]
    assert first.points == [(pytest.approx(9), pytest.approx(8))]
    failed = found.failures[0]
    assert (failed.name, failed.count, failed.line) == ("launch", 1, 5)
    assert failed.share == pytest.approx(1 / 6)


def test_a_wrong_candidate_is_in_no_curve_and_never_best(tmp_path):
    path = save(
        tmp_path / "log.jsonl",
        [
            record(9, trace=0),
            record(2, trace=1, second=1),
            record(None, trace=1, second=2, scenario="T1/identical/1", failure=Failure.CORRECTNESS),
            record(3, trace=2, second=3, measurement=Measurement((3e-6,), accuracy=0.5)),
        ],
    )
    task = next(t for t in collect(read_log(path)).tasks if t.tokens == 32)
    assert task.best_us == pytest.approx(9)
    assert task.curve == [(1, pytest.approx(9))]


def test_a_log_of_failures_only_makes_a_report(tmp_path):
    path = save(tmp_path / "log.jsonl", [record(None, trace=i) for i in range(3)])
    text = render(collect(read_log(path)))
    assert "None of 1 tasks" in text


def test_task_filter(log):
    assert [t.tokens for t in collect(read_log(log), ["T128"]).tasks] == [128]
    with pytest.raises(LogError, match="no task"):
        collect(read_log(log), ["nothing like it"])


class Page(HTMLParser):
    """Checks that tags close in order, and notes what could reach the network or run."""

    VOID = ("meta", "br", "hr", "input", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        assert not any(name.startswith("on") for name, _ in attrs)
        self.links += [v or "" for name, v in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag, attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_file_that_runs_nothing_of_the_log(tmp_path):
    evil = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>$\\alpha$"
    path = save(
        tmp_path / "<b>log.jsonl",
        [
            record(9, trace=0, sketch=evil, versions={evil: evil}, device_name=evil),
            record(None, trace=1, message=evil, scenario=f"T3/{evil}", workload=WORKLOADS[1]),
        ],
    )
    text = render(collect(read_log(path)))
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert page.scripts == 1
    assert "http" not in re.sub(r"http-equiv", "", text)


def test_hostile_keys_do_not_stop_the_report(tmp_path):
    odd = [
        record(9, trace=0, scenario_key="T999999999999999/uniform/3"),
        record(9, trace=0, scenario_key="no scenario", workload_key="no workload"),
        record(9, trace=0, scenario_key="T5/recorded/3,2/0"),
    ]
    render(collect(read_log(save(tmp_path / "log.jsonl", odd))))


def test_a_cold_batch_is_told_from_its_twin(tmp_path):
    made = [record(9, trace=0, scenario=f"T32/uniform/6{end}") for end in ("", "/cold")]
    found = collect(read_log(save(tmp_path / "log.jsonl", made)))
    tasks = found.families[0].tasks
    assert [(t.tokens, t.mix, t.adapters, t.cold) for t in tasks] == [
        (32, "uniform", 6, False),
        (32, "uniform", 6, True),
    ]
    assert [task_label(t) for t in tasks] == ["32 uniform", "32 uniform, cold"]
    assert "uniform, cold" in render(found)


def test_the_winner_is_explained_with_its_loops(tmp_path):
    from dop.space.generate import build_space

    best = build_space(WORKLOADS[0], SM_90).defaults()[0]
    path = save(tmp_path / "log.jsonl", [record(5, trace=0)])
    path = save(tmp_path / "log.jsonl", [replace(record(5), trace=best.trace)])
    text = render(collect(read_log(path)))
    assert "threadIdx.x" in text
    assert text.count("<svg") >= 3


def test_command(log, tmp_path, capsys):
    out = tmp_path / "out.html"
    assert main(["report", str(log), "-o", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(out)
    assert document["tasks"][0]["best_us"] == pytest.approx(8)
    assert out.read_text().startswith("<!doctype html>")
    assert main(["report", str(log), "-o", str(out)]) == 0
    assert "3 of 3 tasks" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no log\n", None])
def test_what_is_no_log_is_one_line_and_leaves_no_file(tmp_path, capsys, content):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out.html"
    assert main(["report", str(path), "-o", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_the_log_is_not_overwritten_and_a_failed_write_leaves_nothing(log, tmp_path):
    before = log.read_bytes()
    found = collect(read_log(log))
    with pytest.raises(LogError, match="the log itself"):
        write(found, log)
    assert log.read_bytes() == before
    with pytest.raises(OSError, match="No such file"):
        write(found, tmp_path / "missing" / "out.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl"]


def test_a_large_log_reports_in_time(tmp_path):
    """100,000 records in 10 s is the bar; a fifth of them here, in a fifth of it at most."""
    lines = []
    tokens = (1, 8, 16, 32, 64, 128)
    for i in range(20_000):
        made = record(
            5 + (i * 7919 % 1000) / 50,
            trace=i % 3,
            second=i,
            scenario=f"T{tokens[i % 6]}/identical/1",
            workload=WORKLOADS[i % 2],
            predicted_s=6e-6,
        )
        lines.append(wire.dump(made) + b"\n")
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(lines))
    began = time.process_time()
    text = render(collect(read_log(path)))
    assert time.process_time() - began < 4
    assert len(text) < 1_500_000


def test_the_default_mark_is_the_tuners():
    assert report_data.DEFAULT_MARK == tune.DEFAULT_MARK


@pytest.mark.parametrize(
    ("low", "high"), [(1, 1.3), (0.2, 0.9), (3, 3000), (14.2, 15.9), (1e-3, 1e6), (0.95, 1.8)]
)
def test_ticks_are_round_few_and_within(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 6
    assert all(low * 0.99 <= t <= high * 1.01 for t in ticks)
    assert all(len(f"{t:.6g}".strip("0.").replace(".", "")) <= 3 for t in ticks if t < 1000)


def test_a_scale_maps_its_ends():
    scale = Scale(1, 100, 10, 210)
    assert (scale(1), scale(10), scale(100)) == pytest.approx((10, 110, 210))
    assert "viewBox" in Canvas(10, 10).svg("x")


def test_the_default_is_the_first_sketchs_whatever_came_first(tmp_path):
    import log_samples

    from dop.space.generate import build_space

    workload = Workload.parse(log_samples.WORKLOAD)
    first, second = build_space(workload, SM_90).defaults()[:2]
    records = [
        log_samples.record(us=us, trace=c.trace, sketch=c.sketch.name + tune.DEFAULT_MARK)
        for us, c in ((90.0, second), (20.0, first), (10.0, second))
    ]
    (view,) = collect(read_log(save(tmp_path / "log.jsonl", records))).tasks
    assert view.default_us == pytest.approx(20.0)
