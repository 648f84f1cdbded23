"""bench_sgmv on a GPU: graphs that are right, times that are plausible, host cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_sgmv
from benchmarks.peers.timing import CudaClock


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = "--ranks 16 --tokens 1,16,600 --layers qkv,o --contenders dop,torch,bmm,cublas"
    with torch.cuda.stream(torch.cuda.current_stream()):  # the clock sets a stream of its own
        assert bench_sgmv.main([*options.split(), "--reps", "5", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    floors = document["env"]
    assert floors["copy_gbps"] > 100
    assert 0.1 < floors["empty_node_us"] < 20
    rows = document["rows"]
    assert {row["peer"] for row in rows} == {"dop", "torch", "bmm", "cublas"}
    for row in rows:
        assert row["err"] < 2e-2, row
        assert row["both_us"] > 0.5 * row["floor_us"], row  # faster than memory: caches were warm
        assert row["sets"] > 1


@pytest.mark.timed
def test_one_call_takes_as_long_in_a_longer_graph() -> None:
    clock = CudaClock()
    x = torch.ones(1 << 24, device="cuda")
    y = torch.empty_like(x)

    class Copies:
        most_calls = 100

        def call(self, i: int) -> None:
            y.copy_(x)

    few = clock.round(Copies(), 1, 5)  # type: ignore[arg-type]
    many = clock.round(Copies(), 1, 20)  # type: ignore[arg-type]
    times = clock.time({"few": few, "many": many}, 9)
    assert 0.5 < times["few"].median / times["many"].median < 2


@pytest.mark.timed
def test_host_cost_of_an_eager_call(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = "--host --ranks 16 --tokens 1 --layers qkv --contenders dop,cublas"
    assert bench_sgmv.main([*options.split(), "--out", str(out)]) == 0
    cost = json.loads(out.read_text())["host"][0]
    assert cost["name"] == "dop"
    assert cost["allocations"] == 0
    assert cost["synchronises"] == ""
    assert cost["median_us"] < 30
