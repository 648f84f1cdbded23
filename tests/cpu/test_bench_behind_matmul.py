"""benchmarks/bench_behind_matmul.py: what it makes of its timings; what it says without a GPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_behind_matmul
from benchmarks.bench_behind_matmul import WAYS, bench, main, row_of, text_of
from dop.scenario import named
from dop.workload import Workload


def seconds(base: float, *added: float) -> dict[str, tuple[float, ...]]:
    found = dict(zip(WAYS, (base, *(base + us for us in added)), strict=True))
    return {way: (us * 1e-6, us * 1e-6, (us + 5) * 1e-6) for way, us in found.items()}


def test_lora_costs_what_it_adds():
    batch = named("uniform", 64)
    row = row_of(16, batch, seconds(200, 30, 26, 25, 24))
    assert (row.rank, row.scenario) == (16, batch.key)
    assert row.matmul_us == pytest.approx(200)
    assert row.behind_us == pytest.approx(30)
    assert row.beside_us == pytest.approx(26)
    assert row.split_us == pytest.approx(25)
    assert row.known_us == pytest.approx(24)
    assert row.spread == pytest.approx(5 / 200)
    *_, last = text_of([row]).splitlines()
    assert last.split() == ["16", batch.key, "200.0", "30.00", "26.00", "25.00", "24.00", "2.5%"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


class FakeGraph:
    """A graph that does again what was done while it was captured: here it was done at once."""

    captured = 0

    def replay(self) -> None:
        pass


class FakeEvent:
    """Events a microsecond apart."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, stream=None) -> None:
        FakeEvent.now += 1e-3
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other) -> float:
        return other.at - self.at


@contextmanager
def captured(graph, stream):
    FakeGraph.captured += 1
    yield


def test_every_way_is_captured_for_every_batch_and_right(monkeypatch):
    """On CPU tensors, with stand-ins for graphs and clocks: add_lora and Beside make the same y."""
    made = []
    real = torch.mm

    def mm(x, w, out):
        made.append(out)
        return real(x, w, out=out)

    fake = SimpleNamespace(
        Stream=lambda: SimpleNamespace(cuda_stream=7, device=SimpleNamespace(index=0)),
        stream=lambda stream: nullcontext(),
        CUDAGraph=FakeGraph,
        graph=captured,
        Event=FakeEvent,
        synchronize=lambda: None,
        is_current_stream_capturing=lambda: False,
        is_available=lambda: False,
    )
    monkeypatch.setattr(bench_behind_matmul, "DEVICE", "cpu")
    monkeypatch.setattr(bench_behind_matmul.torch, "cuda", fake)
    monkeypatch.setattr(bench_behind_matmul.torch, "mm", mm)
    monkeypatch.setattr(FakeGraph, "captured", 0)
    monkeypatch.setattr(bench_behind_matmul, "FLUSH_BYTES", 64)
    lora = []
    stock = bench_behind_matmul.ops.add_lora
    monkeypatch.setattr(
        bench_behind_matmul.ops, "add_lora", lambda *call: lora.append(stock(*call).clone())
    )
    finish = bench_behind_matmul.Beside.finish
    monkeypatch.setattr(
        bench_behind_matmul.Beside,
        "finish",
        lambda self, pending, y: lora.append(finish(self, pending, y).clone()),
    )
    workloads = [
        Workload("qkv_proj", 64, (96, 32), 8, "float32"),
        Workload("down_proj", 192, (64,), 8, "float32"),  # wider than what is in front of it
    ]
    batches = [named("uniform", 8), named("identical", 3)]
    rows = list(bench(workloads, batches))
    linears = 2 * bench_behind_matmul.LAYERS
    assert [row.scenario for row in rows] == [batch.key for batch in batches]
    assert FakeGraph.captured == len(WAYS) * len(batches)
    assert len(made) == 2 * len(WAYS) * linears * len(batches)  # once to load, once captured
    assert len(lora) == 2 * (len(WAYS) - 1) * linears * len(batches)
    for place in range(len(batches)):
        # What is captured follows what only loads, way by way.
        first = (2 * place + 1) * (len(WAYS) - 1) * linears
        ways = [lora[first + n * linears :][:linears] for n in range(len(WAYS) - 1)]
        for behind, *others in zip(*ways, strict=True):
            assert behind.isfinite().all()
            assert all(torch.equal(behind, other) for other in others)
