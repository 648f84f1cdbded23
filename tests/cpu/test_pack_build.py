"""Kernels are built in several processes, in order, and no process outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from export_logs import defaults
from pack_samples import H200, WORKLOAD, fake_generate, trace

from dop.errors import ExportError
from dop.export.build import BuildJob, build_all
from dop.measure import compile_cuda
from dop.measure.artifact import Artifact
from dop.workload import Workload

ROOT = Path(__file__).parents[2]

PARENT = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from dop.export.build import _end_with
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(2, mp_context=context, initializer=_end_with,
                               initargs=(os.getpid(),))
    futures = [pool.submit(time.sleep, 60) for _ in range(2)]
    time.sleep(1)
    print(*pool._processes, flush=True)
    time.sleep(60)
"""


def test_results_come_in_order_and_errors_as_values(monkeypatch):
    monkeypatch.setattr(compile_cuda, "compile_source", lambda source, arch: source.encode())
    monkeypatch.setattr(compile_cuda, "require_compiler", lambda: None)
    jobs = [BuildJob(f"k{n}", WORKLOAD, trace(n), H200) for n in (2, 63, 4)]
    found = list(build_all(jobs, generate=fake_generate))
    assert [job.name for job, _ in found] == ["k2", "k63", "k4"]
    assert isinstance(found[1][1], ExportError)
    assert isinstance(found[2][1], Artifact)


@pytest.mark.skipif(compile_cuda.find_nvcc() is None, reason="nvcc is not installed")
def test_processes_build_what_this_one_does():
    pytest.importorskip("tvm")
    workload = Workload("o", 512, (512,), 16, "bfloat16")
    candidates = defaults(workload, H200)[:1]
    jobs = [BuildJob(f"k{i}", workload, c.trace, H200) for i, c in enumerate(candidates)]
    jobs.append(BuildJob("bad", workload, trace(2), H200))
    here = [outcome for _, outcome in build_all(jobs)]
    there = [outcome for _, outcome in build_all(jobs, processes=2)]
    for one, other in zip(here[:1], there[:1], strict=True):
        assert isinstance(one, Artifact)
        assert isinstance(other, Artifact)
        assert (one.source, one.launches) == (other.source, other.launches)
        assert one.binary == other.binary
    assert isinstance(there[1], ExportError)
    assert str(there[1]) == str(here[1])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_no_process_outlives_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in workers)
