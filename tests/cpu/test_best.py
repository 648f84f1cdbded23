"""best.py from options to exit code; measuring is replaced, everything else is real."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dop.database.jsonl import read_log
from dop.measure.base import Job
from dop.measurement import Measurement
from dop.target import SM_90

ROOT = Path(__file__).parents[2]


class QuickMeasurer:
    """A time per trace and batch, at once."""

    interrupt_after = 0
    overlaps = False

    def __init__(self, target: object) -> None:
        self.count = 0

    def measure(self, jobs: Sequence[Job]):
        for job in jobs:
            for scenario in job.scenarios:
                self.count += 1
                if self.count == type(self).interrupt_after:
                    raise KeyboardInterrupt
                digest = hashlib.sha256((job.trace.key + scenario.key).encode()).digest()
                seconds = (10 + digest[0]) * 1e-6
                yield job, scenario, Measurement((seconds,), accuracy=1e-6, floor_s=5e-6)

    def warm_up(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> QuickMeasurer:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def best(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("best", ROOT / "best.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("dop.measure.local.LocalMeasurer", QuickMeasurer)
    return module


@pytest.fixture
def bench(monkeypatch):
    """Stands for the comparison with torch: fixed figures for the cases it is asked for."""
    pytest.importorskip("torch")
    from benchmarks import bench_cpu

    asked = []

    def rows(workload, scenarios, target, log, resident):
        for scenario in scenarios:
            asked.append((workload.key, scenario.key))
            yield bench_cpu.Row(workload.name, scenario.key, 10.0, 20.0, 30.0, 40.0, "trace")

    monkeypatch.setattr(bench_cpu, "bench", rows)
    return asked


def run(best, monkeypatch, *options: str) -> int:
    command = ["best.py", "--device", "cpu", "--budget", "3s", *options]
    monkeypatch.setattr(sys, "argv", command)
    return best.main()


def test_tunes_compares_and_reports(best, bench, monkeypatch, capsys):
    assert run(best, monkeypatch) == 0
    printed = capsys.readouterr().out
    entries = read_log("best.log.jsonl").entries
    tasks = {(e.workload_key, e.scenario_key) for e in entries}
    assert set(bench) == tasks
    assert f"Over {len(tasks)} cases Dop is 3.00x" in printed
    assert "default 1.50x" in printed
    assert Path("best.report.html").read_text().startswith("<!doctype html>")
    assert all("r16" in workload for workload, _ in tasks)
    before = len(entries)
    assert run(best, monkeypatch, "--budget", "1s") == 0
    assert len(read_log("best.log.jsonl").entries) >= before


def test_on_a_gpu_it_begins_with_what_the_packs_know(best, monkeypatch, capsys):
    target = replace(SM_90, device_name="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("dop.measure.hostinfo.find_target", lambda device: target)
    monkeypatch.setattr(best, "compare", lambda *_: iter(()))
    assert run(best, monkeypatch) == 0
    assert "Kernels of earlier searches come first: " in capsys.readouterr().err
    Path("best.log.jsonl").unlink()
    assert run(best, monkeypatch, "--no-packs") == 0
    assert "earlier searches" not in capsys.readouterr().err


def test_ctrl_c_keeps_the_log_and_says_so(best, bench, monkeypatch, capsys):
    monkeypatch.setattr(QuickMeasurer, "interrupt_after", 7)
    assert run(best, monkeypatch) == 130
    assert len(read_log("best.log.jsonl").entries) == 6
    assert "best.log.jsonl" in capsys.readouterr().out
    assert not bench


def test_a_wrong_option_is_one_line(best, monkeypatch, capsys):
    for options in (["--ranks", "0"], ["--model", "no-such-model"], ["--budget", "soon"]):
        assert run(best, monkeypatch, *options) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("error: ")


def test_the_default_model_fits_the_device(best):
    assert best.MODELS == {"cuda": "Llama-3.1-8B", "cpu": "Llama-3.2-1B"}
