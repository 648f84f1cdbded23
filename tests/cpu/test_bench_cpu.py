"""The comparison on CPUs: every contender has its cores."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")

from benchmarks import bench_cpu  # noqa: E402


@pytest.fixture
def quick(monkeypatch):
    """Short turns; this thread's cores are given back."""
    for name, value in {"REST_S": 0.0, "ROUND_S": 0.0, "ROUNDS": 2, "ROUND_CALLS": 2}.items():
        monkeypatch.setattr(bench_cpu, name, value)
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.skipif(len(bench_cpu.CORES) < 2, reason="one core is all there is")
def test_a_turn_runs_on_its_contenders_cores(quick):
    """A kernel pins the thread that loads it; torch's turn and later kernels still have all."""
    seen: list[list[set[int]]] = [[], []]
    calls = [
        [lambda: seen[0].append(os.sched_getaffinity(0))],
        [lambda: seen[1].append(os.sched_getaffinity(0))],
    ]
    os.sched_setaffinity(0, bench_cpu.CORES[:1])
    bench_cpu.alternate(calls, [bench_cpu.CORES[:1], bench_cpu.CORES])
    assert all(cores == set(bench_cpu.CORES[:1]) for cores in seen[0])
    assert seen[1]
    assert all(cores == set(bench_cpu.CORES) for cores in seen[1])
