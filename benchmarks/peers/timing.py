"""Clocks: CUDA graphs of calls on a flushed L2 cache, or wall time on a CPU; and the floors.

Both take contenders in turns, so that whatever the machine does meets all of them. On a GPU a
contender is a graph of calls, each on a set of weights of its own; before every replay a read of
several times the L2 cache takes the sets' lines out of it, outside of the timed span. The graph
that is timed is the graph that is checked.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.peers.contenders import Prepared
from benchmarks.peers.data import Data, relative_error

FLUSH_BYTES = 384 << 20
COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
WARM_ROUNDS = 2
MAX_ERROR = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Largest relative error of a right result; 16-bit products of 16-bit results give about 4e-3."""


@dataclass(frozen=True)
class Times:
    """Microseconds per call over the rounds."""

    median: float
    least: float
    p90: float

    @staticmethod
    def of(samples: Sequence[float], calls: int) -> Times:
        """From the microseconds of whole rounds of so many calls."""
        ordered = sorted(samples)
        p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
        return Times(statistics.median(ordered) / calls, ordered[0] / calls, p90 / calls)


class Round(Protocol):
    """A contender's turn: `calls` calls, as they are timed."""

    calls: int

    def run(self) -> None:
        """All calls, without waiting for them."""


class Clock(Protocol):
    """How rounds are made and timed on one kind of device."""

    def round(self, prepared: Prepared, sets: int, calls: int) -> Round:
        """Warms a contender up on every set and makes its round."""

    def time(self, rounds: Mapping[str, Round], reps: int) -> dict[str, Times]:
        """Times of each contender, taken in turns."""

    def wait(self) -> None:
        """Until everything that was launched is done."""

    def floors(self) -> dict[str, float]:
        """Copy bandwidth (copy_gbps) and what a launch costs at least (empty_node_us)."""


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass
class _Graph:
    graph: Any
    calls: int

    def run(self) -> None:
        self.graph.replay()


class CudaClock:
    """Rounds are CUDA graphs; all share one memory pool, since they never run at once."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self.stream)
        self.flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self.sink = torch.zeros((), dtype=torch.float32, device="cuda")
        self.pool = torch.cuda.graph_pool_handle()
        self.sink.add_(1.0)  # loads the kernel before a capture
        self.keeper = self._capture(lambda: self.sink.add_(1.0), 1)  # keeps the pool alive

    def round(self, prepared: Prepared, sets: int, calls: int) -> Round:
        calls = min(calls, prepared.most_calls)
        for i in range(min(sets, calls)):
            prepared.call(i)
        self.wait()

        def body() -> None:
            for k in range(calls):
                prepared.call(k % sets)

        return self._capture(body, calls)

    def _capture(self, body: Callable[[], object], calls: int) -> _Graph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            body()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture is lost; its cause counts
                graph.capture_end()
            raise
        graph.capture_end()
        return _Graph(graph, calls)

    def time(self, rounds: Mapping[str, Round], reps: int) -> dict[str, Times]:
        spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in rounds}
        for rep in range(WARM_ROUNDS + reps):
            turn = list(rounds.items())
            for name, each in turn if rep % 2 else reversed(turn):
                # Only reads: no dirty lines that are written back in the timed span.
                torch.sum(self.flush, dim=0, out=self.sink)
                begin, end = _event(), _event()
                begin.record()
                each.run()
                end.record()
                spans[name].append((begin, end))
        self.stream.synchronize()
        found = {}
        for name, pairs in spans.items():
            samples = [begin.elapsed_time(end) * 1e3 for begin, end in pairs[WARM_ROUNDS:]]
            found[name] = Times.of(samples, rounds[name].calls)
        return found

    def wait(self) -> None:
        torch.cuda.synchronize()

    def floors(self) -> dict[str, float]:
        source = torch.ones(COPY_BYTES["cuda"], dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = self._capture(lambda: target.copy_(source), 1)
        tiny = torch.zeros(1, device="cuda")

        def node(count: int) -> _Graph:
            return self._capture(lambda: [tiny.fill_(1.0) for _ in range(count)], 1)

        tiny.fill_(1.0)
        times = self.time({"copy": copy, "few": node(20), "many": node(200)}, 15)
        per_node = (times["many"].median - times["few"].median) / 180
        return {
            "copy_gbps": 2 * COPY_BYTES["cuda"] / times["copy"].median / 1e3,
            "empty_node_us": per_node,
            "graph_fixed_us": max(0.0, times["few"].median - 20 * per_node),
        }


@dataclass
class _Calls:
    body: Callable[[], object]
    calls: int

    def run(self) -> None:
        self.body()


class CpuClock:
    """Rounds are plain calls in wall time: for tests, and for what the CPU operator gives."""

    def round(self, prepared: Prepared, sets: int, calls: int) -> Round:
        calls = min(calls, prepared.most_calls)

        def body() -> None:
            for k in range(calls):
                prepared.call(k % sets)

        return _Calls(body, calls)

    def time(self, rounds: Mapping[str, Round], reps: int) -> dict[str, Times]:
        samples: dict[str, list[float]] = {name: [] for name in rounds}
        for _ in range(1 + reps):
            for name, each in rounds.items():
                begin = time.perf_counter()
                each.run()
                samples[name].append((time.perf_counter() - begin) * 1e6)
        return {name: Times.of(found[1:], rounds[name].calls) for name, found in samples.items()}

    def wait(self) -> None:
        """Nothing runs behind a CPU's back."""

    def floors(self) -> dict[str, float]:
        source = torch.ones(COPY_BYTES["cpu"], dtype=torch.uint8)
        target = torch.empty_like(source)
        copy = self.time({"copy": _Calls(lambda: target.copy_(source), 1)}, 5)["copy"]
        return {"copy_gbps": 2 * COPY_BYTES["cpu"] / copy.median / 1e3, "empty_node_us": 0.0}


def check(clock: Clock, each: Round, prepared: Prepared, data: Data) -> float:
    """Relative error of the round that will be timed, on its last set.

    If the round does not reach the last set, one call on it is checked instead.
    """
    last = data.sets - 1
    times = sum(1 for k in range(each.calls) if k % data.sets == last)
    y = data.y[last]
    before = _fresh(y)
    if times:
        each.run()
    else:
        prepared.call(last)
    clock.wait()
    return relative_error(y, before, data.update(prepared.layout), max(times, 1))


def _fresh(y: Tensor) -> Tensor:
    """Fills y with new random values and returns a copy of them."""
    return y.normal_().clone()
