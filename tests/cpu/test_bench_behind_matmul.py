"""benchmarks/bench_behind_matmul.py: what it makes of its timings; what it says without a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_behind_matmul import main, row_of, text_of
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
