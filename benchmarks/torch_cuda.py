"""torch's two ways to do SGMV on a GPU, timed as Dop's candidates are.

A loop of matrix products per adapter, and a gathered batched product. Each is captured in a CUDA
graph, so that torch pays no launch overhead that a serving engine would not pay, takes other
adapters call by call, and is replayed on a flushed L2 cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

from dop.measure.tensors_cuda import TensorCache, Weights
from dop.scenario import Scenario
from dop.target import Target
from dop.workload import Workload

WINDOWS = 4
"""Calls per graph, each with other adapters."""
REPLAYS = 21
FLUSH_FACTOR = 4
MOST_GATHERED_BYTES = 8 << 30
"""Beyond this the gathered product has no place on a GPU that also serves."""

Call = Callable[[], object]


def baselines(
    workload: Workload, scenarios: Sequence[Scenario], target: Target
) -> Iterator[tuple[Scenario, float, float]]:
    """Microseconds per call of the loop and of the gathered product; infinite if it cannot run.

    Needs a GPU that torch sees.
    """
    cache = TensorCache(target.l2_bytes)
    weights = cache.weights(workload, scenarios, 1)
    flush = torch.zeros(FLUSH_FACTOR * target.l2_bytes // 4, device="cuda")
    for scenario in scenarios:
        batch = cache.batch(workload, scenario, timed=True)
        windows = [torch.from_numpy(rows).to("cuda", torch.int64) for rows in batch.rows[:WINDOWS]]
        y = torch.zeros((scenario.tokens, workload.total_out), dtype=batch.x.dtype, device="cuda")
        parts = y.split(list(workload.out_features), dim=1)
        loops = [_loop(batch.x, parts, weights, slots) for slots in windows]
        loop_us = _time(loops, flush)
        gathered = scenario.tokens * workload.min_bytes(0, 1)
        bmm_us = float("inf")
        if gathered <= MOST_GATHERED_BYTES:
            bmm_us = _time([_bmm(batch.x, parts, weights, slots) for slots in windows], flush)
        yield scenario, loop_us, bmm_us


def _loop(
    x: torch.Tensor, parts: Sequence[torch.Tensor], weights: Weights, slots: torch.Tensor
) -> Call:
    used = [int(s) for s in slots.unique().tolist() if s >= 0]
    groups = [(slot, (slots == slot).nonzero()[:, 0]) for slot in used]

    def one() -> None:
        slot = groups[0][0]
        for y, a, b in zip(parts, weights.a, weights.b, strict=True):
            y.addmm_(x @ a[slot].T, b[slot].T)

    def many() -> None:
        for slot, rows in groups:
            mine = x[rows]
            for y, a, b in zip(parts, weights.a, weights.b, strict=True):
                y.index_add_(0, rows, (mine @ a[slot].T) @ b[slot].T)

    return one if len(groups) == 1 and len(groups[0][1]) == len(x) else many


def _bmm(
    x: torch.Tensor, parts: Sequence[torch.Tensor], weights: Weights, slots: torch.Tensor
) -> Call:
    def call() -> None:
        rows = x.unsqueeze(1)
        for y, a, b in zip(parts, weights.a, weights.b, strict=True):
            v = torch.bmm(rows, a[slots].transpose(1, 2))
            y += torch.bmm(v, b[slots].transpose(1, 2)).squeeze(1)

    return call


def _time(calls: Sequence[Call], flush: torch.Tensor) -> float:
    """Median over the replays, in microseconds per call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # libraries choose and load their kernels outside of the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        samples = [replay_ms(graph, flush) for _ in range(REPLAYS)]
    return statistics.median(samples[2:]) * 1e3 / len(calls)


def replay_ms(graph: torch.cuda.CUDAGraph, flush: torch.Tensor) -> float:
    """Milliseconds of one replay on a flushed cache, on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.sum()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
