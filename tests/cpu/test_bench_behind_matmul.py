"""benchmarks/bench_behind_matmul.py: what it makes of its timings; what it says without a GPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_behind_matmul
from benchmarks.bench_behind_matmul import bench, main, row_of, text_of
from dop.scenario import named
from dop.workload import Workload


def seconds(base: float, behind: float, beside: float) -> dict[str, tuple[float, ...]]:
    ways = {"matmul": base, "behind": base + behind, "beside": base + beside}
    return {way: (us * 1e-6, us * 1e-6, (us + 5) * 1e-6) for way, us in ways.items()}


def test_lora_costs_what_it_adds_and_layers_add_up():
    o, down = (Workload(name, 64, (64,), 16, "bfloat16") for name in ("o_proj", "down_proj"))
    batch = named("uniform", 64)
    rows = [row_of(o, batch, seconds(20, 6, 4)), row_of(down, batch, seconds(50, 8, 5))]
    assert [(r.layer, r.scenario) for r in rows] == [
        (n, batch.key) for n in ("o_proj", "down_proj")
    ]
    assert rows[0].matmul_us == pytest.approx(20)
    assert rows[0].behind_us == pytest.approx(6)
    assert rows[0].beside_us == pytest.approx(4)
    assert rows[0].spread == pytest.approx(5 / 20)
    *_, last = text_of(rows).splitlines()
    assert last.split() == ["all", "layers", "16", batch.key, "70.0", "14.00", "9.00"]


def test_ranks_and_batches_are_not_added_up():
    layers = [Workload("o_proj", 64, (64,), rank, "bfloat16") for rank in (8, 16)]
    batches = (named("uniform", 8), named("uniform", 64))
    text = text_of([row_of(w, s, seconds(20, 6, 4)) for w in layers for s in batches])
    assert len([line for line in text.splitlines() if line.startswith("all layers")]) == 4


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
        Stream=lambda: SimpleNamespace(cuda_stream=7),
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
    workload = Workload("o_proj", 64, (96,), 8, "float32")
    batches = [named("uniform", 8), named("identical", 3)]
    rows = list(bench(workload, batches))
    layers = bench_behind_matmul.LAYERS
    assert [row.scenario for row in rows] == [batch.key for batch in batches]
    assert FakeGraph.captured == 3 * len(batches)
    assert len(made) == 3 * layers * len(batches)
    for place in range(len(batches)):
        first = place * (1 + 2 * layers) + 1  # the call that only loads comes first
        behind, beside = lora[first : first + layers], lora[first + layers : first + 2 * layers]
        assert len(beside) == layers
        for one, two in zip(behind, beside, strict=True):
            assert torch.equal(one, two)
